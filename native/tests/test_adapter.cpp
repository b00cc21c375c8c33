// Pairs over one model with an adapter: what the toy gives at ±ε is what the pair must give, whatever ε is and was.

#include "check.hpp"
#include "models.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace {

using namespace models;

int32_t decode(adl_pair * pair, const Tokens & tokens, llama_pos first = 0) {
    return adl_pair_decode(pair, Batch(tokens, first).get());
}

std::vector<float> at(double step, const Tokens & tokens) {
    return fake::logits(BASE, ADAPTER, static_cast<float>(step), tokens);
}

// Decodes `tokens` from the start and checks both rows against the toy's at ±ε, and the scales that llama.cpp received.
void check_at(adl_pair * pair, double epsilon) {
    const Tokens tokens = {5, 9, 13};
    CHECK_EQ(adl_pair_epsilon(pair), epsilon);
    adl_pair_memory_clear(pair);
    CHECK_EQ(decode(pair, tokens), 1);
    for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
        const std::vector<float> own    = at(sign * epsilon, tokens);
        const float *            logits = adl_pair_get_logits(pair, sign);
        CHECK(logits != nullptr && std::equal(own.begin(), own.end(), logits));
        CHECK_EQ(fake::scale(adl_pair_get_context(pair, sign)), static_cast<float>(sign * epsilon));
    }
}

Host adapter_host(double epsilon = 0, adl_concurrency mode = ADL_CONCURRENCY_TURNS) {
    adl_pair_params p = params();
    p.epsilon         = epsilon;
    p.concurrency     = mode;
    return Host(p, ADAPTER_DIR);
}

// Checks that no pair can be made, with this status, in these words, and that nothing is left of it.
void check_no_pair(int32_t status, const std::string & words, double epsilon = 0, const char * dir = ADAPTER_DIR) {
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    adl_pair_params p       = params();
    p.epsilon               = epsilon;
    CHECK(adl_pair_init(&llama, dir, teacher, p) == nullptr);
    CHECK_EQ(adl_last_status(), status);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK_EQ(fake::counts().models, 1); // the teacher
    CHECK_EQ(fake::counts().contexts, 0);
    CHECK_EQ(fake::counts().adapters, 0);
    llama_model_free(teacher);
}

TEST(one_model_and_one_adapter_for_both_signs) {
    install_adapter();
    const Host host = adapter_host();
    CHECK_EQ(fake::counts().loads, 2); // the teacher's is one of them
    CHECK_EQ(fake::counts().models, 2);
    CHECK_EQ(fake::counts().adapters, 1);
    CHECK_EQ(fake::counts().contexts, 2);
    CHECK(adl_pair_get_model(host.pair, ADL_PLUS) == adl_pair_get_model(host.pair, ADL_MINUS));
    CHECK(adl_pair_get_context(host.pair, ADL_PLUS) != adl_pair_get_context(host.pair, ADL_MINUS));
    CHECK_EQ(adl_pair_n_vocab(host.pair), N_PROXY);
    CHECK_EQ(adl_pair_n_shared(host.pair), N_PROXY);
    check_at(host.pair, EPSILON);
    CHECK(at(EPSILON, {5}) != at(-EPSILON, {5}));
}

TEST(both_signs_at_once) {
    install_adapter();
    fake::settings().rendezvous = true;
    const Host host             = adapter_host(0, ADL_CONCURRENCY_BOTH);
    check_at(host.pair, EPSILON);
    CHECK_EQ(fake::counts().max_together, 2);
}

TEST(another_epsilon_when_it_is_made) {
    for (const double epsilon : {EPSILON, 0.5, 3e-5}) {
        install_adapter();
        const Host host = adapter_host(epsilon);
        check_at(host.pair, epsilon);
    }
}

