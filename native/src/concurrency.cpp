#include "concurrency.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

namespace adl {

namespace {

constexpr int    TRIALS = 16;   // half of them in each mode; the best of eight is not the one that was disturbed
constexpr double GAIN   = 0.95; // what two at once have to save: they leave each half of the threads

} // namespace

// One thread that runs one job at a time.
class Worker {
  public:
    Worker() : thread_([this] { loop(); }) {}

    ~Worker() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    void start(const std::function<void()> & job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
        }
        changed_.notify_all();
    }

    // Waits for the job. Throws what it threw.
    void finish() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return job_ == nullptr; });
        if (thrown_) {
            std::rethrow_exception(std::exchange(thrown_, nullptr));
        }
    }

  private:
    void loop() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [this] { return stop_ || job_ != nullptr; });
            if (stop_) {
                return;
            }
            lock.unlock();
            std::exception_ptr thrown;
            try {
                (*job_)();
            } catch (...) {
                thrown = std::current_exception();
            }
            lock.lock();
            thrown_ = thrown;
            job_    = nullptr;
            changed_.notify_all();
        }
    }

    std::mutex                    mutex_;
    std::condition_variable       changed_;
    const std::function<void()> * job_  = nullptr;
    bool                          stop_ = false;
    std::exception_ptr            thrown_;
    std::thread                   thread_; // last: it starts when all else is there
};

Concurrency::Concurrency(const adl_llama & llama, const adl_pair_params & params, llama_context * plus, llama_context * minus)
    : llama_(llama), plus_(plus), minus_(minus), n_threads_(params.context.n_threads), n_threads_batch_(params.context.n_threads_batch) {
    if (std::min(n_threads_, n_threads_batch_) < 2) {
        return; // two at once would be more threads than the user gave
    }
    if (params.concurrency == ADL_CONCURRENCY_BOTH) {
        mode_ = BOTH;
    } else if (params.concurrency == ADL_CONCURRENCY_AUTO && params.model.n_gpu_layers != 0 && llama.llama_supports_gpu_offload()) {
        trials_ = TRIALS;
    }
}

Concurrency::~Concurrency() = default;

void Concurrency::run(bool single, const std::function<void()> & plus, const std::function<void()> & minus) {
    if (trials_ == 0 || !single) {
        run_in(mode_, plus, minus);
        return;
    }
    time_in(trials_ % 2 == 0 ? TURNS : BOTH, plus, minus);
    if (--trials_ == 0) {
        mode_ = best_[BOTH] < GAIN * best_[TURNS] ? BOTH : TURNS;
    }
}

void Concurrency::time_in(Mode mode, const std::function<void()> & plus, const std::function<void()> & minus) {
    const auto started = std::chrono::steady_clock::now();
    run_in(mode, plus, minus);
    llama_.llama_synchronize(plus_); // a GPU may be at work after llama_decode has returned
    llama_.llama_synchronize(minus_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - started;
    best_[mode] = std::min(best_[mode], seconds.count());
}

void Concurrency::run_in(Mode mode, const std::function<void()> & plus, const std::function<void()> & minus) {
    share_threads(mode);
    if (mode == TURNS) {
        plus();
        minus();
        return;
    }
    if (!worker_) {
        worker_ = std::make_unique<Worker>();
    }
    worker_->start(minus);
    std::exception_ptr thrown;
    try {
        plus();
    } catch (...) {
        thrown = std::current_exception();
    }
    worker_->finish(); // the job refers to this frame: it must end before the frame does
    if (thrown) {
        std::rethrow_exception(thrown);
    }
}

// Two at once share the threads that one at a time would have.
void Concurrency::share_threads(Mode mode) {
    if (mode == shared_) {
        return;
    }
    const int32_t half = mode == BOTH ? n_threads_ / 2 : 0, half_batch = mode == BOTH ? n_threads_batch_ / 2 : 0;
    llama_.llama_set_n_threads(plus_, n_threads_ - half, n_threads_batch_ - half_batch);
    llama_.llama_set_n_threads(minus_, mode == BOTH ? half : n_threads_, mode == BOTH ? half_batch : n_threads_batch_);
    shared_ = mode;
}

} // namespace adl
