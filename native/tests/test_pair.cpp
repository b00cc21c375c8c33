// Making a pair, decoding with it, and its memory: what the toy's two halves give on their own is what the pair must give.

#include "check.hpp"
#include "models.hpp"

#include <algorithm>

namespace {

using namespace models;

// Checks row `row` of the last decode against both halves' own logits after `tokens`.
void check_row(adl_pair * pair, int32_t row, const Tokens & tokens) {
    for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
        const float *            logits = adl_pair_get_logits(pair, sign);
        const std::vector<float> own    = fake::logits(sign > 0 ? PLUS : MINUS, tokens);
        CHECK(logits != nullptr && std::equal(own.begin(), own.end(), logits + static_cast<size_t>(row) * N_PROXY));
    }
}

// Decodes `token` at `pos` of a sequence alone and checks its row.
void check_next(adl_pair * pair, llama_token token, llama_seq_id seq_id, Tokens before) {
    Batch batch;
    CHECK_EQ(adl_pair_decode(pair, batch.add(token, static_cast<llama_pos>(before.size()), {seq_id}, true).get()), 1);
    before.push_back(token);
    check_row(pair, 0, before);
}

void check_no_rows(adl_pair * pair) {
    CHECK(adl_pair_get_logits(pair, ADL_PLUS) == nullptr);
    CHECK(adl_pair_get_logits(pair, ADL_MINUS) == nullptr);
    CHECK(std::isnan(adl_pair_dose(pair, 0, 3)));
}

int32_t decode(adl_pair * pair, const Tokens & tokens, llama_pos first = 0) {
    return adl_pair_decode(pair, Batch(tokens, first).get());
}

// Checks that the pair refuses with `status` in these words, and sticks to it until its memory is cleared.
void check_sticks(adl_pair * pair, int32_t status, const std::string & words) {
    CHECK_EQ(status, ADL_ERROR_PROXY);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK(adl_pair_error(pair) != nullptr);
    CHECK_CONTAINS(adl_pair_error(pair) ? adl_pair_error(pair) : "", words);
    check_no_rows(pair);

    const int before = fake::counts().decodes;
    adl_pair_memory_seq_rm(pair, 0, -1, -1); // nothing but clear() makes it forget
    adl_pair_memory_seq_keep(pair, 0);
    adl_pair_memory_seq_cp(pair, 0, 1, -1, -1);
    adl_pair_touch(pair);
    CHECK_EQ(decode(pair, {3}), ADL_ERROR_PROXY);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK_EQ(fake::counts().decodes, before);

    adl_pair_memory_clear(pair);
    CHECK(adl_pair_error(pair) == nullptr);
    CHECK_EQ(decode(pair, {5, 6, 7}), 1);
    check_row(pair, 0, {5, 6, 7});
}

//
// Decoding
//

TEST(both_halves_are_evaluated) {
    install();
    Host host;
    CHECK(adl_pair_error(host.pair) == nullptr);
    check_no_rows(host.pair);
    CHECK_EQ(decode(host.pair, {5, 9, 13}), 1);
    check_row(host.pair, 0, {5, 9, 13});
    CHECK_EQ(decode(host.pair, {20}, 3), 1);
    check_row(host.pair, 0, {5, 9, 13, 20});
    CHECK_EQ(fake::n_decodes(adl_pair_get_context(host.pair, ADL_PLUS)), 2);
    CHECK_EQ(fake::n_decodes(adl_pair_get_context(host.pair, ADL_MINUS)), 2);
}

TEST(rows_are_in_the_order_of_the_batch) {
    install();
    Host  host;
    Batch batch;
    batch.add(4, 0, {0}, true).add(5, 0, {2}, false).add(6, 0, {1}, true).add(7, 1, {2}, true).add(8, 1, {0}, false).add(9, 2, {0}, true);
    CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 4);
    check_row(host.pair, 0, {4});
    check_row(host.pair, 1, {6});
    check_row(host.pair, 2, {5, 7});
    check_row(host.pair, 3, {4, 8, 9});
    check_next(host.pair, 10, 2, {5, 7});
    check_next(host.pair, 11, 0, {4, 8, 9});
}

TEST(a_token_of_several_sequences) {
    install();
    Host  host;
    Batch batch;
    batch.add(4, 0, {0, 1, 3}, true).add(5, 1, {1}, true).add(6, 1, {3}, true);
    CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 3);
    check_row(host.pair, 1, {4, 5});
    check_row(host.pair, 2, {4, 6});
    check_next(host.pair, 7, 0, {4});
}