TEST(another_epsilon_later) {
    install_adapter();
    const Host host = adapter_host();
    for (const double epsilon : {0.25, 0.25, 1e-4, EPSILON}) {
        adl_pair_memory_clear(host.pair);
        CHECK_EQ(decode(host.pair, {3, 4}), 1);
        CHECK_EQ(adl_pair_set_epsilon(host.pair, epsilon), ADL_OK);
        CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) == nullptr);
        CHECK(std::isnan(adl_pair_dose(host.pair, 0, 3)));
        for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
            CHECK(fake::memory(adl_pair_get_context(host.pair, sign), 0).empty());
        }
        check_at(host.pair, epsilon);
    }
    CHECK_EQ(fake::counts().loads, 2);
}

// The toy's logits are linear in ε, so the dose must not depend on it: a Δ over the ε of before would be 25 times as large.
TEST(the_dose_is_over_the_epsilon_in_force) {
    install_adapter();
    const Host host = adapter_host();
    CHECK_EQ(decode(host.pair, {3, 4}), 1);
    const double dose = adl_pair_dose(host.pair, 0, 7);
    CHECK(std::fabs(dose) > 0.01);
    CHECK_EQ(adl_pair_set_epsilon(host.pair, 25 * EPSILON), ADL_OK);
    CHECK_EQ(decode(host.pair, {3, 4}), 1);
    CHECK_NEAR(adl_pair_dose(host.pair, 0, 7), dose, 0.1 * std::fabs(dose));
}

TEST(a_step_keeps_the_epsilon_it_was_evaluated_at) {
    install_adapter();
    const Host           host    = adapter_host();
    const Tokens         tokens  = {5, 6};
    const adl_row_params row     = {0, 0.05, ADL_MODE_OBSERVE, true};
    llama_context *      context = llama_init_from_model(host.teacher, llama_context_default_params());
    adl_lockstep *       step    = adl_lockstep_init(host.pair, context, adl_lockstep_default_params());
    CHECK_EQ(adl_lockstep_decode(step, Batch(tokens).get(), &row, 1, nullptr), ADL_OK);
    const double dose = adl_lockstep_dose(step, 0, 7);
    CHECK(std::fabs(dose) > 0.01);
    CHECK_EQ(adl_pair_set_epsilon(host.pair, 25 * EPSILON), ADL_OK);
    CHECK_EQ(adl_lockstep_dose(step, 0, 7), dose);
    for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
        const std::vector<float> own    = at(sign * EPSILON, tokens);
        const float *            logits = adl_lockstep_get_logits(step, 0, sign);
        CHECK(logits != nullptr && std::equal(own.begin(), own.end(), logits));
    }
    adl_lockstep_free(step);
    llama_free(context);
}

TEST(a_sampler_finishes_its_position_at_the_epsilon_it_was_evaluated_at) {
    install_adapter();
    const Host      host   = adapter_host();
    const Tokens    prefix = {5, 6};
    llama_sampler * smpl   = adl_sampler_init(host.pair, 1, 0.05);
    CHECK_EQ(adl_sampler_set_prefix(smpl, prefix.data(), prefix.size()), ADL_OK);
    const auto apply = [&] {
        const std::vector<float>      z = fake::logits(TEACHER, prefix);
        std::vector<llama_token_data> data;
        for (llama_token id = 0; id < N_TEACHER; ++id) {
            data.push_back({id, z[id], 0.0f});
        }
        llama_token_data_array array = {data.data(), data.size(), -1, false};
        smpl->iface->apply(smpl, &array);
        std::vector<float> logits;
        for (const llama_token_data & d : data) {
            logits.push_back(d.logit);
        }
        return logits;
    };
    const std::vector<float> before = apply();
    CHECK(before != fake::logits(TEACHER, prefix));
    CHECK_EQ(adl_pair_set_epsilon(host.pair, 100 * EPSILON), ADL_OK);
    CHECK(apply() == before);
    smpl->iface->accept(smpl, 7);
    adl_row            row;
    const Tokens       next     = {5, 6, 7};
    const auto         plus     = at(100 * EPSILON, next), minus = at(-100 * EPSILON, next);
    std::vector<float> expected = fake::logits(TEACHER, prefix);
    CHECK_EQ(adl_adjust(expected.data(), N_TEACHER, plus.data(), minus.data(), N_PROXY, N_PROXY, TEACHER_ENDS, 2, 100 * EPSILON,
                        1 / DELTA_SCALE, 0.05, &row), ADL_OK);
    CHECK(apply() == expected);
    llama_sampler_free(smpl);
}

