// The lockstep against rows computed apart: the toy's logits for the tokens that a sequence holds, through adl_adjust.

#include "check.hpp"
#include "models.hpp"

#include <cmath>
#include <map>
#include <random>

using models::Batch;
using models::Host;
using models::Tokens;

namespace {

constexpr double GUARD = 0.7; // lets two tokens or more pass in about half of the toy's rows

struct Step : models::Stepped {
    explicit Step(bool full = false, const adl_pair_params & of = models::params()) : Stepped(of, full) {}

    int32_t decode(Batch & batch, std::vector<adl_row_params> rows) {
        results.assign(rows.size(), {});
        return adl_lockstep_decode(lockstep, batch.get(), rows.data(), static_cast<int32_t>(rows.size()), results.data());
    }

    // Appends tokens to a sequence, with a row for the last.
    int32_t append(llama_seq_id seq_id, const Tokens & tokens, adl_row_params row) {
        Batch batch;
        for (size_t i = 0; i < tokens.size(); ++i) {
            batch.add(tokens[i], static_cast<llama_pos>(held[seq_id].size() + i), {seq_id}, i + 1 == tokens.size());
        }
        const int32_t status = decode(batch, {row});
        if (status != 1 && status != 2 && status != ADL_ERROR_DECODE && status != ADL_ERROR_INPUT) {
            held[seq_id].insert(held[seq_id].end(), tokens.begin(), tokens.end());
        }
        return status;
    }

    const float * row(int32_t i) { return llama_get_logits(context) + static_cast<size_t>(i) * models::N_TEACHER; }
    adl_lockstep_stats stats() { return adl_lockstep_get_stats(lockstep); }

    std::vector<adl_row_result>    results;
    std::map<llama_seq_id, Tokens> held;
};

adl_row_params protect(double strength = 2.0, double guard = GUARD) {
    return {strength, guard, ADL_MODE_PROTECT, false};
}

adl_row_params observe(bool full = false) {
    return {0.0, GUARD, ADL_MODE_OBSERVE, full};
}

struct Expected {
    std::vector<float> logits;
    adl_row            row;
    std::vector<float> plus, minus;

    double dose(llama_token token) const {
        const float delta = (plus[token] - minus[token]) / static_cast<float>(2 * models::EPSILON);
        return static_cast<double>(delta) - row.mean;
    }
};

// What a row has to be that follows these tokens.
Expected expected(const Tokens & tokens, const adl_row_params & params) {
    Expected e = {fake::logits(models::TEACHER, tokens), {}, fake::logits(models::PLUS, tokens), fake::logits(models::MINUS, tokens)};
    const bool         changes  = params.mode == ADL_MODE_PROTECT;
    std::vector<float> adjusted = e.logits;
    CHECK_EQ(adl_adjust(adjusted.data(), models::N_TEACHER, e.plus.data(), e.minus.data(), models::N_PROXY, models::N_PROXY,
                        models::TEACHER_ENDS, 2, models::EPSILON, (changes ? params.strength : 0.0) / models::DELTA_SCALE, params.guard, &e.row), ADL_OK);
    if (changes) {
        e.logits = adjusted;
    }
    return e;
}

bool same(const float * row, const std::vector<float> & logits) {
    return row != nullptr && std::equal(logits.begin(), logits.end(), row);
}

// The proxies' side of a row, and its doses.
void check_proxies(const Step & step, int32_t i, const Expected & e) {
    CHECK(same(adl_lockstep_get_logits(step.lockstep, i, ADL_PLUS), e.plus));
    CHECK(same(adl_lockstep_get_logits(step.lockstep, i, ADL_MINUS), e.minus));
    for (llama_token token = 0; token < models::N_PROXY; ++token) {
        CHECK_EQ(adl_lockstep_dose(step.lockstep, i, token), e.dose(token));
    }
    CHECK_EQ(adl_lockstep_dose(step.lockstep, i, models::N_PROXY), 0.0);
}

void check_no_proxies(const Step & step, int32_t i) {
    CHECK(adl_lockstep_get_logits(step.lockstep, i, ADL_PLUS) == nullptr);
    CHECK(adl_lockstep_get_logits(step.lockstep, i, ADL_MINUS) == nullptr);
    CHECK(std::isnan(adl_lockstep_dose(step.lockstep, i, 5)));
}

// A row, its results and what the proxies say of it.
void check_row(Step & step, int32_t i, const Tokens & tokens, const adl_row_params & params) {
    const Expected         e      = expected(tokens, params);
    const adl_row_result & result = step.results[i];
    const bool steered = params.mode == ADL_MODE_OBSERVE || (params.mode == ADL_MODE_PROTECT && params.strength > 0);
    CHECK(!result.closed);
    CHECK(same(step.row(i), e.logits));
    CHECK_EQ(result.n_candidates, steered ? e.row.n_candidates : 0);
    CHECK_EQ(result.evaluated, steered && (e.row.n_candidates > 1 || params.full));
    if (result.evaluated) {
        CHECK_EQ(result.kl, params.mode == ADL_MODE_PROTECT ? e.row.kl : 0.0);
        check_proxies(step, i, e);
    } else {
        check_no_proxies(step, i);
    }
}

// Tokens after which the teacher has a choice at GUARD, or has none.
Tokens prompt(bool choice) {
    for (llama_token last = 3; last < models::N_PROXY; ++last) {
        const Tokens tokens = {models::BOS, 7, 9, last};
        if ((expected(tokens, protect()).row.n_candidates > 1) == choice) {
            return tokens;
        }
    }
    return {};
}

} // namespace

