// Which threads evaluate the halves, and how many; pairs in several threads.

#include "check.hpp"
#include "models.hpp"

#include <algorithm>

namespace {

using namespace models;
using fake::Throws;
using std::chrono::milliseconds;

adl_pair_params with_mode(adl_concurrency mode, int32_t n_threads = 4, int32_t n_threads_batch = 4) {
    adl_pair_params p           = params();
    p.concurrency               = mode;
    p.context.n_threads         = n_threads;
    p.context.n_threads_batch   = n_threads_batch;
    return p;
}

// Decodes `n` single tokens, and checks the last row.
void decode_singles(adl_pair * pair, int n) {
    for (int i = 0; i < n; ++i) {
        adl_pair_memory_clear(pair);
        CHECK_EQ(adl_pair_decode(pair, Batch({5}).get()), 1);
    }
    const std::vector<float> own = fake::logits(MINUS, {5});
    CHECK(std::equal(own.begin(), own.end(), adl_pair_get_logits(pair, ADL_MINUS)));
}

void decode_batch(adl_pair * pair, int n) {
    adl_pair_memory_clear(pair);
    CHECK_EQ(adl_pair_decode(pair, Batch(Tokens(n, 5)).get()), 1);
    const std::vector<float> own = fake::logits(MINUS, Tokens(n, 5));
    CHECK(std::equal(own.begin(), own.end(), adl_pair_get_logits(pair, ADL_MINUS)));
}

bool only_this_thread_decoded() {
    return fake::counts().decode_threads == std::set<std::thread::id>{std::this_thread::get_id()};
}

// Forgets what was counted of decodes.
void recount() {
    fake::counts().max_together = fake::counts().max_threads = fake::counts().max_threads_batch = 0;
    fake::counts().decode_threads.clear();
}

TEST(in_turns_on_the_callers_thread) {
    install();
    fake::settings().decode_time = milliseconds(1);
    Host host(with_mode(ADL_CONCURRENCY_TURNS));
    decode_singles(host.pair, 40);
    decode_batch(host.pair, 8);
    CHECK_EQ(fake::counts().max_together, 1);
    CHECK_EQ(fake::counts().max_threads, 4); // each has all of them
    CHECK_EQ(fake::counts().max_threads_batch, 4);
    CHECK(only_this_thread_decoded());
}

TEST(both_at_once_in_two_threads) {
    for (const int32_t n_threads : {2, 3, 4, 5, 8}) {
        install();
        fake::settings().rendezvous = true;
        Host host(with_mode(ADL_CONCURRENCY_BOTH, n_threads, n_threads + 3));
        decode_singles(host.pair, 4);
        decode_batch(host.pair, 8);
        CHECK_EQ(fake::counts().max_together, 2);
        CHECK_EQ(fake::counts().max_threads, n_threads);
        CHECK_EQ(fake::counts().max_threads_batch, n_threads + 3);
        CHECK_EQ(fake::counts().decode_threads.size(), 2u); // one more, and the same each time
        CHECK(fake::counts().decode_threads.count(std::this_thread::get_id()) == 1);
    }
}

TEST(one_thread_is_never_two) {
    for (const auto mode : {ADL_CONCURRENCY_BOTH, ADL_CONCURRENCY_AUTO}) {
        for (const auto & [single, batch] : {std::pair<int, int>{1, 1}, {1, 4}, {4, 1}}) {
            install();
            fake::settings().supports_offload = true;
            fake::settings().decode_time      = milliseconds(1);
            Host host(with_mode(mode, single, batch));
            decode_singles(host.pair, 24);
            decode_batch(host.pair, 8);
            CHECK(fake::counts().max_threads <= single);
            CHECK(fake::counts().max_threads_batch <= batch);
            CHECK(single > 1 || batch > 1 || only_this_thread_decoded());
        }
    }
}

// A pair whose first single tokens were timed.
void time_both_ways(adl_pair * pair) {
    decode_singles(pair, 64);
    CHECK(fake::counts().max_threads <= 4);
    CHECK_EQ(fake::counts().max_together, 2); // both ways were tried
    recount();
}

TEST(auto_keeps_both_where_that_is_faster) {
    for (const int32_t n_gpu_layers : {1, -1}) { // −1: all of them
        install();
        fake::settings().supports_offload = true;
        fake::settings().decode_time      = milliseconds(3);
        adl_pair_params p                 = with_mode(ADL_CONCURRENCY_AUTO);
        p.model.n_gpu_layers              = n_gpu_layers;
        Host host(p);
        time_both_ways(host.pair);
        decode_singles(host.pair, 8);
        CHECK_EQ(fake::counts().max_together, 2);
        CHECK(fake::counts().max_threads <= 4);
        recount();
        decode_batch(host.pair, 8);
        CHECK_EQ(fake::counts().max_together, 2);
        CHECK(fake::counts().max_threads_batch <= 4);
    }
}

TEST(auto_keeps_turns_where_the_halves_share_a_queue) {
    install();
    fake::settings().supports_offload = true;
    fake::settings().one_queue        = true;
    fake::settings().decode_time      = milliseconds(3);
    Host host(with_mode(ADL_CONCURRENCY_AUTO));
    time_both_ways(host.pair);
    decode_singles(host.pair, 8);
    decode_batch(host.pair, 8);
    CHECK_EQ(fake::counts().max_together, 1);
    CHECK(only_this_thread_decoded());
    CHECK_EQ(fake::n_threads(adl_pair_get_context(host.pair, ADL_PLUS)), 4); // back to all
    CHECK_EQ(fake::n_threads(adl_pair_get_context(host.pair, ADL_MINUS)), 4);
    CHECK_EQ(fake::n_threads_batch(adl_pair_get_context(host.pair, ADL_MINUS)), 4);
}

TEST(auto_times_single_tokens_to_their_end) {
    install();
    fake::settings().supports_offload = true;
    fake::settings().decode_time      = milliseconds(1);
    Host host(with_mode(ADL_CONCURRENCY_AUTO));
    for (int i = 0; i < 40; ++i) {
        decode_batch(host.pair, 8); // a prompt's batches are no measure of it
    }
    CHECK(only_this_thread_decoded());
    time_both_ways(host.pair);
    const int plus  = fake::n_synchronizes(adl_pair_get_context(host.pair, ADL_PLUS)); // a GPU works on after llama_decode
    const int minus = fake::n_synchronizes(adl_pair_get_context(host.pair, ADL_MINUS));
    CHECK(plus > 0 && plus == minus);
}

TEST(auto_takes_turns_on_a_cpu) {
    for (const bool supports_offload : {true, false}) {
        install();
        fake::settings().supports_offload = supports_offload;
        fake::settings().decode_time      = milliseconds(1);
        adl_pair_params p                 = with_mode(ADL_CONCURRENCY_AUTO);
        p.model.n_gpu_layers              = supports_offload ? 0 : 99;
        Host host(p);
        decode_singles(host.pair, 40);
        decode_batch(host.pair, 8);
        CHECK_EQ(fake::counts().max_together, 1);
        CHECK_EQ(fake::counts().max_threads, 4);
        CHECK(only_this_thread_decoded());
    }
}

TEST(a_failure_in_either_thread_is_reported) {
    for (const char * path : {PLUS, MINUS}) {
        for (const auto & [throws, words] : {std::pair<Throws, const char *>{Throws::NOTHING, "returned -2"}, {Throws::EXCEPTION, "backend is gone"},
                                             {Throws::NUMBER, "unknown exception"}}) {
            install();
            fake::settings().rendezvous = true;
            Host host(with_mode(ADL_CONCURRENCY_BOTH));
            decode_singles(host.pair, 2);
            fake::file(path).faults.decode_in   = 1;
            fake::file(path).faults.decode_code = -2;
            fake::file(path).faults.throws      = throws;
            CHECK_EQ(adl_pair_decode(host.pair, Batch({6}, 1).get()), ADL_ERROR_PROXY);
            CHECK_CONTAINS(adl_last_error(), words);
            CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) == nullptr);
            decode_singles(host.pair, 2); // clears first
        }
    }
}

