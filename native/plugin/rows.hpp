// Which token came after each row of a decode.

#pragma once

#include "../src/batch.hpp"

#include <algorithm>
#include <utility>
#include <vector>

namespace plugin {

using Tokens = std::vector<adl::Entry>;

class Rows {
  public:
    // The batch that was decoded last.
    void decoded(Tokens tokens) { last_ = std::move(tokens); }

    // Calls `found(sequence, row, token)` for each row of the last batch whose token is known now: the tokens of `next` go on
    // where a sequence was kept, and what it decoded before that, drafts that were right, is known as well.
    template <typename Found>
    void follow(const Tokens & next, Found && found) const;

  private:
    Tokens last_;
};

template <typename Found>
void Rows::follow(const Tokens & next, Found && found) const {
    for (const adl::Entry & before : last_) {
        if (before.row < 0) {
            continue;
        }
        const llama_seq_id seq_id = before.seq_ids[0];
        const auto         is_of  = [seq_id](const adl::Entry & entry) { return entry.seq_ids[0] == seq_id; };
        const auto         first  = std::find_if(next.begin(), next.end(), is_of);
        if (first == next.end() || first->pos <= before.pos) { // it does not go on, or it was cut before
            continue;
        }
        const Tokens & in    = first->pos == before.pos + 1 ? next : last_;
        const auto     after = std::find_if(in.begin(), in.end(), [&](const adl::Entry & entry) { return is_of(entry) && entry.pos == before.pos + 1; });
        if (after != in.end()) {
            found(seq_id, before.row, after->token);
        }
    }
}

} // namespace plugin
