// A shadow of every llama_batch_ext, which cannot be read: what its builder put into it.

#pragma once

#include "llama.h"

#include <map>
#include <mutex>
#include <vector>

namespace plugin {

class ShadowBatch {
  public:
    void add(llama_seq_id seq_id, llama_token token); // LLAMA_TOKEN_NULL for an embedding
    void add_sequence(int32_t i, llama_seq_id seq_id);
    void set_position(int32_t i, llama_pos pos);
    void set_output(int32_t i, bool value);
    void set_embedding(int32_t i);
    void clear() { tokens_.clear(); }

    // Whether the pair can follow it: tokens alone.
    bool is_followed() const;

    // The same as a llama_batch, valid until the shadow changes.
    llama_batch view();

  private:
    struct Token {
        llama_token               id;
        llama_pos                 pos;
        std::vector<llama_seq_id> seq_ids;
        bool                      output;
        bool                      is_embedding;
    };

    bool has(int32_t i) const { return i >= 0 && static_cast<size_t>(i) < tokens_.size(); }

    std::vector<Token>          tokens_;
    std::vector<llama_token>    ids_;
    std::vector<llama_pos>      pos_;
    std::vector<int32_t>        n_seq_id_;
    std::vector<llama_seq_id *> seq_id_;
    std::vector<int8_t>         output_;
};

// The shadow of a batch. One batch is used by one thread at a time, several by several.
ShadowBatch & shadow_of(const llama_batch_ext * batch);
void          forget_shadow(const llama_batch_ext * batch);

} // namespace plugin