TEST(a_batch_may_leave_out_what_llama_h_says) {
    install();
    Host   host;
    Tokens tokens = {3, 4, 5};
    CHECK_EQ(adl_pair_decode(host.pair, {3, tokens.data(), nullptr, nullptr, nullptr, nullptr, nullptr}), 1); // llama_batch_get_one
    check_row(host.pair, 0, tokens);
    Tokens next = {6};
    CHECK_EQ(adl_pair_decode(host.pair, {1, next.data(), nullptr, nullptr, nullptr, nullptr, nullptr}), 1);
    check_row(host.pair, 0, {3, 4, 5, 6});
    int8_t outputs[] = {1, 0, 1};
    CHECK_EQ(adl_pair_decode(host.pair, {3, tokens.data(), nullptr, nullptr, nullptr, nullptr, outputs}), 2);
    check_row(host.pair, 1, {3, 4, 5, 6, 3, 4, 5});
}

TEST(any_flag_but_zero_asks_for_a_row) {
    install();
    Host   host;
    Tokens tokens    = {3, 4, 5};
    int8_t outputs[] = {-1, 2, 0};
    CHECK_EQ(adl_pair_decode(host.pair, {3, tokens.data(), nullptr, nullptr, nullptr, nullptr, outputs}), 2);
    check_row(host.pair, 1, {3, 4});
}

TEST(a_batch_without_rows) {
    install();
    Host  host;
    Batch batch;
    CHECK_EQ(decode(host.pair, {1}), 1);
    CHECK_EQ(adl_pair_decode(host.pair, batch.add(4, 1, {0}, false).get()), 0);
    check_no_rows(host.pair); // nor those of the decode before
    check_next(host.pair, 6, 0, {1, 4});
}

//
// Memory
//

// A pair whose sequences 0 and 1 hold tokens, with rows of the last decode.
void fill(adl_pair * pair) {
    CHECK_EQ(decode(pair, {10, 11, 12, 13}), 1);
    Batch batch;
    CHECK_EQ(adl_pair_decode(pair, batch.add(20, 0, {1}, false).add(21, 1, {1}, true).get()), 1);
}

TEST(memory_clear) {
    install();
    Host host;
    fill(host.pair);
    adl_pair_memory_clear(host.pair);
    check_no_rows(host.pair);
    check_next(host.pair, 5, 0, {});
    check_next(host.pair, 5, 1, {});
}

TEST(memory_seq_rm) {
    install();
    Host host;
    fill(host.pair);
    CHECK(adl_pair_memory_seq_rm(host.pair, 0, 2, -1));
    check_no_rows(host.pair);
    check_next(host.pair, 14, 0, {10, 11});
    check_next(host.pair, 22, 1, {20, 21});
    CHECK(adl_pair_memory_seq_rm(host.pair, 1, -1, -1));
    check_next(host.pair, 23, 1, {});
    check_next(host.pair, 15, 0, {10, 11, 14});
    CHECK(adl_pair_memory_seq_rm(host.pair, -1, 1, -1)); // any sequence
    check_next(host.pair, 16, 0, {10});
    check_next(host.pair, 24, 1, {23});
}

TEST(memory_seq_cp) {
    install();
    Host host;
    fill(host.pair);
    adl_pair_memory_seq_cp(host.pair, 0, 2, -1, -1);
    check_no_rows(host.pair);
    check_next(host.pair, 14, 2, {10, 11, 12, 13});
    check_next(host.pair, 15, 0, {10, 11, 12, 13});
    adl_pair_memory_seq_cp(host.pair, 0, 3, 0, 2);
    check_next(host.pair, 16, 3, {10, 11});
}

TEST(memory_seq_keep) {
    install();
    Host host;
    fill(host.pair);
    adl_pair_memory_seq_keep(host.pair, 1);
    check_no_rows(host.pair);
    check_next(host.pair, 5, 0, {});
    check_next(host.pair, 22, 1, {20, 21});
}

TEST(touch_drops_the_rows_alone) {
    install();
    Host host;
    fill(host.pair);
    adl_pair_touch(host.pair);
    check_no_rows(host.pair);
    check_next(host.pair, 14, 0, {10, 11, 12, 13});
}

