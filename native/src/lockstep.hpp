// One protected step: the teacher decodes, the pair follows where a row has a choice, and the rows are adjusted.

#pragma once

#include "adlocal.h"
#include "batch.hpp"
#include "error.hpp"
#include "pair.hpp"

#include <map>
#include <string>
#include <vector>

namespace adl {

struct Cell {
    llama_pos   pos;
    llama_token token;
    bool        in_prompt; // it was not sampled
};

// What the teacher's memory holds of one sequence, by position. The pair's holds the first `n_held`; the others wait.
struct Sequence {
    std::vector<Cell> cells;
    size_t            n_held  = 0;
    bool              steered = true; // as its last row was; one without rows may come to be

    bool waits() const { return n_held < cells.size(); }
};

// A row of the teacher's last decode.
struct Output {
    adl_row_params params;
    adl_row_result result;
    llama_seq_id   seq_id;  // one of those whose row it is
    size_t         cell;    // the last token before it, among its sequence's cells
    Evaluated      proxies; // theirs, where it was evaluated
};

} // namespace adl

// What adlocal.h calls a lockstep. Methods throw adl::Error.
struct adl_lockstep {
  public:
    adl_lockstep(adl_pair & pair, llama_context * teacher, const adl_lockstep_params & params);

    void begin(const llama_batch & batch, const adl_row_params * rows, int32_t n_rows);
    void end(int32_t status);

    int32_t                n_rows() const { return static_cast<int32_t>(outputs_.size()); }
    const adl_row_result & result(int32_t row) const { return outputs_[row].result; }
    double                 dose(int32_t row, llama_token token) const noexcept;
    void                   doses(llama_seq_id seq_id, llama_pos pos, const llama_token * tokens, size_t n_tokens, double * out);
    const float *          logits(int32_t row, adl_sign sign) const noexcept;
    adl_lockstep_stats     stats() const { return stats_; }
    size_t                 n_held(llama_seq_id seq_id) const;

    void clear();
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    void seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1);
    void seq_keep(llama_seq_id seq_id);
    void restore(llama_seq_id seq_id, const llama_token * tokens, const llama_pos * pos, size_t n_tokens, size_t n_held);

    void   close(int32_t n_rows) const noexcept;
    size_t copy_tokens(llama_seq_id seq_id, llama_token * tokens, llama_pos * pos, size_t capacity) const noexcept;

    adl_pair &            pair;
    llama_context * const teacher;

  private:
    struct Wanted; // a token that waits, and the row that follows it

    adl::Sequence & sequence(llama_seq_id seq_id) { return sequences_[seq_id]; }
    llama_pos       last_known(llama_seq_id seq_id) const;
    void            check_positions() const;
    void            make_room();
    void            commit() noexcept;
    void            roll_back();
    void            look(int32_t row);
    void            evaluate_rows();
    void            evaluate(const std::vector<Wanted> & wanted, size_t n_prompt);
    size_t          batch_size(const std::vector<Wanted> & wanted, size_t first, size_t n_prompt) const;
    void            fail_from(const std::vector<Wanted> & wanted, size_t first, const adl::Error & error);
    void            decode(const Wanted * wanted, size_t n);
    void            decode_batch(const Wanted * wanted, size_t n);
    void            finish(adl::Output & output, int32_t row, int32_t pair_row);
    void            fail(adl::Output & output, int32_t row, const adl::Error & error);
    void            catch_up(llama_seq_id seq_id, size_t end);
    void            catch_up(llama_seq_id seq_id);
    void            hold_only(llama_seq_id seq_id, size_t n);
    void            catch_up_long();
    void            forget_held() noexcept;
    void            notice() noexcept;
    void            follow_pair() noexcept;
    void            rm(llama_seq_id seq_id, adl::Sequence & sequence, llama_pos p0, llama_pos p1);
    float *         row_of(int32_t row) const;

    const adl::Evaluated * evaluated(int32_t row) const noexcept;

    const adl_llama &                     llama_;
    const llama_memory_t                  memory_; // the teacher's
    const bool                            full_;
    const size_t                          n_batch_; // most tokens that the pair evaluates in one go
    const size_t                          n_outputs_max_;
    std::map<llama_seq_id, adl::Sequence> sequences_;
    std::vector<adl::Entry>               step_;
    std::vector<adl_row_params>           params_; // of the step's rows
    std::vector<adl::Output>              outputs_;
    int32_t                               n_readable_ = 0; // rows that the teacher's last good decode wrote
    bool                                  under_way_  = false;
    uint64_t                              serial_; // the pair's, when its memory was as `n_held` says
    adl_lockstep_stats                    stats_ = {};
    std::string                           failure_; // of this step's rows, in words
    int32_t                               failure_status_ = ADL_OK;
};