TEST(a_row_without_a_choice_is_the_teachers_and_costs_no_proxy) {
    models::install();
    Step step;
    const Tokens tokens = prompt(false);
    CHECK_EQ(step.append(0, tokens, protect()), ADL_OK);
    check_row(step, 0, tokens, protect());
    CHECK(same(step.row(0), fake::logits(models::TEACHER, tokens)));
    CHECK_EQ(step.stats().n_pair_decodes, 0);
    CHECK_EQ(step.stats().n_choices, 0);
}

TEST(tokens_wait_until_a_row_has_a_choice_and_then_go_in_one_batch) {
    models::install();
    Step step;
    while (step.stats().n_choices == 0) {
        const auto n = static_cast<llama_token>(step.held[0].size());
        CHECK_EQ(step.append(0, {static_cast<llama_token>(3 + n * 5 % 50)}, protect()), ADL_OK);
        check_row(step, 0, step.held[0], protect());
    }
    CHECK_EQ(step.stats().n_pair_decodes, 1);
    CHECK_EQ(step.stats().n_pair_tokens, static_cast<int64_t>(step.held[0].size()));
}

TEST(full_evaluates_every_row_and_changes_no_other) {
    models::install();
    for (const bool per_row : {false, true}) {
        Step           step(!per_row);
        adl_row_params row = protect();
        row.full           = per_row;
        const Tokens tokens = prompt(false);
        CHECK_EQ(step.append(0, tokens, row), ADL_OK);
        CHECK(step.results[0].evaluated);
        CHECK_EQ(step.stats().n_pair_decodes, 1);
        CHECK(same(step.row(0), fake::logits(models::TEACHER, tokens)));
        CHECK_EQ(adl_lockstep_dose(step.lockstep, 0, 5), expected(tokens, row).dose(5));
    }
}

TEST(the_proxies_side_of_a_row_is_the_last_steps) {
    models::install();
    Step         step;
    const Tokens tokens = prompt(true);
    CHECK_EQ(step.append(0, tokens, protect()), ADL_OK);
    adl_pair_memory_clear(step.pair); // the rows were copied
    check_proxies(step, 0, expected(tokens, protect()));
    check_no_proxies(step, -1);
    check_no_proxies(step, 1);
    Batch next({8}, 4);
    const adl_row_params row = protect();
    CHECK_EQ(adl_lockstep_begin(step.lockstep, next.get(), &row, 1), ADL_OK);
    check_no_proxies(step, 0);
    CHECK_EQ(adl_lockstep_end(step.lockstep, -1, nullptr), ADL_OK);
    check_no_proxies(step, 0);
}

TEST(off_observe_and_strength_0_change_nothing) {
    models::install();
    Step         step;
    const Tokens tokens = prompt(true);
    CHECK_EQ(step.append(0, tokens, {3.0, GUARD, ADL_MODE_OFF, false}), ADL_OK);
    check_row(step, 0, tokens, {3.0, GUARD, ADL_MODE_OFF, false});
    CHECK_EQ(step.append(1, tokens, protect(0.0)), ADL_OK);
    check_row(step, 0, tokens, protect(0.0));
    CHECK_EQ(step.stats().n_pair_decodes, 0);
    CHECK_EQ(step.append(2, tokens, observe()), ADL_OK);
    check_row(step, 0, tokens, observe());
    CHECK_EQ(step.stats().n_pair_decodes, 1);
}

TEST(rows_of_one_batch_have_strengths_guards_and_modes_of_their_own) {
    models::install();
    Step  step;
    Batch batch;
    const std::vector<adl_row_params> rows = {protect(1.0, 0.05), {9.0, 0.0, ADL_MODE_OFF, false}, protect(4.0, 0.5), observe(true)};
    std::vector<Tokens>               texts;
    for (llama_seq_id seq_id = 0; seq_id < 4; ++seq_id) {
        texts.push_back({models::BOS, 10 + seq_id, 20});
        for (llama_pos pos = 0; pos < 3; ++pos) {
            batch.add(texts.back()[pos], pos, {seq_id}, pos == 2);
        }
    }
    CHECK_EQ(step.decode(batch, rows), ADL_OK);
    for (int32_t i = 0; i < 4; ++i) {
        check_row(step, i, texts[i], rows[i]);
    }
    CHECK_EQ(step.stats().n_pair_decodes, 1);
}

TEST(more_rows_than_the_pair_has_room_for_go_in_chunks) {
    models::install();
    adl_pair_params of       = models::params();
    of.context.n_outputs_max = 4; // as many as there are sequences, the least
    Step  step(true, of);
    Batch batch;
    Tokens tokens;
    for (llama_pos pos = 0; pos < 40; ++pos) { // more than the pair's batch of 32
        tokens.push_back(static_cast<llama_token>(3 + pos * 7 % 60));
        batch.add(tokens.back(), pos, {0}, pos % 3 == 0);
    }
    const std::vector<adl_row_params> rows(14, protect(1.5, 0.1));
    CHECK_EQ(step.decode(batch, rows), ADL_OK);
    adl_row_params full = rows[0];
    full.full           = true;
    for (int32_t i = 0; i < 14; ++i) {
        check_row(step, i, Tokens(tokens.begin(), tokens.begin() + 3 * i + 1), full);
    }
}