TEST(a_memory_that_cannot_forget_a_part_says_so) {
    for (const auto & [plus, minus] : {std::pair<bool, bool>{true, true}, {true, false}, {false, true}}) {
        install();
        fake::file(PLUS).recurrent  = plus;
        fake::file(MINUS).recurrent = minus;
        Host host;
        fill(host.pair);
        CHECK(!adl_pair_memory_seq_rm(host.pair, 0, 2, -1));
        check_no_rows(host.pair);
        adl_pair_memory_clear(host.pair);
        check_next(host.pair, 5, 0, {});
        CHECK(adl_pair_memory_seq_rm(host.pair, 0, -1, -1));
        check_next(host.pair, 6, 0, {});
    }
}

//
// Errors
//

TEST(what_llama_decode_refuses_sticks) {
    for (const char * path : {PLUS, MINUS}) {
        for (const int32_t code : {1, 2, -1, -2, -3}) {
            install();
            Host host;
            CHECK_EQ(decode(host.pair, {3, 4}), 1);
            fake::file(path).faults.decode_in   = 1;
            fake::file(path).faults.decode_code = code;
            check_sticks(host.pair, decode(host.pair, {8, 9, 10}, 2), "llama_decode returned " + std::to_string(code));
            CHECK_CONTAINS(adl_last_error(), path == PLUS ? "+ε" : "−ε");
        }
    }
}

TEST(what_llama_decode_throws_sticks) {
    for (const char * path : {PLUS, MINUS}) {
        for (const auto & [throws, words] : {std::pair<fake::Throws, const char *>{fake::Throws::EXCEPTION, "backend is gone"},
                                             {fake::Throws::NUMBER, "unknown exception"}}) {
            install();
            Host host;
            fake::file(path).faults.decode_in = 1;
            fake::file(path).faults.throws    = throws;
            const int32_t status = decode(host.pair, {8, 9, 10});
            CHECK_CONTAINS(adl_last_error(), words);
            check_sticks(host.pair, status, words);
        }
    }
}

TEST(a_full_context_is_told_in_words) {
    install();
    Host host;
    for (llama_pos pos = 0; pos < 128; pos += 32) {
        CHECK_EQ(decode(host.pair, Tokens(32, 5), pos), 1);
    }
    check_sticks(host.pair, decode(host.pair, {6}, 128), "larger n_ctx");
}

TEST(embeddings_are_refused) {
    install();
    Host  host;
    float embedding[8] = {};
    check_sticks(host.pair, adl_pair_decode(host.pair, {1, nullptr, embedding, nullptr, nullptr, nullptr, nullptr}), "embeddings");
    CHECK_EQ(fake::counts().decodes, 2); // check_sticks' own, in both halves
}

TEST(tokens_beyond_the_vocabulary_are_refused_in_words) {
    for (const llama_token token : {N_PROXY, N_TEACHER - 1, -1, INT32_MAX, INT32_MIN}) {
        install();
        Host host;
        check_sticks(host.pair, decode(host.pair, {3, token, 4}), "token " + std::to_string(token) + " is none of the proxy's 64");
        CHECK_EQ(fake::counts().decodes, 2);
    }
}

TEST(batches_that_would_end_the_process_are_refused) {
    install();
    Host host;
    check_sticks(host.pair, decode(host.pair, Tokens(33, 5)), "n_batch=32");
    Tokens token = {1};
    for (const int32_t n : {0, -1}) {
        check_sticks(host.pair, adl_pair_decode(host.pair, {n, token.data(), nullptr, nullptr, nullptr, nullptr, nullptr}), "a batch of");
    }
    Batch batch;
    for (int32_t i = 0; i < 17; ++i) {
        batch.add(5, i, {0}, true);
    }
    check_sticks(host.pair, adl_pair_decode(host.pair, batch.get()), "n_outputs_max than 16");
}

TEST(functions_take_no_null_pair) {
    install();
    CHECK_EQ(decode(nullptr, {1}), ADL_ERROR_INPUT);
    adl_pair_free(nullptr);
}

//
// Making
//

