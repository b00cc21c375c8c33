#include "batch.hpp"

#include "adlocal.h"
#include "error.hpp"

#include <map>
#include <utility>

namespace adl {

namespace {

// A token that is sampled from is decoded by itself, for its row; a prompt's come with others, or without a row.
void note_prompts(std::vector<Entry> & entries) {
    std::map<llama_seq_id, int> count;
    for (const Entry & entry : entries) {
        ++count[entry.seq_ids[0]];
    }
    for (Entry & entry : entries) {
        entry.in_prompt = count[entry.seq_ids[0]] > 1 || entry.row < 0;
    }
}

} // namespace

std::vector<Entry> resolve(const llama_batch & batch, const std::function<llama_pos(llama_seq_id)> & pos_max) {
    std::vector<Entry>                entries;
    std::map<llama_seq_id, llama_pos> next;
    int32_t                           n_rows = 0;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const bool output = batch.logits ? batch.logits[i] != 0 : i == batch.n_tokens - 1;
        Entry      entry  = {batch.token[i], 0, {0}, output ? n_rows++ : -1, false};
        if (batch.seq_id != nullptr) {
            const int32_t n = batch.n_seq_id ? batch.n_seq_id[i] : 1;
            entry.seq_ids.assign(batch.seq_id[i], batch.seq_id[i] + n);
        }
        if (entry.seq_ids.empty()) {
            throw Error{ADL_ERROR_INPUT, format("token %d of the batch is of no sequence; give it one", i)};
        }
        const llama_seq_id seq_id = entry.seq_ids[0];
        if (batch.pos != nullptr) {
            entry.pos = batch.pos[i];
        } else {
            const auto known = next.find(seq_id);
            entry.pos        = known == next.end() ? pos_max(seq_id) + 1 : known->second;
            next[seq_id]     = entry.pos + 1;
        }
        entries.push_back(std::move(entry));
    }
    note_prompts(entries);
    return entries;
}

} // namespace adl
