// Adjusting the teacher's rows of a batch: row by row what adl_adjust gives, and closed rows wherever that fails.

#include "check.hpp"
#include "models.hpp"

#include <algorithm>
#include <limits>

namespace {

using namespace models;

constexpr double ZEROS[]  = {0, 0, 0, 0};
constexpr double ONES[]   = {1, 1, 1};
constexpr double GUARDS[] = {0.05, 0.05, 0.05};
constexpr float  NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// Three sequences, one row each, and the teacher's logits of them.
struct Decoded : Host {
    std::vector<Tokens> histories = {{4, 8, 9}, {6}, {5, 7}};
    std::vector<float>  logits;

    Decoded() {
        Batch batch;
        batch.add(4, 0, {0}, false).add(8, 1, {0}, false).add(9, 2, {0}, true).add(6, 0, {1}, true).add(5, 0, {2}, false).add(7, 1, {2}, true);
        CHECK_EQ(adl_pair_decode(pair, batch.get()), 3);
        for (const Tokens & history : histories) {
            const std::vector<float> row = fake::logits(TEACHER, history);
            logits.insert(logits.end(), row.begin(), row.end());
        }
    }

    float * row(int i) { return logits.data() + i * N_TEACHER; }
};

// adl_adjust on the toys' own logits after `tokens`.
adl_row adjusted(const Tokens & tokens, double strength, double guard, std::vector<float> & logits) {
    adl_row                  row  = {};
    const std::vector<float> plus = fake::logits(PLUS, tokens), minus = fake::logits(MINUS, tokens);
    logits = fake::logits(TEACHER, tokens);
    CHECK_EQ(adl_adjust(logits.data(), N_TEACHER, plus.data(), minus.data(), N_PROXY, N_PROXY, TEACHER_ENDS, 2, EPSILON,
                        strength / DELTA_SCALE, guard, &row), ADL_OK);
    return row;
}

TEST(rows_are_adjusted_with_a_strength_and_a_guard_each) {
    const double guards[][3] = {{0, 0, 0}, {0.05, 0.05, 0.05}, {0.5, 0, 0.05}, {0, 1, 0.5}, {1, 0, 0}, {0.05, 0.5, 1}};
    for (const auto & guard : guards) {
        install();
        Decoded      d;
        const double strength[] = {1.0, 0.0, 6.5};
        adl_row      rows[3];
        CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, strength, guard, rows), ADL_OK);
        for (int i = 0; i < 3; ++i) {
            std::vector<float> expected;
            const adl_row      row = adjusted(d.histories[i], strength[i], guard[i], expected);
            CHECK(std::memcmp(expected.data(), d.row(i), N_TEACHER * sizeof(float)) == 0);
            CHECK_EQ(rows[i].mean, row.mean);
            CHECK_EQ(rows[i].kl, row.kl);
            CHECK_EQ(rows[i].n_candidates, row.n_candidates);
        }
        CHECK(std::memcmp(fake::logits(TEACHER, d.histories[1]).data(), d.row(1), N_TEACHER * sizeof(float)) == 0); // strength 0
        CHECK(guard[2] != guard[0] || rows[2].kl > rows[0].kl);
    }
}

TEST(ends_stay_the_teachers) {
    install();
    Decoded      d;
    const double strength[] = {8, 8, 8};
    adl_row      rows[3];
    std::vector<float> before;
    for (int i = 0; i < 3; ++i) {
        d.row(i)[EOS] = *std::max_element(d.row(i), d.row(i) + N_TEACHER) + 0.25f; // plausible as can be
        d.row(i)[EOT] = d.row(i)[EOS] - 1;
    }
    before = d.logits;
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, strength, ZEROS, rows), ADL_OK);
    for (int i = 0; i < 3; ++i) {
        for (const llama_token end : TEACHER_ENDS) {
            CHECK_EQ(d.row(i)[end], before[i * N_TEACHER + end]);
        }
        CHECK(d.row(i)[7] != before[i * N_TEACHER + 7]);
        CHECK_EQ(rows[i].n_candidates, N_PROXY - 2);
    }
}

TEST(strength_is_the_typical_shift_in_nats) {
    install();
    Decoded      d;
    const double strength[] = {2, 2, 2};
    adl_row      rows[3];
    double       squares = 0;
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, strength, ZEROS, rows), ADL_OK);
    for (int i = 0; i < 3; ++i) {
        const std::vector<float> before = fake::logits(TEACHER, d.histories[i]);
        double sum = 0, square = 0; // against each other: a constant of the row keeps the mass
        for (int32_t t = EOT + 1; t < N_PROXY; ++t) {
            sum += d.row(i)[t] - before[t];
            square += std::pow(d.row(i)[t] - before[t], 2);
        }
        const int32_t n = N_PROXY - EOT - 1;
        squares += square / n - std::pow(sum / n, 2);
    }
    // Δ of the toy is uniform − uniform, RMS √(2/3), times its scale: what delta_scale, 0.75, stands for.
    CHECK_NEAR(std::sqrt(squares / 3), 2 * 0.816 / 0.75, 0.2);
}