TEST(no_epsilon_that_an_adapter_cannot_be_scaled_by) {
    install_adapter();
    for (const double epsilon : {-1.0, std::nan(""), HUGE_VAL, 1e-60, 1e60}) {
        check_no_pair(ADL_ERROR_INPUT, "epsilon=", epsilon);
    }
    const Host host = adapter_host();
    CHECK_EQ(decode(host.pair, {3, 4}), 1);
    for (const double epsilon : {0.0, -1.0, std::nan(""), HUGE_VAL, 1e-60, 1e60}) {
        CHECK_EQ(adl_pair_set_epsilon(host.pair, epsilon), ADL_ERROR_INPUT);
        CHECK_EQ(adl_pair_epsilon(host.pair), EPSILON);
        CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) != nullptr);
    }
    check_at(host.pair, EPSILON);
    CHECK_EQ(adl_pair_set_epsilon(nullptr, 1), ADL_ERROR_INPUT);
}

TEST(halves_have_the_epsilon_that_they_were_written_with) {
    install();
    adl_pair_params p = params();
    p.epsilon         = EPSILON;
    Host host(p);
    CHECK_EQ(adl_pair_epsilon(host.pair), EPSILON);
    CHECK_EQ(decode(host.pair, {3, 4}), 1);
    CHECK_EQ(adl_pair_set_epsilon(host.pair, 0.5), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "written at 0.01, which cannot be changed");
    CHECK_EQ(adl_pair_epsilon(host.pair), EPSILON);
    CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) != nullptr);
    adl_pair_free(std::exchange(host.pair, nullptr));
    llama_model_free(std::exchange(host.teacher, nullptr));
    for (const double epsilon : {0.5, -1.0, std::nan("")}) {
        check_no_pair(ADL_ERROR_INPUT, "epsilon=", epsilon, DIR);
    }
}

//
// Failures
//

TEST(what_llama_cpp_refuses_leaves_nothing) {
    install_adapter();
    fake::file(BASE).faults.load = true;
    check_no_pair(ADL_ERROR_MODEL, BASE);
    install_adapter();
    fake::file(BASE).faults.context = true;
    check_no_pair(ADL_ERROR_MODEL, BASE);
    install_adapter();
    fake::file(ADAPTER).faults.adapter = true;
    check_no_pair(ADL_ERROR_MODEL, std::string(ADAPTER) + ": llama.cpp cannot load this adapter for " + BASE);
    for (const int in : {1, 2}) {
        install_adapter();
        fake::file(ADAPTER).faults.set_in = in;
        check_no_pair(ADL_ERROR_PROXY, in == 1 ? "at ε=0.01: llama_set_adapters_lora" : "at ε=-0.01: llama_set_adapters_lora");
    }
    install_adapter();
    fake::file(BASE).n_ctx_train = 31; // of the 128 that four sequences share
    check_no_pair(ADL_ERROR_MODEL, "n_ctx=32 exceeds the 31 tokens");
}

TEST(an_epsilon_that_llama_cpp_refuses_is_not_half_in_force) {
    for (const int in : {1, 2}) {
        install_adapter();
        const Host host                   = adapter_host();
        fake::file(ADAPTER).faults.set_in = in;
        CHECK_EQ(adl_pair_set_epsilon(host.pair, 0.5), ADL_ERROR_PROXY);
        CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) == nullptr);
        check_at(host.pair, EPSILON);
    }
}

TEST(a_pair_whose_adapter_cannot_be_attached_computes_nothing) {
    install_adapter();
    const Host host                       = adapter_host();
    fake::file(ADAPTER).faults.set_in     = 2;
    fake::file(ADAPTER).faults.set_always = true;
    CHECK_EQ(adl_pair_set_epsilon(host.pair, 0.5), ADL_ERROR_PROXY);
    for (int i = 0; i < 2; ++i) {
        CHECK_EQ(decode(host.pair, {3}), ADL_ERROR_PROXY);
        CHECK_CONTAINS(adl_pair_error(host.pair), "cannot attach the adapter");
        adl_pair_memory_clear(host.pair); // is no way around it
    }
    CHECK_EQ(fake::counts().decodes, 0);
    fake::file(ADAPTER).faults.set_in = 0;
    check_at(host.pair, EPSILON);
}

