// Every allocation of the library fails once, then every one from there on: each call either works or says that memory ran
// out, leaks nothing, and leaves nothing of the teacher to be sampled.

#include "check.hpp"
#include "failing_new.hpp"
#include "models.hpp"

#include <algorithm>
#include <memory>

namespace {

using namespace models;
using failing_new::Plan;

constexpr double STRENGTH = 1, GUARD = 0.05;

// Calls body(first, all) for every plan, until one is not reached; body returns whether it was.
template <typename Body>
void for_every_failure(Body && body) {
    for (const bool all : {false, true}) {
        int64_t first = 0;
        while (first < 10000 && body(first, all)) {
            ++first;
        }
        CHECK(first < 10000);
    }
}

adl_pair_params unified() {
    adl_pair_params p    = params();
    p.context.kv_unified = true;
    return p;
}

adl_pair_params with_mode(adl_concurrency mode) {
    adl_pair_params p   = params();
    p.concurrency       = mode;
    p.context.n_threads = p.context.n_threads_batch = 4;
    return p;
}

void check_row(adl_pair * pair, const Tokens & tokens) {
    const std::vector<float> plus = fake::logits(PLUS, tokens), minus = fake::logits(MINUS, tokens);
    CHECK(adl_pair_get_logits(pair, ADL_PLUS) != nullptr && std::equal(plus.begin(), plus.end(), adl_pair_get_logits(pair, ADL_PLUS)));
    CHECK(adl_pair_get_logits(pair, ADL_MINUS) != nullptr && std::equal(minus.begin(), minus.end(), adl_pair_get_logits(pair, ADL_MINUS)));
}

// operator new called by its name: a compiler may leave out the pair of a new and a delete expression.
bool allocates() {
    try {
        ::operator delete(::operator new(8));
        return true;
    } catch (const std::bad_alloc &) {
        return false;
    }
}

TEST(the_plan_fails_what_it_says) { // else the other tests test nothing
    bool once[4], from[4];
    {
        Plan plan(1, false);
        for (bool & allocated : once) {
            allocated = allocates();
        }
        CHECK(plan.reached());
    }
    {
        Plan plan(2, true);
        for (bool & allocated : from) {
            allocated = allocates();
        }
    }
    CHECK(once[0] && !once[1] && once[2] && once[3]);
    CHECK(from[0] && from[1] && !from[2] && !from[3]);
}

// Makes a pair with failing memory, lets `use` have it, and checks that nothing but the teacher stays behind.
template <typename Use>
void check_making(const char * dir, const adl_pair_params & params, Use && use) {
    const adl_llama llama    = fake_llama_table();
    llama_model *   teacher  = load();
    int             n_failed = 0;
    for_every_failure([&](int64_t first, bool all) {
        adl_pair * pair;
        bool       reached;
        {
            Plan plan(first, all);
            pair = adl_pair_init(&llama, dir, teacher, params);
            if (pair != nullptr) {
                use(pair);
            }
            reached = plan.reached();
        }
        CHECK(pair != nullptr || adl_last_status() == ADL_ERROR_MEMORY);
        CHECK(pair != nullptr || reached);
        n_failed += pair == nullptr;
        adl_pair_free(pair);
        CHECK_EQ(fake::counts().contexts, 0);
        CHECK_EQ(fake::counts().ggufs, 0);
        CHECK_EQ(fake::counts().adapters, 0);
        CHECK_EQ(fake::counts().models, 1);
        return reached;
    });
    CHECK(n_failed > 0);
    llama_model_free(teacher);
}

TEST(making_a_pair) {
    for (const auto mode : {ADL_CONCURRENCY_TURNS, ADL_CONCURRENCY_BOTH}) {
        install();
        check_making(DIR, with_mode(mode), [](adl_pair *) {});
    }
}

TEST(making_a_pair_from_an_adapter_and_changing_its_epsilon) {
    install_adapter();
    check_making(ADAPTER_DIR, params(), [](adl_pair * pair) {
        CHECK_EQ(adl_pair_set_epsilon(pair, 0.5), ADL_OK); // needs no memory of ours
    });
}

TEST(making_a_pair_that_llama_cpp_refuses) {
    for (const char * path : {PLUS, MINUS}) {
        for (const bool load : {true, false}) {
            install();
            (load ? fake::file(path).faults.load : fake::file(path).faults.context) = true;
            const adl_llama llama   = fake_llama_table();
            llama_model *   teacher = models::load();
            for_every_failure([&](int64_t first, bool all) {
                adl_pair * pair;
                bool       reached;
                {
                    Plan plan(first, all);
                    pair    = adl_pair_init(&llama, DIR, teacher, params());
                    reached = plan.reached();
                }
                CHECK(pair == nullptr && (adl_last_status() == ADL_ERROR_MEMORY || adl_last_status() == ADL_ERROR_MODEL));
                CHECK_EQ(fake::counts().models, 1);
                CHECK_EQ(fake::counts().contexts, 0);
                return reached;
            });
            llama_model_free(teacher);
        }
    }
}

TEST(reading_a_bundle) {
    install();
    const adl_llama llama = fake_llama_table();
    for (const bool good : {true, false}) {
        good ? void() : void(fake::file(MINUS).keys.erase("adlocal.params"));
        for_every_failure([&](int64_t first, bool all) {
            adl_bundle bundle = empty_bundle();
            int32_t    status;
            bool       reached;
            {
                Plan plan(first, all);
                status  = adl_bundle_read(&llama, DIR, &bundle);
                reached = plan.reached();
            }
            CHECK(status == ADL_ERROR_MEMORY || status == (good ? ADL_OK : ADL_ERROR_BUNDLE));
            CHECK_EQ(fake::counts().ggufs, 0);
            return reached;
        });
    }
}

TEST(decoding) {
    for (const auto mode : {ADL_CONCURRENCY_TURNS, ADL_CONCURRENCY_BOTH}) {
        install();
        for_every_failure([&](int64_t first, bool all) {
            Host    host(with_mode(mode));
            Batch   batch({5, 6, 7});
            int32_t n_rows;
            bool    reached;
            const llama_batch raw = batch.get();
            {
                Plan plan(first, all);
                n_rows  = adl_pair_decode(host.pair, raw);
                reached = plan.reached();
            }
            if (n_rows < 0) {
                CHECK_EQ(n_rows, ADL_ERROR_MEMORY);
                CHECK(adl_pair_error(host.pair) != nullptr);
                CHECK(adl_pair_decode(host.pair, raw) < 0); // sticks: the halves may have parted
                adl_pair_memory_clear(host.pair);
                n_rows = adl_pair_decode(host.pair, raw);
            }
            CHECK_EQ(n_rows, 1);
            check_row(host.pair, {5, 6, 7});
            return reached;
        });
    }
}

// A step that finds no memory leaves a row that is right or closed, and the next one goes on.
TEST(a_protected_step) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Stepped              host(unified());
        const adl_row_params row      = {2.0, 0.0, ADL_MODE_PROTECT, false};
        adl_row_result       result   = {};
        Batch                batch({5, 6, 7}), next({8}, 3), again({5, 6, 7});
        const llama_batch    raw = batch.get(), raw_next = next.get(), raw_again = again.get();
        int32_t              status;
        bool                 reached;
        {
            Plan plan(first, all);
            status  = adl_lockstep_decode(host.lockstep, raw, &row, 1, &result);
            reached = plan.reached();
        }
        const bool decoded = !fake::memory(host.context, 0).empty();
        if (status != ADL_OK) {
            CHECK(status == ADL_ERROR_MEMORY || status == ADL_ERROR_PROXY);
            CHECK(!decoded || models::is_closed(llama_get_logits(host.context)));
        }
        if (!decoded) { // the batch was refused before
            CHECK_EQ(adl_lockstep_decode(host.lockstep, raw_again, &row, 1, &result), ADL_OK);
        }
        CHECK_EQ(adl_lockstep_decode(host.lockstep, raw_next, &row, 1, &result), ADL_OK);
        CHECK(result.evaluated && !result.closed);
        std::vector<float> z = fake::logits(models::TEACHER, {5, 6, 7, 8}), plus = fake::logits(PLUS, {5, 6, 7, 8}),
                           minus = fake::logits(MINUS, {5, 6, 7, 8});
        adl_row            expected;
        CHECK_EQ(adl_adjust(z.data(), N_TEACHER, plus.data(), minus.data(), N_PROXY, N_PROXY, TEACHER_ENDS, 2, EPSILON, 2.0 / DELTA_SCALE, 0.0, &expected),
                 ADL_OK);
        CHECK(std::equal(z.begin(), z.end(), llama_get_logits(host.context)));
        return reached;
    });
}