// Checks that adjusting fails with `status` and leaves every row closed.
void check_closes(Decoded & d, int32_t status, const char * words, const double * strength, const double * guard = GUARDS) {
    adl_row rows[3] = {{1, 2, 3}, {1, 2, 3}, {1, 2, 3}};
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, strength, guard, rows), status);
    CHECK_CONTAINS(adl_last_error(), words);
    for (int i = 0; i < 3; ++i) {
        CHECK(is_closed(d.row(i)));
        CHECK(rows[i].mean == 1 && rows[i].kl == 2 && rows[i].n_candidates == 3); // written on success only
    }
}

TEST(one_row_that_fails_closes_all) {
    for (const char * path : {PLUS, MINUS}) {
        for (const float value : {NOT_A_NUMBER, HUGE_VALF, -HUGE_VALF}) {
            install();
            fake::file(path).faults.logits[40] = value;
            Decoded d;
            for (int i = 0; i < 3; ++i) {
                d.row(i)[40] = 3; // plausible, so that its Δ is asked for
            }
            check_closes(d, ADL_ERROR_PROXY, "", ONES);
        }
    }
    for (int i = 0; i < 3; ++i) {
        install();
        Decoded d;
        d.row(i)[7] = NOT_A_NUMBER;
        check_closes(d, ADL_ERROR_PROXY, "teacher", ONES);
    }
    install();
    Decoded      d;
    const double too_strong[] = {1, 1, 1e300};
    check_closes(d, ADL_ERROR_PROXY, "smaller strength", too_strong);
}

TEST(bad_strengths_and_guards_close_all) {
    const double inf = HUGE_VAL, nan = std::nan("");
    for (int i = 0; i < 3; ++i) {
        for (const double bad : {-0.1, nan, inf, -inf}) {
            install();
            Decoded d;
            double  strength[] = {1, 1, 1};
            strength[i]        = bad;
            check_closes(d, ADL_ERROR_INPUT, "strength", strength);
        }
    }
    for (int i = 0; i < 3; ++i) {
        for (const double bad : {-0.01, 1.01, nan, inf}) {
            install();
            Decoded d;
            double  guard[] = {0.05, 0.05, 0.05};
            guard[i]        = bad;
            check_closes(d, ADL_ERROR_INPUT, "guard", ONES, guard);
            check_closes(d, ADL_ERROR_INPUT, "guard", ZEROS, guard);
        }
    }
}

TEST(other_numbers_of_rows_close_what_was_given) {
    install();
    Decoded d;
    adl_row rows[4];
    for (const int32_t n : {1, 2}) {
        CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), n, ONES, ZEROS, rows), ADL_ERROR_PROXY);
        CHECK_CONTAINS(adl_last_error(), "evaluated 3");
        CHECK(is_closed(d.row(n - 1)));
        CHECK(!is_closed(d.row(n))); // what was not given is not touched
    }
    d.logits.resize(4 * N_TEACHER);
    const double strength[] = {1, 1, 1, 1};
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 4, strength, ZEROS, rows), ADL_ERROR_PROXY);
    CHECK(is_closed(d.row(3)));
    for (const int32_t n : {0, -1, INT32_MIN}) {
        CHECK(adl_pair_adjust(d.pair, d.logits.data(), n, strength, ZEROS, rows) < 0);
    }
}

TEST(null_pointers_close_what_was_given) {
    install();
    Decoded d;
    adl_row rows[3];
    CHECK_EQ(adl_pair_adjust(d.pair, nullptr, 3, ONES, ZEROS, rows), ADL_ERROR_INPUT);
    CHECK_EQ(adl_pair_adjust(nullptr, d.logits.data(), 3, ONES, ZEROS, rows), ADL_ERROR_INPUT);
    check_closes(d, ADL_ERROR_INPUT, "NULL", nullptr);
    d.logits.assign(d.logits.size(), 1.0f);
    check_closes(d, ADL_ERROR_INPUT, "NULL", ONES, nullptr);
    d.logits.assign(d.logits.size(), 1.0f);
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, ONES, ZEROS, nullptr), ADL_ERROR_INPUT);
    CHECK(is_closed(d.row(0)) && is_closed(d.row(1)) && is_closed(d.row(2)));
}

TEST(rows_that_are_gone_close) {
    const std::vector<void (*)(adl_pair *)> goings = {
        [](adl_pair * pair) { adl_pair_memory_clear(pair); },
        [](adl_pair * pair) { adl_pair_memory_seq_rm(pair, 0, 1, -1); },
        [](adl_pair * pair) { adl_pair_memory_seq_cp(pair, 0, 3, -1, -1); },
        [](adl_pair * pair) { adl_pair_memory_seq_keep(pair, 0); },
        [](adl_pair * pair) { adl_pair_touch(pair); },
        [](adl_pair * pair) { CHECK_EQ(adl_pair_decode(pair, Batch({N_PROXY}).get()), ADL_ERROR_PROXY); },
        [](adl_pair * pair) { Batch batch; CHECK_EQ(adl_pair_decode(pair, batch.add(5, 2, {2}, false).get()), 0); },
    };
    for (const auto go : goings) {
        install();
        Decoded d;
        go(d.pair);
        check_closes(d, ADL_ERROR_PROXY, "", ONES);
    }
}

