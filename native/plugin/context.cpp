#include "context.hpp"

#include "../src/error.hpp"
#include "process.hpp"
#include "real.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

namespace plugin {

Context::Context(llama_context * c, adl_pair * pair, const llama_context_params & params)
    : memory(real().table.llama_get_memory(c)), n_seq_max(real().llama_n_seq_max(c)), context_(c), pair_(pair),
      lockstep_(adl_lockstep_init(pair, c, adl_lockstep_default_params())), embeddings_(params.embeddings) {
    if (lockstep_ == nullptr) {
        die("%s", adl_last_error());
    }
    const llama_vocab * vocab = real().table.llama_model_get_vocab(real().llama_get_model(c));
    sequences_.resize(n_seq_max);
    closed_.assign(static_cast<size_t>(real().table.llama_vocab_n_tokens(vocab)), -1e9f);
    for (size_t token = 0; token < closed_.size(); ++token) {
        if (real().table.llama_vocab_is_eog(vocab, static_cast<llama_token>(token))) {
            closed_[token] = 0.0f;
        }
    }
}

Context::~Context() {
    adl_lockstep_free(lockstep_);
    adl_pair_free(pair_);
}

void Context::poison(const char * why) {
    say("%s; the context is closed until its memory is cleared", why);
    poisoned_ = true;
    readable_ = false;
}

void Context::clear() {
    adl_lockstep_memory_clear(lockstep_);
    sequences_.assign(n_seq_max, {});
    poisoned_ = readable_ = false;
}

bool Context::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    for (llama_seq_id each = 0; has(each); ++each) {
        const llama_pos last = pos_max(each);
        if ((seq_id < 0 || each == seq_id) && (p1 < 0 || p1 > last) && p0 <= std::min(last, sequences_[each].draft)) {
            begin(each);
        }
    }
    const bool done = adl_lockstep_memory_seq_rm(lockstep_, seq_id, p0, p1);
    for (llama_seq_id each = 0; has(each); ++each) {
        forget(each);
    }
    return done;
}

void Context::seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1) {
    if (adl_lockstep_memory_seq_cp(lockstep_, source, target, p0, p1) != ADL_OK) {
        return poison(adl_last_error());
    }
    if (has(source) && has(target)) {
        sequences_[target] = sequences_[source];
        forget(target);
        Process::get().control().copy(source, target);
    }
}

void Context::seq_keep(llama_seq_id seq_id) {
    adl_lockstep_memory_seq_keep(lockstep_, seq_id);
    for (llama_seq_id other = 0; has(other); ++other) {
        if (other != seq_id) {
            begin(other);
        }
    }
}

void Context::begin(llama_seq_id seq_id) {
    if (has(seq_id)) {
        sequences_[seq_id] = {};
    }
}

bool Context::takes_back(llama_seq_id seq_id, const std::vector<llama_token> & tokens, const std::vector<llama_pos> & pos) const {
    if (!has(seq_id) || !sequences_[seq_id].has_rows || pos.empty() || pos.back() + 1 != sequences_[seq_id].draft) {
        return false;
    }
    std::vector<llama_token> held(adl_lockstep_get_tokens(lockstep_, seq_id, nullptr, nullptr, 0));
    std::vector<llama_pos>   held_pos(held.size());
    adl_lockstep_get_tokens(lockstep_, seq_id, held.data(), held_pos.data(), held.size());
    const bool was_draft = held.size() > tokens.size() + 1; // not what was sampled alone
    return was_draft && std::equal(tokens.begin(), tokens.end(), held.begin());
}

void Context::restored(llama_seq_id seq_id, bool took_back) {
    if (took_back) {
        forget(seq_id);
    } else {
        begin(seq_id);
    }
}

// Of a request's progress, what the memory does not hold.
void Context::forget(llama_seq_id seq_id) {
    sequences_[seq_id].progress.cut(pos_max(seq_id) + 1);
}

// Nothing where the lockstep will refuse the batch.
Tokens Context::resolve(const llama_batch & batch) const {
    return adl::guarded<Tokens>({}, [&] { return batch.token ? adl::resolve(batch, [this](llama_seq_id seq_id) { return pos_max(seq_id); }) : Tokens(); });
}

// Whoever was given rows to sample from and now reads a token without one reads a prompt: the next request.
void Context::notice_prompts(const Tokens & tokens) {
    for (const adl::Entry & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            if (has(seq_id) && token.row < 0 && sequences_[seq_id].has_rows) {
                begin(seq_id);
            }
        }
    }
}

// Sampled and drafted tokens all have rows, and those of a prompt have not.
void Context::note(const Tokens & tokens) {
    std::set<llama_seq_id> seen;
    for (const adl::Entry & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            Sequence & sequence = sequences_[seq_id];
            const bool is_first = seen.insert(seq_id).second;
            if (is_first || token.row < 0 || !sequence.has_rows) {
                sequence.draft = token.pos;
            }
            sequence.has_rows = (sequence.has_rows && !is_first) || token.row >= 0;
        }
    }
}