// Doses of a text that find no memory are an error, and the next ones are there.
TEST(doses_of_a_text) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Stepped              host(unified());
        const adl_row_params row      = {2.0, 0.0, ADL_MODE_PROTECT, false};
        Batch                batch({5, 6, 7, 8});
        CHECK_EQ(adl_lockstep_decode(host.lockstep, batch.get(), &row, 1, nullptr), ADL_OK);
        const Tokens tokens = {7, 8, 9};
        double       found[3], again[3];
        int32_t      status;
        bool         reached;
        {
            Plan plan(first, all);
            status  = adl_lockstep_doses(host.lockstep, 0, 2, tokens.data(), 3, found);
            reached = plan.reached();
        }
        CHECK(status == ADL_OK || status == ADL_ERROR_MEMORY || status == ADL_ERROR_PROXY);
        CHECK(status == ADL_OK || reached);
        CHECK_EQ(adl_lockstep_doses(host.lockstep, 0, 2, tokens.data(), 3, again), ADL_OK);
        CHECK(status != ADL_OK || std::equal(found, found + 3, again));
        Batch             next({9}, 4);
        const llama_batch raw_next = next.get();
        CHECK_EQ(adl_lockstep_decode(host.lockstep, raw_next, &row, 1, nullptr), ADL_OK);
        check_row(host.pair, {5, 6, 7, 8, 9});
        return reached;
    });
}