TEST(a_long_prompt_is_evaluated_as_it_comes) {
    models::install();
    Step   step;
    Tokens all;
    for (int chunk = 0; chunk < 3; ++chunk) {
        Batch batch;
        for (int i = 0; i < 30; ++i) {
            all.push_back(static_cast<llama_token>(3 + (chunk * 30 + i) % 60));
            batch.add(all.back(), static_cast<llama_pos>(all.size()) - 1, {0}, false);
        }
        CHECK_EQ(step.decode(batch, {}), ADL_OK);
        const int64_t n_evaluated = chunk == 0 ? 0 : 30 * (chunk + 1); // 32 may wait
        CHECK(step.stats().n_pair_tokens == n_evaluated || chunk == 2);
    }
    step.held[0] = all;
    CHECK_EQ(step.append(0, {5}, protect(1.0, 0.0)), ADL_OK);
    check_row(step, 0, step.held[0], protect(1.0, 0.0));
}

//
// Batches: those of a prompt that is cached are those of a fresh one
//

namespace {

adl_row_params always() { return protect(2.0, 0.0); } // has a choice
adl_row_params never() { return protect(2.0, 1.0); }

Tokens text(size_t n, llama_token seed = 0) {
    Tokens tokens;
    for (size_t i = 0; i < n; ++i) {
        tokens.push_back(static_cast<llama_token>(3 + (i * 7 + static_cast<size_t>(seed)) % 60));
    }
    return tokens;
}

// Decodes a prompt as a host is to: all but the last token in batches of `n_batch`, without rows, then the last.
void read(Step & step, llama_seq_id seq_id, const Tokens & prompt, adl_row_params row, size_t n_batch = 64) {
    for (size_t done = step.held[seq_id].size(); done + 1 < prompt.size();) {
        const size_t end = std::min(prompt.size() - 1, (done / n_batch + 1) * n_batch);
        Batch        batch;
        for (; done < end; ++done) {
            batch.add(prompt[done], static_cast<llama_pos>(done), {seq_id}, false);
            step.held[seq_id].push_back(prompt[done]);
        }
        CHECK_EQ(step.decode(batch, {}), ADL_OK);
    }
    CHECK_EQ(step.append(seq_id, {prompt.back()}, row), ADL_OK);
    check_row(step, 0, prompt, row);
}

void forget(Step & step, llama_seq_id seq_id, size_t keep) {
    CHECK(adl_lockstep_memory_seq_rm(step.lockstep, seq_id, static_cast<llama_pos>(keep), -1));
    step.held[seq_id].resize(keep);
}

adl_pair_params wide(uint32_t n_batch) {
    adl_pair_params of = models::params();
    of.context.n_ctx = 512, of.context.n_batch = n_batch, of.context.kv_unified = true;
    return of;
}

} // namespace

TEST(the_last_token_of_a_prompt_is_evaluated_by_itself) {
    const std::vector<std::pair<size_t, const char *>> cases = {{1, "1"}, {2, "1 1"}, {5, "4 1"}, {32, "31 1"}, {33, "32 1"}, {34, "32 1 1"},
                                                                {35, "32 2 1"}, {64, "32 31 1"}, {70, "32 32 5 1"}, {130, "32 32 32 32 1 1"}};
    for (const auto & [n, sizes] : cases) { // the pair's batches are of 32
        models::install();
        Step step(false, wide(32));
        read(step, 0, text(n), always());
        CHECK_EQ(models::batches(step.pair), sizes);
    }
}

TEST(it_is_also_where_the_prompt_waited) {
    models::install();
    Step step;
    read(step, 0, text(20), never());
    for (llama_token token : {4, 5, 6}) {
        CHECK_EQ(step.append(0, {token}, never()), ADL_OK);
    }
    CHECK_EQ(models::batches(step.pair), "");
    CHECK_EQ(step.append(0, {7}, always()), ADL_OK);
    check_row(step, 0, step.held[0], always());
    CHECK_EQ(models::batches(step.pair), "19 5"); // the last with what was sampled after it
}

TEST(a_prompt_that_is_cached_goes_on_in_the_batches_of_a_fresh_one) {
    for (const size_t n : {40, 70, 97, 98, 99, 130}) {
        for (const size_t n_waiting : {0, 1, 5, 40}) { // rows without a choice, before one that has it
            models::install();
            Step         step(false, wide(32));
            const Tokens prompt = text(n);
            std::string  fresh;
            for (int time = 0; time < 3; ++time) {
                const size_t before = fake::batches(adl_pair_get_context(step.pair, ADL_PLUS)).size();
                read(step, 0, prompt, n_waiting > 0 ? never() : always());
                for (size_t i = 1; i <= n_waiting; ++i) {
                    CHECK_EQ(step.append(0, {8}, i == n_waiting ? always() : never()), ADL_OK);
                    check_row(step, 0, step.held[0], i == n_waiting ? always() : never());
                }
                const std::string sizes = models::batches(step.pair, before);
                fresh                   = time == 0 ? sizes : fresh;
                CHECK(sizes.size() <= fresh.size() && sizes == fresh.substr(fresh.size() - sizes.size()));
                forget(step, 0, time == 0 ? prompt.size() - 1 : 32);
            }
        }
    }
}

