// The pair: both proxies in two llama.cpp contexts that evaluate the same tokens.

#pragma once

#include "adjust.hpp"
#include "adlocal.h"
#include "concurrency.hpp"
#include "proxy.hpp"

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace adl {

// Both proxies' logits for one position, for use after the pair's next decode.
struct Evaluated {
    std::vector<float> plus;
    std::vector<float> minus;
    double             mean;    // E[Δ]
    double             epsilon; // that of these rows: the pair's may change before they are used

    double dose(llama_token token) const noexcept {
        return adl::dose({plus.data(), minus.data(), static_cast<int32_t>(plus.size())}, token, epsilon, mean);
    }
};

// The ε in force: the bundle's, or the one that was asked for (0: none was).
double chosen_epsilon(double bundles, double asked_for, bool is_adapter);

} // namespace adl

// What adlocal.h calls a pair. Methods throw adl::Error.
struct adl_pair {
  public:
    adl_pair(const adl_llama & llama, std::shared_ptr<const adl::Weights> weights, double epsilon, double delta_scale,
             const llama_model * teacher, const adl_pair_params & params);

    // Number of output rows. Whatever fails sticks until clear().
    int32_t decode(const llama_batch & batch);

    // Makes sequence 0 hold exactly `tokens`, at least one, and evaluates the row that follows them: keeps of the common prefix
    // what a fresh pair would have alike, drops the rest, decodes what is new. The first `n_prompt` are a prompt, whose last
    // token is decoded with what follows it and not with those before it. Starts afresh when something else has used the
    // pair, or after an error.
    void follow(const std::vector<llama_token> & tokens, size_t n_prompt);

    void clear() noexcept;
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    bool remembers(llama_seq_id seq_id, llama_pos first, llama_pos next) const;
    void seq_cp(llama_seq_id source, llama_seq_id target, llama_pos p0, llama_pos p1);
    void seq_keep(llama_seq_id seq_id);
    void touch() noexcept;
    void set_epsilon(double value);

    // Adjusts n_rows rows in place, or throws and leaves them closed.
    void adjust(float * logits, int32_t n_rows, const double * strength, const double * guard, adl_row * rows);

    // The same for one row of the last decode.
    adl_row adjust_row(float * logits, int32_t row, double strength, double guard);

    // How many tokens of a teacher's row pass the guard. Throws where the row is no numbers.
    int32_t n_candidates(const float * logits, double guard) const;

    // E[Δ] of a row of the last decode, and a copy of that row with its E[Δ].
    double         expectation(int32_t row);
    adl::Evaluated copy_row(int32_t row, double mean);

    // Makes end-of-generation all that a row can be sampled for.
    void close_row(float * logits) const noexcept;

    // λ of a strength in nats.
    double lam(double strength) const noexcept { return strength / delta_scale; }

    double        dose(int32_t row, llama_token token) noexcept;
    const float * logits(const adl::Proxy & proxy);

    // A number that changes whenever the memory does.
    uint64_t serial() const noexcept { return serial_; }

    int32_t n_rows() const noexcept { return n_rows_; }

    size_t n_ubatch() const { return static_cast<size_t>(n_ubatch_); }
    size_t n_outputs_max() const { return static_cast<size_t>(n_outputs_max_); }

    const adl_llama          llama;
    double                   epsilon; // changed by set_epsilon alone
    const double             delta_scale;
    const std::shared_ptr<const adl::Weights> weights; // other pairs may compute with them too
    const adl::Proxy         plus;
    const adl::Proxy         minus;
    const int32_t            n_vocab;         // of the proxies
    const int32_t            n_shared;        // with the teacher; 0 without one
    const int32_t            n_vocab_teacher; // 0 without one
    const std::vector<llama_token> teacher_ends;
    std::mutex               mutex;           // held by samplers
    char                     error[1024] = ""; // the sticky one

  private:
    adl::Ends ends() const { return {teacher_ends.data(), teacher_ends.size()}; }

    void    attach();
    void    scale(const adl::Proxy & proxy, double value);
    void    stick(const char * fmt, const char * words) noexcept;
    void    check(const llama_batch & batch) const;
    void    evaluate(const llama_batch & batch);
    void    check_code(int32_t code, const char * which) const;
    size_t  keep_prefix(const std::vector<llama_token> & tokens, size_t n_prompt);
    size_t  reusable(size_t n_common, size_t n_prompt) const;
    void    append(const llama_token * tokens, size_t n, bool output);
    adl::Proxies proxies(int32_t row);

    const int32_t            n_batch_;
    const int32_t            n_ubatch_; // most tokens that llama.cpp evaluates in one go
    const int32_t            n_ctx_train_;
    const int32_t            n_swa_; // tokens of a sliding window, 0 where there is none
    const bool               is_shared_; // a context of more tokens than one sequence may have
    const int32_t            n_outputs_max_;
    adl::Concurrency         concurrency_;
    bool                     attached_ = false; // the adapter, at ±epsilon
    uint64_t                 serial_ = 0;
    int32_t                  n_rows_ = 0;
    std::vector<adl_row>     rows_;
    bool                     follows_ = true; // sequence 0 holds exactly tokens_, and there is no other
    std::vector<llama_token> tokens_;
    size_t                   n_canonical_ = 0; // how many of them were evaluated as in a fresh pair
};

namespace adl {

// The logit of a token that cannot be sampled from a closed row. Not −inf: a grammar that forbids the only other tokens
// would leave nothing, and llama.cpp ends the process then.
constexpr float CLOSED = -1e9f;

} // namespace adl
