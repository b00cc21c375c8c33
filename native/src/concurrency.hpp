// Whether the two proxies are evaluated in turns or at once, and the thread for the latter.

#pragma once

#include "adlocal.h"

#include <functional>
#include <memory>

namespace adl {

class Worker;

class Concurrency {
  public:
    Concurrency(const adl_llama & llama, const adl_pair_params & params, llama_context * plus, llama_context * minus);
    ~Concurrency();

    // Runs both. `single`: a batch of one token, the kind that is worth timing.
    void run(bool single, const std::function<void()> & plus, const std::function<void()> & minus);

  private:
    enum Mode { TURNS = 0, BOTH = 1 };

    void run_in(Mode mode, const std::function<void()> & plus, const std::function<void()> & minus);
    void time_in(Mode mode, const std::function<void()> & plus, const std::function<void()> & minus);
    void share_threads(Mode mode);

    const adl_llama &       llama_;
    llama_context * const   plus_;
    llama_context * const   minus_;
    const int32_t           n_threads_;
    const int32_t           n_threads_batch_;
    Mode                    mode_    = TURNS;
    Mode                    shared_  = TURNS; // the mode that the contexts' numbers of threads are for
    int                     trials_  = 0;     // still to be timed
    double                  best_[2] = {1e300, 1e300}; // seconds, by mode
    std::unique_ptr<Worker> worker_;
};

} // namespace adl