llama_pos Context::pos_max(llama_seq_id seq_id) const {
    return !has(seq_id) ? -1 : real().table.llama_memory_seq_pos_max(memory, seq_id);
}

// NULL for a sequence that llama.cpp will refuse.
const Latched * Context::latched(llama_seq_id seq_id) {
    if (!has(seq_id)) {
        return nullptr;
    }
    auto & latched = sequences_[seq_id].latched;
    if (!latched) {
        latched = Process::get().control().latch(seq_id, static_cast<int32_t>(closed_.size()));
    }
    return &*latched;
}

// A row of several sequences is protected as the one that asks for most.
Context::Asked Context::ask(const Tokens & tokens) {
    Asked asked;
    for (const adl::Entry & token : tokens) {
        std::optional<Latched> row;
        for (const llama_seq_id seq_id : token.seq_ids) {
            if (const Latched * each = latched(seq_id)) {
                row                  = row ? *row : *each;
                row->closed          = row->closed || each->closed;
                row->params.strength = std::max(row->params.strength, each->params.strength);
                row->params.guard    = std::min(row->params.guard, each->params.guard);
                row->params.mode     = std::max(row->params.mode, each->params.mode);
            }
        }
        if (token.row >= 0) {
            asked.params.push_back(row ? row->params : Process::get().control().floor());
            if (row && row->closed) {
                asked.closed.push_back(token.row);
            }
        }
    }
    ask_bans(tokens, asked);
    return asked;
}

// A row of several sequences is banned what one of them is. Drafts follow a token of the same batch.
void Context::ask_bans(const Tokens & tokens, Asked & asked) {
    for (const adl::Entry & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            if (const Latched * each = latched(seq_id)) {
                Progress & progress = asked.progress.try_emplace(seq_id, sequences_[seq_id].progress).first->second;
                progress.decoded(each->think, token.pos, token.token, token.row >= 0);
            }
        }
    }
    for (const adl::Entry & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            const Latched * each = latched(seq_id);
            if (token.row >= 0 && each && asked.progress.at(seq_id).bans(each->think, token.pos)) {
                asked.bans.push_back({token.row, each->think});
            }
        }
    }
}

void Context::close(const Asked & asked) const {
    float * const logits = asked.closed.empty() ? nullptr : real().table.llama_get_logits(context_);
    for (const int32_t row : asked.closed) {
        std::copy(closed_.begin(), closed_.end(), logits + static_cast<size_t>(row) * closed_.size());
    }
}

// After the adjustment, which gives nothing back then.
void Context::ban(const Asked & asked, std::vector<adl_row_result> & results) const {
    constexpr float NEVER  = -std::numeric_limits<float>::infinity();
    float * const   logits = asked.bans.empty() ? nullptr : real().table.llama_get_logits(context_);
    for (const auto & [row, think] : asked.bans) {
        float * const begin = logits + static_cast<size_t>(row) * closed_.size();
        float * const end   = begin + closed_.size();
        for (const llama_token token : {think.open, think.close}) {
            if (token != LLAMA_TOKEN_NULL) {
                begin[token] = NEVER;
            }
        }
        if (std::all_of(begin, end, [](float logit) { return logit == NEVER; })) {
            std::copy(closed_.begin(), closed_.end(), begin);
            results[static_cast<size_t>(row)].closed = true;
        }
    }
}

//
// Counters
//

// The doses of the tokens that came after the rows of the last step.
void Context::count_doses(const Tokens & next) const {
    rows_.follow(next, [this](llama_seq_id seq_id, int32_t row, llama_token token) {
        const double dose = adl_lockstep_dose(lockstep_, row, token);
        if (std::isfinite(dose)) {
            adl_control_counters & counters = Process::get().control().counters(seq_id);
            counters.dose += dose;
            ++counters.n_dosed;
        }
    });
}

// Where the pair failed for one of them, none of a step's rows was shown.
void Context::count(const Tokens & tokens, const std::vector<adl_row_result> & results, bool shown) const {
    for (const adl::Entry & token : tokens) {
        for (const llama_seq_id seq_id : token.seq_ids) {
            ++Process::get().control().counters(seq_id).n_decoded;
        }
        if (token.row < 0) {
            continue;
        }
        const adl_row_result & result   = results[static_cast<size_t>(token.row)];
        adl_control_counters & counters = Process::get().control().counters(token.seq_ids[0]);
        if (!shown || result.closed || sequences_[token.seq_ids[0]].latched->closed) {
            counters.n_closed += 1;
            continue;
        }
        counters.n_rows += 1;
        counters.n_choices += result.n_candidates > 1;
        counters.n_evaluated += result.evaluated;
        counters.kl += result.kl;
    }
}

} // namespace plugin