TEST(a_failure_in_both_threads_is_reported_once) {
    for (const Throws throws : {Throws::NOTHING, Throws::EXCEPTION, Throws::NUMBER}) {
        install();
        fake::settings().rendezvous = true;
        Host host(with_mode(ADL_CONCURRENCY_BOTH));
        for (const char * path : {PLUS, MINUS}) {
            fake::file(path).faults.decode_in = 1;
            fake::file(path).faults.throws    = throws;
        }
        CHECK_EQ(adl_pair_decode(host.pair, Batch({6}).get()), ADL_ERROR_PROXY);
        decode_singles(host.pair, 2);
    }
}

TEST(failures_while_auto_is_timing) {
    install();
    fake::settings().supports_offload = true;
    fake::settings().decode_time      = milliseconds(1);
    Host host(with_mode(ADL_CONCURRENCY_AUTO));
    for (int i = 0; i < 40; ++i) {
        fake::file(i % 2 ? PLUS : MINUS).faults.decode_in = 1;
        fake::file(i % 2 ? PLUS : MINUS).faults.throws    = i % 4 > 1 ? Throws::EXCEPTION : Throws::NOTHING;
        adl_pair_memory_clear(host.pair);
        CHECK_EQ(adl_pair_decode(host.pair, Batch({6}).get()), ADL_ERROR_PROXY);
        decode_singles(host.pair, 1);
    }
}

TEST(a_pair_may_go_from_thread_to_thread) {
    install();
    fake::settings().rendezvous = true;
    Host host(with_mode(ADL_CONCURRENCY_BOTH));
    for (int i = 0; i < 4; ++i) {
        std::thread([&] { decode_singles(host.pair, 2); }).join();
    }
}

TEST(contexts_are_made_and_freed_one_at_a_time) {
    install();
    fake::settings().lifecycle_time = milliseconds(1);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([] {
            for (int i = 0; i < 4; ++i) {
                Host host(with_mode(ADL_CONCURRENCY_BOTH));
                CHECK_EQ(adl_pair_decode(host.pair, Batch({6, 7}).get()), 1);
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    CHECK_EQ(fake::counts().max_lifecycle_together, 1);
}

TEST(contexts_that_cannot_be_made_are_freed_one_at_a_time) {
    install();
    fake::settings().lifecycle_time  = milliseconds(1);
    fake::file(MINUS).faults.context = true; // frees the other half while other threads make theirs
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([] {
            const adl_llama llama   = fake_llama_table();
            llama_model *   teacher = load();
            for (int i = 0; i < 4; ++i) {
                CHECK(adl_pair_init(&llama, DIR, teacher, params()) == nullptr);
            }
            llama_model_free(teacher);
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
    CHECK_EQ(fake::counts().max_lifecycle_together, 1);
}

} // namespace

MAIN