TEST(a_prompt_is_evaluated_to_its_end_whichever_of_its_rows_has_a_choice) {
    models::install();
    Step  step;
    Batch batch;
    const Tokens prompt = text(20);
    for (llama_pos pos = 0; pos < 20; ++pos) {
        batch.add(prompt[pos], pos, {0}, pos == 3 || pos == 9);
    }
    CHECK_EQ(step.decode(batch, {always(), never()}), ADL_OK);
    check_row(step, 0, Tokens(prompt.begin(), prompt.begin() + 4), always());
    check_row(step, 1, Tokens(prompt.begin(), prompt.begin() + 10), never());
    CHECK_EQ(models::batches(step.pair), "20");
}

TEST(batches_are_cut_where_llama_cpp_cuts_those_of_one_sequence) {
    models::install();
    adl_pair_params of    = wide(64);
    of.context.n_ubatch   = 16;
    Step  step(false, of);
    Batch batch;
    for (llama_seq_id seq_id : {0, 1}) {
        for (llama_pos pos = 0; pos < 20; ++pos) {
            batch.add(static_cast<llama_token>(3 + pos), pos, {seq_id}, pos == 19);
        }
    }
    CHECK_EQ(step.decode(batch, {always(), always()}), ADL_OK);
    CHECK_EQ(models::batches(step.pair), "16 16 4 4"); // the other's first tokens fill a batch
}

//
// Doses of a text
//

namespace {

// The doses of a text's tokens from position `first` on, by its rows one by one.
std::vector<double> expected_doses(const Tokens & tokens, size_t first) {
    std::vector<double> doses;
    for (size_t i = first; i < tokens.size(); ++i) {
        doses.push_back(expected(Tokens(tokens.begin(), tokens.begin() + static_cast<std::ptrdiff_t>(i)), observe()).dose(tokens[i]));
    }
    return doses;
}

int32_t doses(Step & step, llama_seq_id seq_id, size_t first, const Tokens & of, std::vector<double> & found) {
    found.assign(of.size(), 0.0);
    return adl_lockstep_doses(step.lockstep, seq_id, static_cast<llama_pos>(first), of.data(), of.size(), found.data());
}

// The sequence's tokens from `first` on and one that is not decoded, and the next step.
void check_doses(Step & step, llama_seq_id seq_id, size_t first) {
    Tokens all = step.held[seq_id];
    all.push_back(11);
    std::vector<double> found;
    CHECK_EQ(doses(step, seq_id, first, Tokens(all.begin() + static_cast<std::ptrdiff_t>(first), all.end()), found), ADL_OK);
    CHECK(found == expected_doses(all, first));
    check_no_proxies(step, 0);
    CHECK_EQ(step.append(seq_id, {11}, always()), ADL_OK);
    check_row(step, 0, step.held[seq_id], always());
}

} // namespace

TEST(doses_of_a_text_are_those_of_its_rows_one_by_one) {
    struct Case {
        std::string what;
        uint32_t    n_rows; // 4 is the least that four sequences may have
        const char * sizes; // of the batches: what comes before the first row's token at once, and as many rows as there is room for
    };
    const std::vector<Case> cases = {
        {"waiting", 4, "49 4 4 4 4 4 4 4 4 4 4 4 2"}, {"held", 4, "4 4 4 4 4 4 4 4 4 4 4 2"}, {"partly", 4, "4 4 4 4 4 4 4 4 4 4 4 2"},
        {"cached", 4, "4 4 3"},                       {"waiting", 16, "49 16 16 14"},         {"held", 16, "16 16 14"},
        {"partly", 16, "16 16 14"},                   {"cached", 16, "11"}};
    for (const auto & [what, n_rows, sizes] : cases) {
        models::install();
        adl_pair_params of       = wide(128);
        of.context.n_outputs_max = n_rows;
        Step               step(false, of);
        read(step, 1, text(40, 3), always()); // another sequence, which stays
        read(step, 0, text(50), what == "held" ? always() : never());
        for (llama_token i = 0; i < 45; ++i) {
            const bool choice = what == "held" || (what == "partly" && i == 20);
            CHECK_EQ(step.append(0, {3 + i}, choice ? always() : never()), ADL_OK);
        }
        if (what == "cached") { // and the pair held less of it before
            CHECK_EQ(step.append(0, {7}, always()), ADL_OK);
            forget(step, 0, 60);
        }
        const size_t before = fake::batches(adl_pair_get_context(step.pair, ADL_PLUS)).size();
        check_doses(step, 0, 50);
        CHECK_EQ(models::batches(step.pair, before), std::string(sizes) + " 1"); // and the next step's
        check_doses(step, 1, 40);
        check_doses(step, 1, 1); // all but the first
    }
}

TEST(doses_in_recurrent_memory) { // which cannot forget a part
    models::install();
    for (const char * path : {models::PLUS, models::MINUS}) {
        fake::file(path).recurrent = true;
    }
    Step step(false, wide(32));
    read(step, 1, text(20, 3), always());
    read(step, 0, text(100), always());
    for (llama_token token : {4, 5, 6}) {
        CHECK_EQ(step.append(0, {token}, always()), ADL_OK);
    }
    const size_t before = fake::batches(adl_pair_get_context(step.pair, ADL_PLUS)).size();
    check_doses(step, 0, 100);
    CHECK_EQ(models::batches(step.pair, before), "32 32 32 3 4 1");
    check_doses(step, 1, 20);
}