TEST(flash_attention_is_not_llama_cpps_to_choose_on_a_cpu) {
    struct Case {
        int32_t               n_gpu_layers;
        bool                  has_gpu;
        ggml_type             type_v;
        llama_flash_attn_type asked, chosen;
    };
    constexpr auto          AUTO = LLAMA_FLASH_ATTN_TYPE_AUTO, OFF = LLAMA_FLASH_ATTN_TYPE_DISABLED, ON = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    const std::vector<Case> cases = {
        {0, true, GGML_TYPE_F16, AUTO, OFF},   {0, false, GGML_TYPE_F32, AUTO, OFF}, {99, false, GGML_TYPE_F16, AUTO, OFF},
        {99, true, GGML_TYPE_F16, AUTO, AUTO}, {0, true, GGML_TYPE_F16, ON, ON},     {0, true, GGML_TYPE_F16, OFF, OFF},
        {0, true, GGML_TYPE_Q8_0, AUTO, AUTO}, {99, true, GGML_TYPE_F16, ON, ON}};
    for (const Case & c : cases) {
        install();
        fake::settings().supports_offload = c.has_gpu;
        adl_pair_params p                 = params();
        p.model.n_gpu_layers              = c.n_gpu_layers;
        p.context.type_v                  = c.type_v;
        p.context.flash_attn_type         = c.asked;
        Host host(p);
        for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
            CHECK_EQ(fake::context_params(adl_pair_get_context(host.pair, sign)).flash_attn_type, c.chosen);
        }
    }
}

TEST(what_a_pair_says_of_itself) {
    install();
    adl_pair_params p = params();
    p.context.n_ctx   = 101;
    Host host(p);
    CHECK_EQ(adl_pair_n_ctx(host.pair), 104u); // the toy rounds to eights
    CHECK_EQ(adl_pair_n_vocab(host.pair), N_PROXY);
    CHECK_EQ(adl_pair_n_shared(host.pair), N_PROXY);
    CHECK(adl_pair_get_context(host.pair, ADL_PLUS) != adl_pair_get_context(host.pair, ADL_MINUS));
    CHECK(adl_pair_get_model(host.pair, ADL_PLUS) != adl_pair_get_model(host.pair, ADL_MINUS));
    CHECK_EQ(decode(host.pair, {4}), 1);
    CHECK(adl_pair_get_logits(host.pair, ADL_PLUS) == llama_get_logits(adl_pair_get_context(host.pair, ADL_PLUS)));
    CHECK(adl_pair_get_logits(host.pair, ADL_MINUS) == llama_get_logits(adl_pair_get_context(host.pair, ADL_MINUS)));
}

TEST(pairs_over_the_same_weights) {
    for (const char * dir : {models::DIR, models::ADAPTER_DIR}) {
        models::install_adapter();
        Host        host(models::params(), dir);
        adl_pair *  other  = adl_pair_init_from_pair(host.pair, host.teacher, models::params());
        Batch       batch(Tokens{models::BOS, 7, 9});
        CHECK(other != nullptr);
        CHECK(adl_pair_get_model(other, ADL_PLUS) == adl_pair_get_model(host.pair, ADL_PLUS));
        CHECK(adl_pair_get_context(other, ADL_PLUS) != adl_pair_get_context(host.pair, ADL_PLUS));
        CHECK_EQ(adl_pair_epsilon(other), adl_pair_epsilon(host.pair));
        CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 1);
        const std::vector<float> expected(adl_pair_get_logits(host.pair, ADL_MINUS), adl_pair_get_logits(host.pair, ADL_MINUS) + models::N_PROXY);
        adl_pair_free(host.pair); // the weights stay for the other one
        host.pair = nullptr;
        CHECK_EQ(adl_pair_n_rows(other), 0);
        CHECK_EQ(adl_pair_decode(other, batch.get()), 1);
        CHECK(std::equal(expected.begin(), expected.end(), adl_pair_get_logits(other, ADL_MINUS)));
        adl_pair_free(other);
        CHECK(adl_pair_init_from_pair(nullptr, host.teacher, models::params()) == nullptr);
    }
}

TEST(parameters_are_passed_on) {
    install();
    const adl_llama llama = fake_llama_table();
    adl_pair_params p     = adl_pair_default_params(&llama);
    CHECK_EQ(p.context.n_outputs_max, 1u);
    CHECK_EQ(p.context.n_outputs_max_per_seq, 1u);
    CHECK_EQ(p.context.n_ctx, llama_context_default_params().n_ctx);
    CHECK_EQ(p.model.n_gpu_layers, llama_model_default_params().n_gpu_layers);
    CHECK_EQ(p.concurrency, ADL_CONCURRENCY_AUTO);
    p                      = params();
    p.context.type_k       = GGML_TYPE_Q8_0;
    p.model.n_gpu_layers   = 7;
    Host host(p);
    for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
        const llama_context_params given = fake::context_params(adl_pair_get_context(host.pair, sign));
        CHECK_EQ(given.n_ctx, 128u);
        CHECK_EQ(given.n_seq_max, 4u);
        CHECK_EQ(given.type_k, GGML_TYPE_Q8_0);
        CHECK_EQ(fake::model_params(adl_pair_get_model(host.pair, sign)).n_gpu_layers, 7);
    }
}