//
// Bundles
//

// Checks that reading the adapter bundle fails in these words.
void check_refused(const std::string & words) {
    const adl_llama llama = fake_llama_table();
    adl_bundle      out   = empty_bundle();
    CHECK_EQ(adl_bundle_read(&llama, ADAPTER_DIR, &out), ADL_ERROR_BUNDLE);
    CHECK_CONTAINS(adl_last_error(), words);
}

TEST(an_adapter_bundle_is_read) {
    install_adapter();
    const adl_llama llama  = fake_llama_table();
    adl_bundle      bundle = empty_bundle();
    CHECK_EQ(adl_bundle_read(&llama, ADAPTER_DIR, &bundle), ADL_OK);
    CHECK(bundle.is_adapter);
    CHECK_EQ(bundle.epsilon, EPSILON);
    fake::file(ADAPTER).keys["adlocal.epsilon"] = fake::f64(0.5);
    check_refused("base and adapter disagree on adlocal.epsilon");
}

TEST(files_of_two_formats_are_refused) {
    for (const char * name : {"proxy-plus.gguf", "proxy-minus.gguf"}) {
        install_adapter();
        const auto path = std::filesystem::path(ADAPTER_DIR) / name;
        std::ofstream(path, std::ios::trunc);
        check_refused(std::string(name) + " and proxy-base.gguf are of two formats");
        std::filesystem::remove(path);
    }
}

TEST(one_file_of_the_two_is_refused) {
    for (const char * path : {BASE, ADAPTER}) {
        install_adapter();
        fake::remove_file(path);
        std::filesystem::remove(path);
        check_refused(std::string(path) + " is missing");
    }
}

TEST(signs_and_alpha_are_the_adapters) {
    install_adapter();
    std::swap(fake::file(BASE).keys["adlocal.sign"], fake::file(ADAPTER).keys["adlocal.sign"]);
    check_refused("base and adapter are swapped");
    install_adapter();
    fake::file(BASE).keys["adlocal.sign"] = fake::i32(-1);
    check_refused("(-1, 1), expected (0, 1)");
    install_adapter();
    fake::file(ADAPTER).keys["adapter.lora.alpha"] = fake::f32(16);
    check_refused("adapter.lora.alpha is 16, expected 0");
    install_adapter();
    fake::file(ADAPTER).keys.erase("adapter.lora.alpha");
    check_refused("key adapter.lora.alpha is missing");
    install_adapter();
    fake::file(BASE).keys["adlocal.format"] = fake::file(ADAPTER).keys["adlocal.format"] = fake::text("halves");
    check_refused("say format 'halves', expected 'adapter'");
    install_adapter();
    fake::file(BASE).keys["adlocal.carriers.sha256"] = fake::file(ADAPTER).keys["adlocal.carriers.sha256"] = fake::texts({"a", "b"});
    check_refused("expected 1");
}

TEST(two_files_without_metadata) {
    install_adapter();
    fake::file(BASE).keys.clear();
    fake::file(ADAPTER).keys.clear();
    const adl_llama llama = fake_llama_table();
    adl_pair *      pair  = adl_pair_init_from_adapter(&llama, BASE, ADAPTER, 0.5, 0, nullptr, params());
    CHECK(pair != nullptr);
    check_at(pair, 0.5);
    adl_pair_free(pair);
    CHECK(adl_pair_init_from_adapter(&llama, nullptr, ADAPTER, 0.5, 0, nullptr, params()) == nullptr);
    CHECK(adl_pair_init_from_adapter(&llama, BASE, nullptr, 0.5, 0, nullptr, params()) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
    CHECK(adl_pair_init_from_adapter(&llama, BASE, ADAPTER, 0, 0, nullptr, params()) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
}

} // namespace

MAIN