TEST(doses_that_a_proxy_fails_to_give) {
    models::install();
    Step step;
    read(step, 0, text(20), always());
    CHECK_EQ(step.append(0, {4}, always()), ADL_OK);
    std::vector<double> found;
    for (const char * which : {models::PLUS, models::MINUS}) {
        fake::file(which).faults.decode_in = 1;
        CHECK_EQ(doses(step, 0, 20, {4, 5}, found), ADL_ERROR_PROXY);
        CHECK_CONTAINS(adl_last_error(), "could not be evaluated");
        check_no_proxies(step, 0);
        check_doses(step, 0, 20); // healed
        fake::file(which).faults.logits[9] = NAN;
        CHECK_EQ(doses(step, 0, 20, {4, 5}, found), ADL_ERROR_PROXY);
        CHECK_CONTAINS(adl_last_error(), "not numbers");
        fake::file(which).faults.logits.clear();
        check_doses(step, 0, 20);
    }
}

TEST(doses_of_what_is_not_there_are_refused) {
    models::install();
    Step step;
    read(step, 0, text(20), always());
    std::vector<double> found;
    const int64_t       before = step.stats().n_pair_decodes;
    CHECK_EQ(doses(step, 0, 0, text(20), found), ADL_ERROR_INPUT); // nothing comes before the first
    CHECK_EQ(doses(step, 0, 19, {4, 5, 6}, found), ADL_ERROR_INPUT);
    CHECK_EQ(doses(step, 0, 21, {4}, found), ADL_ERROR_INPUT);
    CHECK_EQ(doses(step, 2, 1, {4}, found), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "sequence 2 holds 0");
    const llama_token token = 4;
    double            dose  = 0;
    CHECK_EQ(adl_lockstep_doses(step.lockstep, 0, 20, nullptr, 1, &dose), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_doses(step.lockstep, 0, 20, &token, 1, nullptr), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_doses(nullptr, 0, 20, &token, 1, &dose), ADL_ERROR_INPUT);
    CHECK_EQ(step.stats().n_pair_decodes, before);
    CHECK_EQ(adl_lockstep_doses(step.lockstep, 0, 20, nullptr, 0, nullptr), ADL_OK); // none
    CHECK_EQ(step.stats().n_pair_decodes, before);
    CHECK_EQ(doses(step, 0, 20, {-1}, found), ADL_ERROR_INPUT);
    CHECK_EQ(doses(step, 0, 20, {models::N_TEACHER}, found), ADL_ERROR_INPUT);
    CHECK_EQ(doses(step, 0, 20, {models::N_PROXY}, found), ADL_OK); // the teacher's alone: it has none
    CHECK_EQ(found[0], 0.0);
    check_doses(step, 0, 20);
}

//
// What a batch may leave out
//

TEST(null_positions_sequences_and_outputs_are_the_teachers) {
    models::install();
    Step                      step;
    Tokens                    tokens = {models::BOS, 7, 9};
    const adl_row_params      row    = protect(1.0, 0.0);
    adl_row_result            result;
    CHECK_EQ(adl_lockstep_decode(step.lockstep, {3, tokens.data(), nullptr, nullptr, nullptr, nullptr, nullptr}, &row, 1, &result), ADL_OK);
    llama_token next = 11;
    CHECK_EQ(adl_lockstep_decode(step.lockstep, {1, &next, nullptr, nullptr, nullptr, nullptr, nullptr}, &row, 1, &result), ADL_OK);
    CHECK(same(step.row(0), expected({models::BOS, 7, 9, 11}, row).logits));
}

TEST(a_proxy_that_fails_closes_the_rows_that_needed_it_and_no_others) {
    models::install();
    for (const char * which : {models::PLUS, models::MINUS}) {
        Step  step;
        Batch batch;
        const Tokens sure = prompt(false), unsure = prompt(true);
        for (llama_pos pos = 0; pos < 4; ++pos) {
            batch.add(sure[pos], pos, {0}, pos == 3).add(unsure[pos], pos, {1}, pos == 3);
        }
        fake::file(which).faults.decode_in = 1;
        CHECK_EQ(step.decode(batch, {protect(), protect()}), ADL_ERROR_PROXY);
        CHECK_CONTAINS(adl_last_error(), "could not be evaluated");
        CHECK(!step.results[0].closed);
        CHECK(same(step.row(0), fake::logits(models::TEACHER, sure)));
        CHECK(step.results[1].closed);
        CHECK(models::is_closed(step.row(1)));
        check_no_proxies(step, 0);
        check_no_proxies(step, 1);
        step.held = {{0, sure}, {1, unsure}};
        CHECK_EQ(step.append(1, {8}, protect(2.0, 0.0)), ADL_OK); // healed
        check_row(step, 0, step.held[1], protect(2.0, 0.0));
    }
}

TEST(nonsense_closes_a_row_and_only_that) {
    models::install();
    Step         step;
    const Tokens unsure = prompt(true), sure = prompt(false);
    fake::file(models::PLUS).faults.logits[9] = NAN;
    CHECK_EQ(step.append(0, unsure, protect()), ADL_ERROR_PROXY);
    CHECK(step.results[0].closed && models::is_closed(step.row(0)));
    fake::file(models::PLUS).faults.logits.clear();
    fake::file(models::TEACHER).faults.logits[9] = NAN;
    CHECK_EQ(step.append(1, sure, protect()), ADL_ERROR_PROXY); // found without a proxy
    CHECK(step.results[0].closed && models::is_closed(step.row(0)));
    CHECK_EQ(step.append(2, sure, {0.0, 0.0, ADL_MODE_OFF, false}), ADL_OK);
}

