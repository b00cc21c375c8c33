#include "rows.hpp"

#include <map>

namespace plugin {

std::vector<Rows::Token> Rows::resolve(const llama_batch & batch, const std::function<llama_pos(llama_seq_id)> & pos_max) {
    std::vector<Token>                tokens;
    std::map<llama_seq_id, llama_pos> next;
    int32_t                           n_rows = 0;
    for (int32_t i = 0; batch.token != nullptr && i < batch.n_tokens; ++i) {
        Token token = {batch.token[i], 0, {0}, -1};
        if (batch.seq_id != nullptr && batch.n_seq_id != nullptr && batch.n_seq_id[i] > 0) {
            token.seq_ids.assign(batch.seq_id[i], batch.seq_id[i] + batch.n_seq_id[i]);
        }
        const llama_seq_id seq_id = token.seq_ids[0];
        if (next.count(seq_id) == 0) {
            next[seq_id] = batch.pos ? 0 : pos_max(seq_id) + 1;
        }
        token.pos    = batch.pos ? batch.pos[i] : next[seq_id];
        next[seq_id] = token.pos + 1;
        if (batch.logits ? batch.logits[i] != 0 : i == batch.n_tokens - 1) {
            token.row = n_rows++;
        }
        tokens.push_back(std::move(token));
    }
    return tokens;
}

} // namespace plugin