TEST(n_ctx_of_0_is_the_proxys_own) {
    install();
    adl_pair_params p = params();
    p.context.n_ctx   = 0;
    Host host(p);
    CHECK_EQ(adl_pair_n_ctx(host.pair), 2048u);
}

TEST(the_table_is_copied) {
    install();
    adl_llama     llama   = fake_llama_table();
    llama_model * teacher = load();
    adl_pair *    pair    = adl_pair_init(&llama, DIR, teacher, params());
    std::memset(static_cast<void *>(&llama), 0, sizeof llama);
    CHECK_EQ(decode(pair, {1, 2, 3}), 1);
    check_row(pair, 0, {1, 2, 3});
    llama_model_free(teacher); // nor is the teacher needed any longer
    CHECK_EQ(decode(pair, {4}, 3), 1);
    adl_pair_free(pair);
}

// Checks that no pair can be made, with this status, in these words, and that nothing is left of it.
void check_no_pair(int32_t status, const std::string & words, const adl_pair_params & p = params(), const char * dir = DIR) {
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    CHECK(adl_pair_init(&llama, dir, teacher, p) == nullptr);
    CHECK_EQ(adl_last_status(), status);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK_EQ(fake::counts().models, 1); // the teacher
    CHECK_EQ(fake::counts().contexts, 0);
    llama_model_free(teacher);
}

TEST(what_llama_cpp_cannot_load) {
    for (const char * path : {PLUS, MINUS}) {
        install();
        fake::file(path).faults.load = true;
        check_no_pair(ADL_ERROR_MODEL, path);
        install();
        fake::file(path).faults.context = true;
        check_no_pair(ADL_ERROR_MODEL, path);
    }
}

// Four sequences share 128 tokens of context evenly.
TEST(more_context_than_a_proxy_was_trained_for) {
    for (const char * path : {PLUS, MINUS}) {
        install();
        fake::file(path).n_ctx_train = 31;
        check_no_pair(ADL_ERROR_MODEL, "n_ctx=32 exceeds the 31 tokens");
        fake::file(path).n_ctx_train = 32;
        Host host;
    }
}

TEST(one_sequence_fills_a_context_of_its_own) {
    adl_pair_params p   = params();
    p.context.n_seq_max = 1;
    install();
    fake::file(PLUS).n_ctx_train = 127;
    check_no_pair(ADL_ERROR_MODEL, "n_ctx=128 exceeds the 127 tokens", p);
}

// A unified context is shared, and may be longer than what the proxy was trained for; no sequence may get there.
TEST(no_sequence_of_a_unified_context_goes_beyond_what_a_proxy_was_trained_for) {
    install();
    for (const char * path : {PLUS, MINUS}) {
        fake::file(path).n_ctx_train = 32;
    }
    adl_pair_params p    = params();
    p.context.kv_unified = true;
    Host  host(p);
    Batch last({9}, 31), beyond({9}, 32);
    CHECK_EQ(adl_pair_decode(host.pair, last.get()), 1);
    CHECK_EQ(adl_pair_decode(host.pair, beyond.get()), ADL_ERROR_PROXY);
    CHECK_CONTAINS(adl_last_error(), "position 32 is beyond the 32 tokens that the proxy was trained for");
}

// In llama.cpp 0.5.0 a context of more sequences than rows ends the process while it is made, and adl_pair_default_params
// gives one row.
TEST(there_are_at_least_as_many_rows_as_sequences) {
    install();
    adl_pair_params p       = params();
    p.context.n_outputs_max = 1;
    Host  host(p);
    Batch batch;
    for (llama_seq_id s = 0; s < 4; ++s) {
        batch.add(10 + s, 0, {s}, true);
    }
    CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 4);
    check_row(host.pair, 3, {13});
    batch = Batch();
    for (int32_t i = 0; i < 5; ++i) {
        batch.add(10, 1 + i, {0}, true);
    }
    check_sticks(host.pair, adl_pair_decode(host.pair, batch.get()), "n_outputs_max");
}