TEST(a_teacher_that_fails_leaves_no_row_and_nothing_of_the_batch) {
    models::install();
    for (const int32_t code : {1, 2, -1, -2, -3}) {
        Step step;
        CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
        fake::file(models::TEACHER).faults.decode_in   = 1;
        fake::file(models::TEACHER).faults.decode_code = code;
        CHECK_EQ(step.append(0, {8}, protect()), code > 0 ? code : ADL_ERROR_DECODE);
        CHECK(models::is_closed(step.row(0)));
        CHECK_EQ(fake::memory(step.context, 0).size(), 4u);
        CHECK_EQ(step.append(0, {8}, protect(2.0, 0.0)), ADL_OK);
        check_row(step, 0, step.held[0], protect(2.0, 0.0));
    }
}

TEST(what_changes_the_teacher_around_the_lockstep_is_noticed) {
    models::install();
    Step step;
    CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
    llama_memory_seq_rm(llama_get_memory(step.context), 0, 2, -1);
    CHECK_EQ(step.append(0, {8}, protect()), ADL_ERROR_PROXY);
    CHECK_CONTAINS(adl_last_error(), "around adlocal");
    adl_lockstep_memory_clear(step.lockstep);
    step.held.clear();
    CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
    check_row(step, 0, step.held[0], protect());
}

TEST(a_pair_that_somebody_else_used_is_evaluated_afresh) {
    models::install();
    Step step;
    CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
    Batch other({5, 6, 7});
    adl_pair_memory_clear(step.pair);
    CHECK_EQ(adl_pair_decode(step.pair, other.get()), 1);
    CHECK_EQ(step.append(0, {8}, protect(2.0, 0.0)), ADL_OK);
    check_row(step, 0, step.held[0], protect(2.0, 0.0));
}

TEST(a_hole_leaves_both_memories_alike) {
    models::install();
    Step step;
    CHECK_EQ(step.append(0, {models::BOS, 7, 9, 11, 13}, {0.0, 0.0, ADL_MODE_OFF, false}), ADL_OK);
    CHECK(adl_lockstep_memory_seq_rm(step.lockstep, 0, 1, 3));
    Batch batch;
    batch.add(8, 5, {0}, true);
    CHECK_EQ(step.decode(batch, {protect(1.0, 0.0)}), ADL_OK);
    for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
        CHECK(fake::memory(adl_pair_get_context(step.pair, sign), 0) == fake::memory(step.context, 0));
    }
}

TEST(copies_are_read_once) {
    models::install();
    Step step;
    CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
    const int64_t n = step.stats().n_pair_tokens;
    CHECK_EQ(adl_lockstep_memory_seq_cp(step.lockstep, 0, 1, -1, -1), ADL_OK);
    step.held[1] = step.held[0];
    CHECK_EQ(step.append(1, {8}, protect(2.0, 0.0)), ADL_OK);
    check_row(step, 0, step.held[1], protect(2.0, 0.0));
    CHECK_EQ(step.stats().n_pair_tokens, n + 1);
}

TEST(copies_between_streams_are_whole) {
    models::install();
    adl_pair_params of    = models::params();
    of.context.kv_unified = false;
    Step step(false, of);
    CHECK_EQ(step.append(0, prompt(true), protect()), ADL_OK);
    CHECK_EQ(adl_lockstep_memory_seq_cp(step.lockstep, 0, 1, -1, -1), ADL_OK);
    step.held[1] = step.held[0];
    CHECK_EQ(step.append(1, {8}, protect(2.0, 0.0)), ADL_OK);
    check_row(step, 0, step.held[1], protect(2.0, 0.0));
}

TEST(a_restored_state_waits) {
    models::install();
    Step         step;
    const Tokens tokens = {models::BOS, 7, 9};
    Batch        batch(tokens);
    CHECK_EQ(llama_decode(step.context, batch.get()), 0); // as llama_state_set_data would leave it
    CHECK_EQ(adl_lockstep_restore(step.lockstep, 0, tokens.data(), nullptr, 3, 0), ADL_OK);
    step.held[0] = tokens;
    CHECK_EQ(step.append(0, {8}, protect(2.0, 0.0)), ADL_OK);
    check_row(step, 0, step.held[0], protect(2.0, 0.0));
}

TEST(a_restored_state_waits_at_its_own_positions) {
    models::install();
    Step step;
    CHECK_EQ(step.append(1, {models::BOS, 7, 9}, protect()), ADL_OK);
    Tokens                 tokens(8);
    std::vector<llama_pos> pos(8, -1);
    CHECK_EQ(adl_lockstep_get_tokens(step.lockstep, 1, tokens.data(), pos.data(), 2), 3u); // no more than there is room for
    CHECK_EQ(pos[1], 1);
    CHECK_EQ(pos[2], -1);
    CHECK_EQ(adl_lockstep_get_tokens(step.lockstep, 1, tokens.data(), pos.data(), 8), 3u);
    CHECK(std::equal(tokens.begin(), tokens.begin() + 3, step.held[1].begin()));
    CHECK_EQ(adl_lockstep_get_tokens(step.lockstep, 3, nullptr, nullptr, 0), 0u);

    Batch batch(Tokens{models::BOS, 5, 6, 8});
    CHECK_EQ(llama_decode(step.context, batch.get()), 0);
    llama_memory_seq_rm(llama_get_memory(step.context), 0, 1, 2); // with a hole, as a text that was cut in the middle has
    const llama_token at[]    = {models::BOS, 6, 8};
    const llama_pos   where[] = {0, 2, 3};
    CHECK_EQ(adl_lockstep_restore(step.lockstep, 0, at, where, 3, 0), ADL_OK);
    CHECK_EQ(adl_lockstep_get_tokens(step.lockstep, 0, tokens.data(), pos.data(), 8), 3u);
    CHECK(std::equal(pos.begin(), pos.begin() + 3, where));
    Batch next, early;
    next.add(9, 4, {0}, true), early.add(9, 4, {0}, true);
    const adl_row_params off = {0.0, 0.0, ADL_MODE_OFF, false};
    CHECK_EQ(step.decode(next, {off}), ADL_OK);
    CHECK_EQ(step.decode(early, {off}), ADL_ERROR_PROXY); // a position that it has
}

