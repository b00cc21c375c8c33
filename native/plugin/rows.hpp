// Whose each row of a decode is, and which token came after it.

#pragma once

#include "adlocal.h"
#include "llama.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace plugin {

class Rows {
  public:
    struct Token {
        llama_token               id;
        llama_pos                 pos;
        std::vector<llama_seq_id> seq_ids;
        int32_t                   row; // −1 where it has none
    };

    // A batch with everything filled in that llama.cpp would fill in by itself.
    static std::vector<Token> resolve(const llama_batch & batch, const std::function<llama_pos(llama_seq_id)> & pos_max);

    // Calls `found(sequence, row, token)` for each row of the last batch whose token is known now: the tokens of `next` go on
    // where a sequence was kept, and what it decoded before that, drafts that were right, is known as well.
    template <typename Found>
    void follow(const std::vector<Token> & next, Found && found) const;

    // The batch that was decoded last.
    void decoded(std::vector<Token> tokens) { last_ = std::move(tokens); }

  private:
    std::vector<Token> last_;
};

template <typename Found>
void Rows::follow(const std::vector<Token> & next, Found && found) const {
    for (const Token & before : last_) {
        if (before.row < 0) {
            continue;
        }
        const llama_seq_id seq_id = before.seq_ids[0];
        const auto         is_of  = [seq_id](const Token & token) { return token.seq_ids[0] == seq_id; };
        const auto         first  = std::find_if(next.begin(), next.end(), is_of);
        if (first == next.end() || first->pos <= before.pos) { // it does not go on, or it was cut before
            continue;
        }
        const std::vector<Token> & in = first->pos == before.pos + 1 ? next : last_;
        const auto after = std::find_if(in.begin(), in.end(), [&](const Token & token) { return is_of(token) && token.pos == before.pos + 1; });
        if (after != in.end()) {
            found(seq_id, before.row, after->id);
        }
    }
}

} // namespace plugin
