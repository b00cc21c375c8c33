// One protected context.

#pragma once

#include "adlocal.h"
#include "config.hpp"
#include "control.hpp"
#include "llama.h"
#include "rows.hpp"
#include "think.hpp"

#include <map>
#include <optional>
#include <vector>

namespace plugin {

// A context of a protected model. Its methods are what the guarded functions do.
class Context {
  public:
    Context(llama_context * context, adl_pair * pair, const llama_context_params & params);
    ~Context();

    // `decode` is the host's own call.
    template <typename Decode>
    int32_t step(const llama_batch & batch, Decode && decode);

    bool readable() const { return readable_ && !embeddings_; }

    // A row in which nothing of the teacher is left.
    float * closed_row() { return closed_.data(); }

    void set_embeddings(bool value) { embeddings_ = value; }
    void set_causal(bool value) { causal_ = value; }

    // Protection can no longer follow: no row is readable until the memory is cleared.
    void poison(const char * why);
    void clear();

    // Memory operations of llama.h, followed by the lockstep. What cuts more off a sequence than its last batch lets it begin
    // anew; a draft that was wrong is in the last batch.
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1);
    void seq_keep(llama_seq_id seq_id);

    // A sequence begins anew: its settings are read again when it is next decoded.
    void begin(llama_seq_id seq_id);

    // Whether a state of these tokens merely takes back the last batch, a draft that was wrong: memory that cannot forget a part
    // goes back to a state before it. To be asked before the lockstep follows.
    bool takes_back(llama_seq_id seq_id, const std::vector<llama_token> & tokens, const std::vector<llama_pos> & pos) const;

    // The lockstep has followed a state that was restored: the sequence begins anew, unless that took back a draft.
    void restored(llama_seq_id seq_id, bool took_back);

    adl_pair *     pair() const { return pair_; }
    adl_lockstep * lockstep() const { return lockstep_; }

    const llama_memory_t memory;
    const uint32_t       n_seq_max;

  private:
    struct Asked; // of a step's rows

    // What is known of a sequence.
    struct Sequence {
        std::optional<Latched> latched;
        llama_pos              draft    = 0;     // what is cut from after here was drafted in its last batch, and wrong
        bool                   has_rows = false; // of that batch
        Progress               progress;
    };

    Tokens          resolve(const llama_batch & batch) const;
    Asked           ask(const Tokens & tokens);
    void            ask_bans(const Tokens & tokens, Asked & asked);
    const Latched * latched(llama_seq_id seq_id);
    llama_pos       pos_max(llama_seq_id seq_id) const;
    bool            has(llama_seq_id seq_id) const { return seq_id >= 0 && static_cast<size_t>(seq_id) < sequences_.size(); }
    void            notice_prompts(const Tokens & tokens);
    void            note(const Tokens & tokens);
    void            count_doses(const Tokens & next) const;
    void            count(const Tokens & tokens, const std::vector<adl_row_result> & results, bool shown) const;
    void            forget(llama_seq_id seq_id);
    void            close(const Asked & asked) const;
    void            ban(const Asked & asked, std::vector<adl_row_result> & results) const;

    llama_context * const context_;
    adl_pair *            pair_;
    adl_lockstep *        lockstep_;
    std::vector<float>    closed_;
    Rows                  rows_;
    std::vector<Sequence> sequences_;
    bool                  embeddings_;
    bool                  causal_   = true;  // without, every token sees every other: the pair's rows would be others
    bool                  readable_ = false; // the last decode's rows were adjusted
    bool                  poisoned_ = false;
};

// The parameters of each row, and which rows are closed whatever comes out.
struct Context::Asked {
    struct Ban {
        int32_t row;
        Think   think;
    };

    std::vector<adl_row_params>      params;
    std::vector<int32_t>             closed;
    std::vector<Ban>                 bans;
    std::map<llama_seq_id, Progress> progress; // of the batch's sequences, once it is decoded
};

template <typename Decode>
int32_t Context::step(const llama_batch & batch, Decode && decode) {
    readable_ = false;
    if (poisoned_) {
        return -3;
    }
    if (!causal_) {
        say("the program has turned causal attention off, which the pair cannot follow");
        return -3;
    }
    std::vector<int8_t> none(static_cast<size_t>(batch.n_tokens > 0 ? batch.n_tokens : 0), 0);
    llama_batch         followed = batch;
    if (embeddings_) { // every token is an output row, and all are closed
        followed.logits = none.data();
    }
    Tokens tokens = resolve(followed);
    count_doses(tokens);
    rows_.decoded({});
    notice_prompts(tokens);
    const Asked                 asked  = ask(tokens);
    const auto                  n_rows = static_cast<int32_t>(asked.params.size());
    std::vector<adl_row_result> results(asked.params.size());
    if (adl_lockstep_begin(lockstep_, followed, asked.params.data(), n_rows) != ADL_OK) {
        say("%s", adl_last_error());
        return -3;
    }
    const int32_t status = decode();
    const int32_t failed = adl_lockstep_end(lockstep_, status, results.data());
    for (const auto & [seq_id, progress] : asked.progress) { // as far as the memory holds the batch, whatever the status
        sequences_[seq_id].progress = progress;
        forget(seq_id);
    }
    if (embeddings_) {
        adl_lockstep_close(lockstep_, batch.n_tokens);
    }
    if (status == 0) {
        close(asked);
        ban(asked, results);
        count(tokens, results, failed == ADL_OK);
        note(tokens);
        rows_.decoded(std::move(tokens));
    }
    if (failed != ADL_OK) { // the rows that needed the pair are closed
        say("%s", adl_last_error());
        return -3;
    }
    readable_ = status == 0;
    return status;
}

} // namespace plugin