TEST(rows_that_a_host_asked_for_by_itself_are_closed) {
    models::install();
    Step step;
    CHECK_EQ(step.append(0, {models::BOS, 7}, protect(0.0)), ADL_OK);
    CHECK(!models::is_closed(step.row(0)));
    adl_lockstep_close(step.lockstep, 1);
    CHECK(models::is_closed(step.row(0)));
}

TEST(what_is_no_step_is_refused) {
    models::install();
    Step                 step;
    const adl_row_params bad = {-1.0, 0.1, ADL_MODE_PROTECT, false}, none = {1.0, 0.1, 7, false};
    Batch                batch({5, 6});
    CHECK_EQ(adl_lockstep_begin(step.lockstep, batch.get(), &bad, 1), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_begin(step.lockstep, batch.get(), &none, 1), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_begin(step.lockstep, batch.get(), nullptr, 0), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_end(step.lockstep, 0, nullptr), ADL_ERROR_INPUT);
    CHECK_EQ(adl_lockstep_begin(nullptr, batch.get(), &bad, 1), ADL_ERROR_INPUT);
    llama_batch embeddings = batch.get();
    embeddings.token       = nullptr;
    CHECK_EQ(adl_lockstep_begin(step.lockstep, embeddings, &bad, 1), ADL_ERROR_PROXY);
    CHECK(adl_lockstep_init(nullptr, step.context, adl_lockstep_default_params()) == nullptr);
    CHECK(adl_lockstep_init(step.pair, step.context, {8, false}) == nullptr);
}

// What the proxies' memory keeps: everything, a state, or a window that shares its cells.
enum class Memory { WHOLE, STATE, WINDOW };

void install(Memory memory) {
    models::install();
    for (const char * path : {models::PLUS, models::MINUS}) {
        fake::file(path).recurrent = memory == Memory::STATE;
        fake::file(path).n_swa     = memory == Memory::WINDOW ? 4 : 0;
    }
}

TEST(what_the_proxies_memory_lost_is_evaluated_again) {
    for (const Memory memory : {Memory::STATE, Memory::WINDOW}) {
        install(memory);
        Step   step;
        Tokens tokens;
        for (llama_token token = 10; token < 40; ++token) {
            tokens.push_back(token);
        }
        CHECK_EQ(step.append(0, tokens, protect(2.0, 0.0)), ADL_OK);
        check_row(step, 0, tokens, protect(2.0, 0.0));

        CHECK(adl_lockstep_memory_seq_rm(step.lockstep, 0, 20, -1)); // back
        CHECK_EQ(adl_lockstep_n_held(step.lockstep, 0), 0u);
        step.held[0].resize(20);
        CHECK_EQ(step.append(0, {7}, protect(2.0, 0.0)), ADL_OK);
        check_row(step, 0, step.held[0], protect(2.0, 0.0));

        CHECK_EQ(adl_lockstep_memory_seq_cp(step.lockstep, 0, 1, -1, 12), ADL_OK); // a copy of a part
        CHECK_EQ(adl_lockstep_n_held(step.lockstep, 1), 0u);
        step.held[1] = Tokens(tokens.begin(), tokens.begin() + 12);
        CHECK_EQ(step.append(1, {7}, protect(2.0, 0.0)), ADL_OK);
        check_row(step, 0, step.held[1], protect(2.0, 0.0));

        std::vector<double> doses(5); // of what was said long ago
        CHECK_EQ(adl_lockstep_doses(step.lockstep, 0, 8, &step.held[0][8], 5, doses.data()), ADL_OK);
        for (size_t i = 0; i < 5; ++i) {
            const Tokens before(tokens.begin(), tokens.begin() + 8 + static_cast<std::ptrdiff_t>(i));
            CHECK_EQ(doses[i], expected(before, observe()).dose(step.held[0][8 + i]));
        }
    }
}

TEST(a_whole_copy_and_a_window_that_is_there_are_not_evaluated_again) {
    for (const Memory memory : {Memory::WHOLE, Memory::STATE, Memory::WINDOW}) {
        install(memory);
        Step         step;
        const Tokens tokens = {10, 11, 12, 13, 14, 15, 16, 17, 18};
        CHECK_EQ(step.append(0, tokens, protect(2.0, 0.0)), ADL_OK);
        CHECK_EQ(adl_lockstep_memory_seq_cp(step.lockstep, 0, 1, -1, -1), ADL_OK);
        CHECK_EQ(adl_lockstep_n_held(step.lockstep, 1), tokens.size());
        step.held[1] = step.held[0];
        CHECK_EQ(step.append(1, {7}, protect(2.0, 0.0)), ADL_OK);
        check_row(step, 0, step.held[1], protect(2.0, 0.0));
        if (memory != Memory::STATE) { // the next token to be decoded sees as far back as the one before
            CHECK(adl_lockstep_memory_seq_rm(step.lockstep, 1, static_cast<llama_pos>(tokens.size()), -1));
            CHECK_EQ(adl_lockstep_n_held(step.lockstep, 1), tokens.size());
        }
    }
}