TEST(refusing_a_batch) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Host              host;
        Batch             batch({N_PROXY});
        const llama_batch raw = batch.get();
        int32_t           status;
        bool              reached;
        {
            Plan plan(first, all);
            status  = adl_pair_decode(host.pair, raw);
            reached = plan.reached();
        }
        CHECK(status == ADL_ERROR_MEMORY || status == ADL_ERROR_PROXY);
        CHECK(adl_pair_error(host.pair) != nullptr);
        return reached;
    });
}

TEST(adjusting) {
    for (const bool good : {true, false}) {
        install();
        good ? void() : void(fake::file(PLUS).faults.logits[40] = HUGE_VALF);
        for_every_failure([&](int64_t first, bool all) {
            Host  host;
            Batch batch({5, 6, 7});
            CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 1);
            std::vector<float> logits   = fake::logits(TEACHER, {5, 6, 7});
            const double       strength = STRENGTH, guard = GUARD;
            adl_row            row;
            int32_t            status;
            bool               reached;
            {
                Plan plan(first, all);
                status  = adl_pair_adjust(host.pair, logits.data(), 1, &strength, &guard, &row);
                reached = plan.reached();
            }
            CHECK(status == ADL_ERROR_MEMORY || status == (good ? ADL_OK : ADL_ERROR_PROXY));
            CHECK(status == ADL_OK || is_closed(logits.data()));
            return reached;
        });
    }
}

//
// Sampler
//

// The teacher's row after `tokens`, adjusted or closed; where neither, the check fails.
void apply_and_check(llama_sampler * smpl, const Tokens & tokens) {
    std::vector<float> expected = fake::logits(TEACHER, tokens);
    const std::vector<float> plus = fake::logits(PLUS, tokens), minus = fake::logits(MINUS, tokens);
    std::vector<llama_token_data> data;
    for (llama_token id = 0; id < N_TEACHER; ++id) {
        data.push_back({id, expected[id], 0.0f});
    }
    llama_token_data_array array = {data.data(), data.size(), -1, false};
    smpl->iface->apply(smpl, &array);

    adl_row            row;
    std::vector<float> given;
    CHECK_EQ(adl_adjust(expected.data(), N_TEACHER, plus.data(), minus.data(), N_PROXY, N_PROXY, TEACHER_ENDS, 2, EPSILON,
                        STRENGTH / DELTA_SCALE, GUARD, &row), ADL_OK);
    for (const llama_token_data & d : data) {
        given.push_back(d.logit);
    }
    CHECK(adl_sampler_error(smpl) ? is_closed(given.data()) : given == expected);
}

void free_sampler(llama_sampler * smpl) { llama_sampler_free(smpl); }

using Sampler = std::unique_ptr<llama_sampler, void (*)(llama_sampler *)>;

