// A host's batch, with everything filled in that llama_decode fills in by itself.

#pragma once

#include "llama.h"

#include <functional>
#include <vector>

namespace adl {

// A token of a batch.
struct Entry {
    llama_token               token;
    llama_pos                 pos;
    std::vector<llama_seq_id> seq_ids;
    int32_t                   row;       // among the batch's output rows; −1 where it has none
    bool                      in_prompt; // it was not sampled
};

// `pos_max` gives the last position that the teacher's memory holds of a sequence, before the decode. Throws Error for a token
// of no sequence.
std::vector<Entry> resolve(const llama_batch & batch, const std::function<llama_pos(llama_seq_id)> & pos_max);

} // namespace adl