TEST(nonsense_closes_an_observed_row) {
    models::install();
    for (const float value : {NAN, INFINITY}) {
        Step         step;
        const Tokens tokens = prompt(true);
        fake::file(models::PLUS).faults.logits = {{5, value}};
        CHECK_EQ(step.append(0, tokens, observe()), ADL_ERROR_PROXY);
        CHECK(step.results[0].closed);
        CHECK(!same(step.row(0), fake::logits(models::TEACHER, tokens)));
        check_no_proxies(step, 0);
        fake::file(models::PLUS).faults.logits.clear();
        CHECK_EQ(step.append(1, tokens, observe()), ADL_OK);
        check_row(step, 0, tokens, observe());
    }
}

// Random operations on four sequences; after each decode every row is that of a fresh evaluation.
static void operate_at_random(Memory memory, int n) {
    install(memory);
    adl_pair_params of    = models::params();
    of.context.n_ctx      = 512; // as the teacher's
    of.context.kv_unified = true;
    Step         step(false, of);
    std::mt19937 rng(7);
    const auto   below = [&](int n) { return static_cast<int>(rng() % static_cast<unsigned>(n)); };
    const auto   any_row = [&]() -> adl_row_params {
        const double guards[] = {0.0, 0.05, GUARD, 1.0};
        return {below(5) * 0.8, guards[below(4)], below(3), below(8) == 0};
    };
    for (int i = 0; i < n; ++i) {
        const llama_seq_id seq_id = below(4);
        Tokens &           held   = step.held[seq_id];
        switch (const int what = below(20)) {
            case 0: { // rollback
                const auto keep = static_cast<llama_pos>(held.empty() ? 0 : below(static_cast<int>(held.size())));
                CHECK(adl_lockstep_memory_seq_rm(step.lockstep, seq_id, keep, -1));
                held.resize(keep);
                break;
            }
            case 1: { // copy over a sequence that is emptied first
                const llama_seq_id source = below(4);
                if (source != seq_id) {
                    CHECK(adl_lockstep_memory_seq_rm(step.lockstep, seq_id, -1, -1));
                    const bool all  = below(2) == 0;
                    const auto size = static_cast<int>(step.held[source].size()), end = all ? size : below(size + 1);
                    CHECK_EQ(adl_lockstep_memory_seq_cp(step.lockstep, source, seq_id, -1, all ? -1 : end), ADL_OK);
                    held = step.held[source];
                    held.resize(static_cast<size_t>(end));
                }
                break;
            }
            case 2:
                if (below(10) == 0) {
                    adl_lockstep_memory_seq_keep(step.lockstep, seq_id);
                    step.held = {{seq_id, Tokens(held)}};
                } else if (below(20) == 0) {
                    adl_lockstep_memory_clear(step.lockstep);
                    step.held.clear();
                } else {
                    adl_pair_memory_clear(step.pair);
                }
                break;
            default: {
                const bool teacher_fails = what == 3, proxy_fails = what == 4;
                Batch                       batch;
                std::vector<adl_row_params> rows;
                std::vector<Tokens>         texts;
                auto                        after = step.held;
                for (llama_seq_id s = 0; s < 4; ++s) {
                    for (int n = s == seq_id ? 1 + below(6) : below(2) * below(3); n > 0; --n) {
                        const auto pos    = static_cast<llama_pos>(after[s].size());
                        const bool output = below(2) == 0;
                        after[s].push_back(below(models::N_PROXY));
                        batch.add(after[s].back(), pos, {s}, output);
                        if (output) {
                            rows.push_back(any_row());
                            texts.push_back(after[s]);
                        }
                    }
                }
                fake::file(models::TEACHER).faults.decode_in = teacher_fails;
                fake::file(models::TEACHER).faults.decode_code = below(2) == 0 ? 2 : -3;
                fake::file(models::MINUS).faults.decode_in   = proxy_fails;
                const int32_t status = step.decode(batch, rows);
                fake::file(models::TEACHER).faults.decode_in = fake::file(models::MINUS).faults.decode_in = 0;
                if (teacher_fails) {
                    CHECK(status == 2 || status == ADL_ERROR_DECODE);
                    for (size_t k = 0; k < rows.size(); ++k) {
                        CHECK(models::is_closed(step.row(static_cast<int32_t>(k))));
                    }
                    break;
                }
                step.held = after;
                for (size_t k = 0; k < rows.size(); ++k) {
                    const auto row = static_cast<int32_t>(k);
                    if (step.results[k].closed) {
                        CHECK(proxy_fails && models::is_closed(step.row(row)));
                    } else {
                        check_row(step, row, texts[k], rows[k]);
                    }
                }
            }
        }
        for (auto & each : step.held) { // contexts have an end
            if (each.second.size() > 90) {
                CHECK(adl_lockstep_memory_seq_rm(step.lockstep, each.first, -1, -1));
                each.second.clear();
            }
        }
    }
    CHECK(step.stats().n_evaluated > n / 10);
    CHECK(step.stats().n_rows > 2 * step.stats().n_evaluated);
}

TEST(random_operations) { operate_at_random(Memory::WHOLE, 10000); }
TEST(random_operations_on_states) { operate_at_random(Memory::STATE, 2000); }
TEST(random_operations_on_windows) { operate_at_random(Memory::WINDOW, 2000); }

MAIN