TEST(a_closed_row_is_sampled_to_its_end) {
    install();
    Decoded d;
    adl_pair_touch(d.pair);
    check_closes(d, ADL_ERROR_PROXY, "", ONES);
    double total = 0, ends = 0; // softmax
    for (int32_t t = 0; t < N_TEACHER; ++t) {
        const double p = std::exp(static_cast<double>(d.row(0)[t]));
        total += p;
        ends += t == EOS || t == EOT ? p : 0;
    }
    CHECK_EQ(ends / total, 1.0);
}

TEST(a_teacher_without_an_end_has_nothing_left) {
    install();
    fake::file(TEACHER).vocab.ends.clear();
    Decoded d;
    adl_row rows[3];
    adl_pair_touch(d.pair);
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, ONES, ZEROS, rows), ADL_ERROR_PROXY);
    CHECK(std::all_of(d.logits.begin(), d.logits.end(), [&](float z) { return z == d.logits[0]; }));
}

TEST(an_end_beyond_the_proxys_vocabulary_counts) {
    install();
    fake::file(TEACHER).vocab.ends = {N_TEACHER - 1};
    Decoded d;
    adl_row rows[3];
    adl_pair_touch(d.pair);
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, ONES, ZEROS, rows), ADL_ERROR_PROXY);
    CHECK_EQ(d.row(1)[N_TEACHER - 1], 0.0f);
    CHECK(d.row(1)[EOS] < -1e6f);
}

TEST(a_pair_without_a_teacher_adjusts_nothing) {
    install();
    const adl_llama llama = fake_llama_table();
    adl_pair *      pair  = adl_pair_init_from_files(&llama, PLUS, MINUS, EPSILON, DELTA_SCALE, nullptr, params());
    Batch           batch({1, 2});
    CHECK_EQ(adl_pair_decode(pair, batch.get()), 1);
    std::vector<float> logits(N_TEACHER, 1.5f);
    adl_row            row;
    CHECK_EQ(adl_pair_adjust(pair, logits.data(), 1, ONES, ZEROS, &row), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "teacher");
    CHECK(std::all_of(logits.begin(), logits.end(), [](float z) { return z == 1.5f; }));
    CHECK(std::isfinite(adl_pair_dose(pair, 0, 5)));
    adl_pair_free(pair);
}

//
// Dose
//

// Δ(token) − E[Δ], of the toys' own logits.
double dose(const Tokens & history, llama_token token) {
    const std::vector<float> plus = fake::logits(PLUS, history), minus = fake::logits(MINUS, history);
    double total = 0, mean = 0;
    for (int32_t t = 0; t < N_PROXY; ++t) {
        const double p = std::exp((static_cast<double>(plus[t]) + minus[t]) / 2);
        total += p;
        mean += p * (static_cast<double>(plus[t]) - minus[t]) / (2 * EPSILON);
    }
    return (static_cast<double>(plus[token]) - minus[token]) / (2 * EPSILON) - mean / total;
}

void check_doses(Decoded & d) {
    for (int32_t i = 0; i < 3; ++i) {
        for (llama_token token = 0; token < N_PROXY; ++token) {
            CHECK_NEAR(adl_pair_dose(d.pair, i, token), dose(d.histories[i], token), 1e-5);
        }
        for (const llama_token token : {N_PROXY, N_TEACHER - 1, INT32_MAX}) {
            CHECK_EQ(adl_pair_dose(d.pair, i, token), 0.0);
        }
        CHECK(std::isnan(adl_pair_dose(d.pair, i, -1)));
    }
    for (const int32_t row : {-1, 3, INT32_MAX, INT32_MIN}) {
        CHECK(std::isnan(adl_pair_dose(d.pair, row, 5)));
    }
}

TEST(the_dose_of_rows_that_were_not_adjusted) {
    install();
    Decoded d;
    check_doses(d);
}

TEST(the_dose_of_adjusted_rows) {
    install();
    Decoded      d;
    const double strength[] = {1, 0, 3};
    adl_row      rows[3];
    CHECK_EQ(adl_pair_adjust(d.pair, d.logits.data(), 3, strength, GUARDS, rows), ADL_OK);
    check_doses(d);
}

TEST(the_dose_of_a_broken_row_is_no_number) {
    install();
    fake::file(PLUS).faults.logits[40] = NOT_A_NUMBER;
    Decoded d;
    CHECK(std::isnan(adl_pair_dose(d.pair, 0, 5)));
    CHECK(std::isnan(adl_pair_dose(d.pair, 0, 40)));
}

} // namespace

MAIN