TEST(n_outputs_max_of_0_is_a_batch) {
    install();
    adl_pair_params p       = params();
    p.context.n_outputs_max = 0;
    Host  host(p);
    Batch batch;
    for (int32_t i = 0; i < 32; ++i) {
        batch.add(5, i, {0}, true);
    }
    CHECK_EQ(adl_pair_decode(host.pair, batch.get()), 32);
    check_row(host.pair, 31, Tokens(32, 5));
}

TEST(a_bad_bundle) {
    install();
    fake::file(MINUS).keys.erase("adlocal.base.sha256");
    check_no_pair(ADL_ERROR_BUNDLE, "adlocal.base.sha256");
    check_no_pair(ADL_ERROR_BUNDLE, "nowhere", params(), "nowhere");
    check_no_pair(ADL_ERROR_BUNDLE, "adlocal convert", params(), nullptr);
}

TEST(another_vocabulary) {
    install();
    fake::file(TEACHER).vocab.texts[40] = "another";
    check_no_pair(ADL_ERROR_VOCABULARY, "token 40 is 'another'");
}

TEST(halves_of_different_vocabularies) {
    for (const char * path : {PLUS, MINUS}) {
        install();
        fake::file(path).vocab = vocab(N_PROXY - 1);
        check_no_pair(ADL_ERROR_BUNDLE, "different sizes");
    }
}

TEST(a_bundle_is_opened_for_a_teacher) {
    install();
    const adl_llama llama = fake_llama_table();
    CHECK(adl_pair_init(&llama, DIR, nullptr, params()) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "teacher");
}

TEST(two_files_without_metadata) {
    install();
    fake::file("a").vocab = fake::file("b").vocab = vocab(N_PROXY);
    fake::file("b").own_scale                     = 1;
    const adl_llama llama = fake_llama_table();
    adl_pair *      pair  = adl_pair_init_from_files(&llama, "a", "b", 0.5, 0, nullptr, params()); // of an unknown delta_scale
    CHECK(pair != nullptr);
    CHECK_EQ(adl_pair_n_shared(pair), 0);
    CHECK_EQ(decode(pair, {7, 8}), 1);
    const std::vector<float> a = fake::logits("a", {7, 8}), b = fake::logits("b", {7, 8});
    CHECK(std::equal(a.begin(), a.end(), adl_pair_get_logits(pair, ADL_PLUS)));
    CHECK(std::equal(b.begin(), b.end(), adl_pair_get_logits(pair, ADL_MINUS)));
    adl_pair_free(pair);
}

TEST(parameters_of_another_size_are_refused) {
    install();
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    for (const size_t size : {size_t{0}, sizeof(adl_pair_params) - 8, sizeof(adl_pair_params) + 8}) {
        adl_pair_params p = params();
        p.size            = size;
        CHECK(adl_pair_init(&llama, DIR, teacher, p) == nullptr);
        CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
        CHECK_CONTAINS(adl_last_error(), "struct adl_pair_params has " + std::to_string(size) + " bytes in the host");
        CHECK(adl_pair_init_from_files(&llama, PLUS, MINUS, 1, 1, teacher, p) == nullptr);
        CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
        CHECK(adl_pair_init_from_adapter(&llama, PLUS, MINUS, 1, 1, teacher, p) == nullptr);
        CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
    }
    CHECK_EQ(fake::counts().loads, 1); // the teacher
    llama_model_free(teacher);
}

TEST(two_files_with_bad_arguments) {
    install();
    const adl_llama llama   = fake_llama_table();
    llama_model *   teacher = load();
    const auto      fails   = [&](const char * plus, const char * minus, double epsilon, double delta_scale, int32_t status) {
        CHECK(adl_pair_init_from_files(&llama, plus, minus, epsilon, delta_scale, teacher, params()) == nullptr);
        CHECK_EQ(adl_last_status(), status);
    };
    for (const double value : {0.0, -1.0, std::nan(""), HUGE_VAL}) {
        fails(PLUS, MINUS, value, 1, ADL_ERROR_INPUT);
        fails(PLUS, MINUS, 1, value, ADL_ERROR_INPUT);
    }
    fails(nullptr, MINUS, 1, 1, ADL_ERROR_INPUT);
    fails(PLUS, nullptr, 1, 1, ADL_ERROR_INPUT);
    fails("nowhere", MINUS, 1, 1, ADL_ERROR_MODEL);
    fails(PLUS, "nowhere", 1, 1, ADL_ERROR_MODEL);
    llama_model_free(teacher);
}

} // namespace

MAIN