Sampler make(adl_pair * pair, const Tokens & prefix) {
    Sampler smpl(adl_sampler_init(pair, STRENGTH, GUARD), free_sampler);
    CHECK_EQ(adl_sampler_set_prefix(smpl.get(), prefix.data(), prefix.size()), ADL_OK);
    return smpl;
}

// Runs `steps` with failing memory, then checks that the sampler is closed or right, and that a new prefix mends it.
template <typename Steps>
void check_steps(const Tokens & after, Steps && steps) {
    for_every_failure([&](int64_t first, bool all) {
        Host    host;
        Sampler smpl = make(host.pair, {5, 6});
        bool    reached;
        {
            Plan plan(first, all);
            steps(smpl.get());
            reached = plan.reached();
        }
        apply_and_check(smpl.get(), after);
        CHECK(reached || adl_sampler_error(smpl.get()) == nullptr);
        const Tokens prefix = {9, 10};
        CHECK_EQ(adl_sampler_set_prefix(smpl.get(), prefix.data(), prefix.size()), ADL_OK);
        CHECK(adl_sampler_error(smpl.get()) == nullptr);
        apply_and_check(smpl.get(), prefix);
        CHECK(adl_sampler_error(smpl.get()) == nullptr);
        return reached;
    });
}

TEST(accepting_a_token) { // a text that lacks a token would be another one
    install();
    check_steps({5, 6, 7, 8, 9, 10, 11}, [](llama_sampler * smpl) {
        for (llama_token token = 7; token < 12; ++token) {
            smpl->iface->accept(smpl, token);
        }
    });
}

TEST(applying) {
    install();
    check_steps({5, 6}, [](llama_sampler * smpl) {
        static llama_token_data data[N_TEACHER];
        for (llama_token id = 0; id < N_TEACHER; ++id) {
            data[id] = {id, static_cast<float>(id % 8), 0.0f}; // a choice
        }
        llama_token_data_array array = {data, N_TEACHER, -1, false};
        smpl->iface->apply(smpl, &array);
        const bool closed = data[EOS].logit == 0 && data[BOS].logit <= -1e6f && data[10].logit == data[BOS].logit;
        CHECK(closed == (adl_sampler_error(smpl) != nullptr));
    });
}

TEST(setting_a_prefix) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Host         host;
        Sampler      smpl   = make(host.pair, {5, 6});
        const Tokens prefix(50, 7);
        int32_t      status;
        bool         reached;
        {
            Plan plan(first, all);
            status  = adl_sampler_set_prefix(smpl.get(), prefix.data(), prefix.size());
            reached = plan.reached();
        }
        CHECK(status == ADL_OK || status == ADL_ERROR_MEMORY);
        if (status == ADL_OK) {
            apply_and_check(smpl.get(), prefix);
            CHECK(adl_sampler_error(smpl.get()) == nullptr);
        } else { // the teacher's text is the new one, which the sampler does not know: one more token does not mend that
            Tokens text = prefix;
            smpl->iface->accept(smpl.get(), 8);
            text.push_back(8);
            apply_and_check(smpl.get(), text);
        }
        return reached;
    });
}

TEST(cloning) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Host    host;
        Sampler smpl = make(host.pair, {5, 6});
        apply_and_check(smpl.get(), {5, 6});
        Sampler clone(nullptr, free_sampler);
        bool    reached;
        {
            Plan plan(first, all);
            clone.reset(llama_sampler_clone(smpl.get()));
            reached = plan.reached();
        }
        CHECK(clone != nullptr || (all && reached));
        if (clone) {
            clone->iface->accept(clone.get(), 7); // one that lacks the text before it must not go on from here
            apply_and_check(clone.get(), {5, 6, 7});
            CHECK(reached || adl_sampler_error(clone.get()) == nullptr);
        }
        apply_and_check(smpl.get(), {5, 6});
        CHECK(adl_sampler_error(smpl.get()) == nullptr);
        return reached;
    });
}

TEST(making_a_sampler) {
    install();
    for_every_failure([&](int64_t first, bool all) {
        Host    host;
        Sampler smpl(nullptr, free_sampler);
        bool    reached;
        {
            Plan plan(first, all);
            smpl.reset(adl_sampler_init(host.pair, STRENGTH, GUARD));
            reached = plan.reached();
        }
        CHECK(smpl != nullptr || (reached && adl_last_status() == ADL_ERROR_MEMORY));
        return reached;
    });
}

} // namespace

MAIN
