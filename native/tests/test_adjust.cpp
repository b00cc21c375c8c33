// adl_adjust against float64, written here from the equation and not from the code.

#include "adlocal.h"
#include "check.hpp"

#include <algorithm>
#include <array>
#include <cfloat>
#include <limits>
#include <random>
#include <thread>

namespace {

constexpr float  INF = std::numeric_limits<float>::infinity();
constexpr float  NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();
constexpr double TOLERANCE = 1e-5; // of mean and KL

struct Case {
    std::vector<float> logits, plus, minus;
    int32_t            n_shared;
    std::vector<llama_token> ends = {};
    double             epsilon = 0.01, lam = 1.0, guard = 0.05;
};

struct Expected {
    std::vector<double> logits;
    std::vector<double> shift;      // 0 for those that are no candidates
    double              c = 0;      // of it, what keeps the candidates' mass
    double              scale = 0;  // what the rounding of a shift is relative to: λ times the largest |Δ| of a candidate
    double              mean = 0, kl = 0;
    int32_t             n_candidates = 0;
};

Case random_case(uint64_t seed, int32_t n_vocab, int32_t n_proxy, int32_t n_shared) {
    std::mt19937_64                 generator(seed);
    std::normal_distribution<float> normal(0, 1);
    Case c;
    c.n_shared = n_shared;
    for (int32_t i = 0; i < n_vocab; ++i) {
        c.logits.push_back(3 * normal(generator));
    }
    for (int32_t i = 0; i < n_proxy; ++i) {
        const float middle = 3 * normal(generator);
        const float half   = 0.01f * normal(generator);
        c.plus.push_back(middle + half);
        c.minus.push_back(middle - half);
    }
    return c;
}

double log_sum_exp(const std::vector<double> & z) {
    const double top = *std::max_element(z.begin(), z.end());
    double       sum = 0;
    for (const double x : z) {
        sum += std::exp(x - top);
    }
    return top + std::log(sum);
}

// KL(softmax(q) ‖ softmax(p)), where 0 log 0 = 0.
double kl_divergence(const std::vector<double> & q, const std::vector<double> & p) {
    const double zq = log_sum_exp(q), zp = log_sum_exp(p);
    double       kl = 0;
    for (size_t i = 0; i < q.size(); ++i) {
        const double share = std::exp(q[i] - zq);
        kl += share > 0 ? share * ((q[i] - zq) - (p[i] - zp)) : 0;
    }
    return kl;
}

// E[Δ] under softmax((z₊ + z₋) / 2).
double expected_delta(const Case & c) {
    std::vector<double> middle;
    for (size_t i = 0; i < c.plus.size(); ++i) {
        middle.push_back((static_cast<double>(c.plus[i]) + c.minus[i]) / 2);
    }
    const double z    = log_sum_exp(middle);
    double       mean = 0;
    for (size_t i = 0; i < middle.size(); ++i) {
        const double p = std::exp(middle[i] - z);
        mean += p > 0 ? p * (static_cast<double>(c.plus[i]) - c.minus[i]) / (2 * c.epsilon) : 0;
    }
    return mean;
}

Expected expected(const Case & c) {
    Expected             e;
    const double         top   = *std::max_element(c.logits.begin(), c.logits.end());
    const double         floor = c.guard > 0 ? top + std::log(c.guard) : -DBL_MAX;
    std::vector<int32_t> candidates;
    std::vector<double>  kept, tilted;
    double               largest = 0;
    for (int32_t i = 0; i < c.n_shared; ++i) {
        if (c.logits[i] >= floor && std::find(c.ends.begin(), c.ends.end(), i) == c.ends.end()) {
            const double delta = (static_cast<double>(c.plus[i]) - c.minus[i]) / (2 * c.epsilon);
            candidates.push_back(i);
            kept.push_back(c.logits[i]);
            tilted.push_back(c.logits[i] + c.lam * delta);
            largest = std::max(largest, std::fabs(delta));
        }
    }
    const std::vector<double> before(c.logits.begin(), c.logits.end());
    e.logits       = before;
    e.shift        = std::vector<double>(before.size(), 0.0);
    e.n_candidates = static_cast<int32_t>(candidates.size());
    e.scale        = std::fabs(c.lam) * largest;
    e.c            = candidates.size() > 1 ? log_sum_exp(kept) - log_sum_exp(tilted) : 0;
    for (size_t k = 0; k < candidates.size() && candidates.size() > 1; ++k) {
        e.shift[candidates[k]]  = (tilted[k] - kept[k]) + e.c;
        e.logits[candidates[k]] = tilted[k] + e.c;
    }
    e.kl   = kl_divergence(e.logits, before);
    e.mean = expected_delta(c);
    return e;
}

int32_t call(const Case & c, std::vector<float> & logits, adl_row & row) {
    logits = c.logits;
    return adl_adjust(logits.data(), static_cast<int32_t>(logits.size()), c.plus.data(), c.minus.data(),
                      static_cast<int32_t>(c.plus.size()), c.n_shared, c.ends.data(), c.ends.size(), c.epsilon, c.lam, c.guard, &row);
}

bool same_bits(const std::vector<float> & a, const std::vector<float> & b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_logits(const std::vector<float> & logits, const Case & c, const Expected & e) {
    int n_wrong = 0, n_touched = 0;
    for (size_t i = 0; i < logits.size(); ++i) {
        if (c.logits[i] == -INF) {
            n_wrong += logits[i] != -INF;
        } else {
            const double size = std::fabs(c.logits[i]) + std::fabs(e.shift[i]) + (e.shift[i] != 0 ? e.scale : 0);
            const double sums = e.shift[i] != 0 ? 1e-6 : 0; // c comes from sums of floats
            n_wrong += !(std::fabs(logits[i] - e.logits[i]) <= 1e-6 * size + sums + 1e-30);
        }
        n_touched += e.shift[i] == 0 && std::memcmp(&logits[i], &c.logits[i], sizeof(float)) != 0;
    }
    CHECK_EQ(n_wrong, 0);
    CHECK_EQ(n_touched, 0); // what is no candidate keeps its bits
}

// Checks one case against float64. Returns KL.
double check_case(const Case & c) {
    const Expected     e = expected(c);
    std::vector<float> logits;
    adl_row            row = {-1, -1, -1};
    CHECK_EQ(call(c, logits, row), ADL_OK);
    check_logits(logits, c, e);
    CHECK_EQ(row.n_candidates, e.n_candidates);
    CHECK_NEAR(row.mean, e.mean, TOLERANCE * (1 + std::fabs(e.mean)));
    CHECK(row.kl >= 0);
    CHECK_NEAR(row.kl, e.kl, TOLERANCE * (1 + e.kl));
    return row.kl;
}

void check_fails(const Case & c, int32_t status, const char * words) {
    std::vector<float> logits;
    adl_row            row = {1.25, 2.5, 37};
    CHECK_EQ(call(c, logits, row), status);
    CHECK_CONTAINS(adl_last_error(), words);
    CHECK(same_bits(logits, c.logits));
    CHECK(row.mean == 1.25 && row.kl == 2.5 && row.n_candidates == 37);
}

constexpr double GUARDS[] = {0, 1e-300, 1e-3, 0.05, 0.5, 1};

TEST(every_size) {
    uint64_t seed = 0;
    for (const int32_t n : {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 255, 511, 512, 513, 527, 528, 1023, 1024, 1025, 4097, 32000, 65537}) {
        for (const double guard : GUARDS) {
            for (const double lam : {1.0, -0.7, 8.0}) {
                Case c  = random_case(++seed, n, n, n);
                c.guard = guard;
                c.lam   = lam;
                check_case(c);
            }
        }
    }
}

TEST(the_sizes_of_real_vocabularies) {
    uint64_t seed = 1000;
    for (const int32_t n : {128256, 151936, 152064, 256000, 262144, 262145, 300007}) { // blocks grow beyond 512² tokens
        for (const double guard : {0.0, 0.05}) {
            Case c  = random_case(++seed, n, n, n);
            c.guard = guard;
            check_case(c);
        }
    }
}

TEST(padded_vocabularies) {
    uint64_t seed = 2000;
    for (const auto & [n_vocab, n_proxy, n_shared] : {std::array<int32_t, 3>{600, 500, 500}, {500, 600, 500}, {600, 600, 37}, {1025, 1030, 1023},
                                                      {513, 1, 1}, {1, 513, 1}, {1040, 1025, 512}, {152064, 151936, 151936}}) {
        for (const double guard : GUARDS) {
            Case c  = random_case(++seed, n_vocab, n_proxy, n_shared);
            c.guard = guard;
            check_case(c);
            c.logits.back() = 30; // the top may be a padded token: then few others are plausible
            check_case(c);
        }
    }
}

TEST(no_candidate_among_the_shared) {
    Case c          = random_case(3, 300, 200, 200);
    c.guard         = 1;
    c.logits.back() = 40;
    std::vector<float> logits;
    adl_row            row;
    CHECK_EQ(call(c, logits, row), ADL_OK);
    CHECK_EQ(row.n_candidates, 0);
    CHECK_EQ(row.kl, 0.0);
    CHECK(same_bits(logits, c.logits));
    std::fill_n(c.logits.begin(), 200, -INF); // nor with any guard, if all of them are ruled out
    for (const double guard : GUARDS) {
        c.guard = guard;
        check_case(c);
    }
}

TEST(the_teacher_may_rule_tokens_out) {
    for (uint64_t seed = 4000; seed < 4040; ++seed) {
        Case c = random_case(seed, 700, 650, 640);
        std::mt19937_64 generator(seed);
        for (float & z : c.logits) {
            z = generator() % 3 ? z : -INF;
        }
        c.guard = GUARDS[seed % 6];
        check_case(c);
    }
}

TEST(one_plausible_token_does_not_move) {
    Case c       = random_case(5, 600, 600, 600);
    c.logits[77] = 50;
    check_case(c);
    std::vector<float> logits;
    adl_row            row;
    call(c, logits, row);
    CHECK_EQ(row.n_candidates, 1);
    CHECK_NEAR(row.kl, 0.0, 1e-12);
    CHECK(same_bits(logits, c.logits));
}

TEST(ties_at_the_top_are_all_plausible) {
    Case c  = random_case(6, 600, 600, 600);
    c.guard = 1;
    for (const int32_t i : {0, 15, 16, 511, 512, 599}) {
        c.logits[i] = 20.25f;
    }
    check_case(c);
    std::vector<float> logits;
    adl_row            row;
    call(c, logits, row);
    CHECK_EQ(row.n_candidates, 6);
}

// The probability of a token, in float64.
double probability(const std::vector<float> & logits, size_t i) {
    return std::exp(logits[i] - log_sum_exp(std::vector<double>(logits.begin(), logits.end())));
}

TEST(ends_of_generation_keep_their_logits_and_their_probability) {
    uint64_t seed = 5000;
    for (const int32_t n : {4, 40, 511, 513, 1025, 5000}) {
        for (const double guard : GUARDS) {
            Case c            = random_case(++seed, n + 3, n, n);
            c.guard           = guard;
            c.ends            = {n / 2, 0, n + 1, n - 1, n / 2};
            c.logits[n / 2]   = 9; // a plausible one; the last is beyond the shared, and so is
            c.logits[n + 1]   = 8.5f;
            c.logits[n / 3]   = 9.5f;
            c.logits[n / 3 + 1] = 9.25f;
            c.plus[n / 2]     = -INF; // nobody asks for its Δ
            const Expected e  = expected(c);
            const double  most = *std::max_element(e.logits.begin(), e.logits.begin() + n / 2);
            std::vector<float> logits;
            adl_row            row;
            CHECK_EQ(call(c, logits, row), ADL_OK);
            CHECK_EQ(row.n_candidates, e.n_candidates);
            for (const size_t end : {n / 2, 0, n + 1, n - 1}) {
                CHECK_EQ(logits[end], c.logits[end]);
                CHECK_NEAR(probability(logits, end) / probability(c.logits, end), 1.0, 1e-5);
            }
            if (most > 9 || guard == 1) {
                check_logits(logits, c, e);
                CHECK_NEAR(row.kl, e.kl, TOLERANCE * (1 + e.kl));
            }
        }
    }
}

TEST(the_guard_asks_for_a_share_of_an_end_that_is_the_top) {
    Case c = random_case(30, 600, 600, 600);
    std::fill(c.logits.begin(), c.logits.end(), -1.0f);
    c.logits[3] = 5;
    c.logits[4] = 3;
    c.logits[5] = 1.9f; // less than 0.05 of the end's
    c.ends      = {3};
    std::vector<float> logits;
    adl_row            row;
    CHECK_EQ(call(c, logits, row), ADL_OK);
    CHECK_EQ(row.n_candidates, 1);
    CHECK_EQ(row.kl, 0.0);
    CHECK(same_bits(logits, c.logits));
    c.ends = {3, 4};
    CHECK_EQ(call(c, logits, row), ADL_OK);
    CHECK_EQ(row.n_candidates, 0);
    CHECK(same_bits(logits, c.logits));
}

// One candidate at 0 and eleven at −2 that λ = 1 evens out, and an end.
Case evened_out(float end) {
    Case c = random_case(31, 1300, 1290, 1290);
    std::fill(c.logits.begin(), c.logits.end(), -20.0f);
    c.minus = c.plus;
    for (int k = 0; k < 12; ++k) {
        c.logits[100 * k + 7] = k == 0 ? 0.0f : -2.0f;
        c.plus[100 * k + 7]   = k == 0 ? 1.0f : k == 5 ? 1.045f : 1.04f; // in steps of ε: 0, 2 and 2.25
        c.minus[100 * k + 7]  = 1.0f;
    }
    c.logits[600] = end;
    c.ends        = {600};
    return c;
}

TEST(greedy_decoding_ends_only_where_the_teacher_would) {
    for (const double guard : {0.0, 0.05}) {
        for (const float end : {-1e-7f, -0.3f, -0.9f}) {
            Case c  = evened_out(end);
            c.guard = guard;
            std::vector<float> logits;
            adl_row            row;
            CHECK_EQ(call(c, logits, row), ADL_OK);
            CHECK_EQ(logits[600], end);
            CHECK_EQ(logits[507], std::nextafter(end, INF));
            CHECK_EQ(*std::max_element(logits.begin(), logits.end()), logits[507]);
            CHECK_NEAR(probability(logits, 600) / probability(c.logits, 600), 1.0, 1e-5);
            CHECK_NEAR(logits[107] - logits[307], 0.0, 1e-5); // the others all paid the same
            CHECK_NEAR(logits[107] - logits[7], 0.0, 1e-4);
            const std::vector<double> q(logits.begin(), logits.end()), p(c.logits.begin(), c.logits.end());
            CHECK_NEAR(row.kl, kl_divergence(q, p), TOLERANCE);
        }
    }
}

TEST(nothing_is_raised_where_no_end_takes_over) {
    const auto check = [](const Case & c) {
        std::vector<float> logits;
        adl_row            row;
        CHECK_EQ(call(c, logits, row), ADL_OK);
        check_logits(logits, c, expected(c));
        return logits[507];
    };
    CHECK(check(evened_out(0.0f)) < 0.0f);  // a tie at the top: the end is the teacher's choice
    CHECK(check(evened_out(0.5f)) < 0.5f);
    CHECK(check(evened_out(-5.0f)) > -5.0f);
    Case c             = evened_out(-0.3f);
    c.logits.back()    = -0.2f; // beyond the shared: never lifted, and above the end
    CHECK(check(c) < -0.3f);
    c.logits.back() = -0.3f;
    std::vector<float> logits;
    adl_row            row;
    CHECK_EQ(call(c, logits, row), ADL_OK);
    CHECK_EQ(logits[507], std::nextafter(-0.3f, INF));
}

TEST(the_raise_is_exact_at_any_strength) {
    for (const double lam : {1e-3, 1.0, 1e4, 1e9}) {
        Case c = evened_out(-0.3f);
        c.lam  = lam;
        for (int k = 0; k < 12; ++k) {
            const bool far      = k == 9 && lam > 1;
            c.plus[100 * k + 7] = k == 0 ? 0.0f : static_cast<float>(0.04 / lam);
            c.minus[100 * k + 7] = far ? 1.0f : 0.0f;
        }
        std::vector<float> logits;
        adl_row            row;
        CHECK_EQ(call(c, logits, row), ADL_OK);
        CHECK_EQ(*std::max_element(logits.begin(), logits.end()), std::nextafter(-0.3f, INF));
        CHECK(std::isfinite(row.kl) && row.kl > 0);
    }
}

TEST(next_to_nothing_may_be_left_to_pay_with) {
    Case c   = random_case(32, 3, 3, 3);
    c.logits = {0, -50, std::nextafter(0.0f, -1.0f)};
    c.plus   = {0, 1, 0};
    c.minus  = {0, 0, 0}; // Δ = 50
    c.ends   = {2};
    c.guard  = 0;
    std::vector<float> logits;
    adl_row            row;
    CHECK_EQ(call(c, logits, row), ADL_OK);
    CHECK_EQ(std::max(logits[0], logits[1]), 0.0f);
    CHECK(std::isfinite(logits[0]) && std::isfinite(logits[1]) && std::isfinite(row.kl));
}

TEST(an_end_that_is_no_number_is_refused_and_stays) {
    for (const float value : {NOT_A_NUMBER, INF}) {
        for (const llama_token end : {5, 605}) {
            Case c        = random_case(33, 610, 600, 600);
            c.logits[end] = value;
            c.ends        = {3, end, 3, end};
            check_fails(c, ADL_ERROR_PROXY, "teacher");
        }
    }
    Case c        = random_case(34, 600, 600, 600);
    c.logits[100] = 30;
    c.plus[100]   = INF; // not even an end's
    c.ends        = {3, 7};
    check_fails(c, ADL_ERROR_PROXY, "not");
    c.plus[100] = NOT_A_NUMBER;
    check_fails(c, ADL_ERROR_PROXY, "not");
}

// Which floats beside top + log(guard) pass is told in float64: that of the two nearest which is not below it, and up.
TEST(the_guard_is_exact_to_a_float) {
    for (int k = 1; k < 400; ++k) {
        Case c  = random_case(24, 40, 40, 40);
        c.guard = k / 401.0;
        std::fill(c.logits.begin(), c.logits.end(), -50.0f);
        c.logits[0]       = 10.0f + static_cast<float>(k) / 7;
        const float floor = static_cast<float>(c.logits[0] + std::log(c.guard));
        c.logits[1]       = std::nextafter(floor, -INF);
        c.logits[2]       = floor;
        c.logits[3]       = std::nextafter(floor, INF);
        std::vector<float> logits;
        adl_row            row;
        CHECK_EQ(call(c, logits, row), ADL_OK);
        CHECK_EQ(row.n_candidates, expected(c).n_candidates);
    }
}

TEST(a_row_of_one_value) {
    Case c = random_case(7, 1000, 1000, 1000);
    std::fill(c.logits.begin(), c.logits.end(), -3.5f);
    for (const double guard : GUARDS) {
        c.guard = guard;
        check_case(c);
    }
}

TEST(equal_proxies_change_nothing) {
    Case c  = random_case(8, 600, 600, 600);
    c.minus = c.plus;
    CHECK_NEAR(check_case(c), 0.0, 1e-6);
}

TEST(a_constant_in_delta_cancels) {
    Case c = random_case(9, 600, 600, 600);
    std::vector<float> a, b;
    adl_row            row;
    CHECK_EQ(call(c, a, row), ADL_OK);
    for (float & z : c.plus) {
        z += 0.5f;
    }
    CHECK_EQ(call(c, b, row), ADL_OK);
    for (size_t i = 0; i < a.size(); ++i) {
        CHECK_NEAR(a[i], b[i], 1e-3); // a shift of Δ by 25, in logits that are floats
    }
}

TEST(lambda_zero_keeps_every_bit) {
    Case c      = random_case(10, 600, 590, 580);
    c.lam       = 0;
    c.logits[1] = FLT_MIN / 2;
    c.logits[2] = -INF;
    c.logits[3] = -FLT_MAX;
    std::fill_n(c.logits.begin() + 100, 300, -0.0f); // adding 0 would lose the sign of some
    for (const double guard : GUARDS) {
        c.guard = guard;
        std::vector<float> logits;
        adl_row            row;
        CHECK_EQ(call(c, logits, row), ADL_OK);
        CHECK(same_bits(logits, c.logits));
        CHECK_EQ(row.kl, 0.0);
        CHECK_EQ(row.n_candidates, expected(c).n_candidates);
        CHECK_NEAR(row.mean, expected(c).mean, TOLERANCE);
    }
}

TEST(a_strong_lambda_is_right_too) {
    for (const double lam : {100.0, 1e4, -1e4, 1e6}) { // at 1e6 a float logit is to 0.06
        Case c  = random_case(11, 600, 600, 600);
        c.lam   = lam;
        const Expected     e = expected(c);
        std::vector<float> logits;
        adl_row            row;
        CHECK_EQ(call(c, logits, row), ADL_OK);
        check_logits(logits, c, e);
        CHECK_NEAR(row.kl, e.kl, TOLERANCE * (1 + e.kl));
    }
}

TEST(a_lambda_beyond_float_is_refused) {
    for (const double lam : {1e39, 1e300, -1e39, 1e308}) {
        for (const double guard : {0.0, 0.05}) {
            Case c  = random_case(12, 600, 600, 600);
            c.lam   = lam;
            c.guard = guard;
            check_fails(c, ADL_ERROR_PROXY, "strength");
        }
    }
}

TEST(a_broken_teacher_is_refused) {
    for (const size_t at : {0, 15, 16, 511, 512, 599, 605}) { // the last is beyond the shared
        for (const float value : {NOT_A_NUMBER, INF}) {
            for (const double lam : {0.0, 1.0}) {
                Case c       = random_case(13, 610, 600, 600);
                c.lam        = lam;
                c.logits[at] = value;
                for (const double guard : GUARDS) {
                    c.guard = guard;
                    check_fails(c, ADL_ERROR_PROXY, "teacher");
                }
            }
        }
    }
    Case c = random_case(14, 610, 600, 600);
    std::fill(c.logits.begin(), c.logits.end(), -INF);
    check_fails(c, ADL_ERROR_PROXY, "teacher");
    std::fill(c.logits.begin(), c.logits.end(), NOT_A_NUMBER);
    check_fails(c, ADL_ERROR_PROXY, "teacher");
}

// Token 100 is a candidate with any guard, 101 with none but 0; 605 is beyond the shared.
Case with_outlier(size_t at, float plus, float minus) {
    Case c        = random_case(15, 600, 610, 600);
    c.logits[100] = 30;
    c.logits[101] = -30;
    c.logits[102] = 29.5f;
    c.plus[at]    = plus;
    c.minus[at]   = minus;
    return c;
}

TEST(a_broken_proxy_is_refused_wherever_it_breaks) {
    for (const size_t at : {100, 101, 605}) {
        for (const auto & [plus, minus] : {std::pair<float, float>{NOT_A_NUMBER, 1}, {1, NOT_A_NUMBER}, {NOT_A_NUMBER, NOT_A_NUMBER},
                                           {INF, 1}, {1, INF}, {INF, INF}, {INF, -INF}, {-INF, INF}, {NOT_A_NUMBER, -INF}}) {
            check_fails(with_outlier(at, plus, minus), ADL_ERROR_PROXY, "not");
        }
    }
    for (const auto & [plus, minus] : {std::pair<float, float>{-INF, 1}, {1, -INF}, {-INF, -INF}}) {
        check_fails(with_outlier(100, plus, minus), ADL_ERROR_PROXY, "token 100");
    }
    check_fails(with_outlier(100, 3e38f, -3e38f), ADL_ERROR_PROXY, "not"); // a difference beyond float
    Case c = random_case(16, 600, 600, 600);
    std::fill(c.plus.begin(), c.plus.end(), -INF);
    std::fill(c.minus.begin(), c.minus.end(), -INF);
    check_fails(c, ADL_ERROR_PROXY, "not");
}

TEST(a_proxy_may_rule_out_what_is_no_candidate) {
    for (const size_t at : {101, 605}) {
        check_case(with_outlier(at, -INF, -INF));
    }
    Case c  = with_outlier(101, -INF, -INF); // but with guard 0 it is a candidate
    c.guard = 0;
    check_fails(c, ADL_ERROR_PROXY, "token 101");
}

// One half alone may say that: the token has no weight, and its Δ is not asked for.
TEST(one_half_that_rules_a_token_out_leaves_finite_numbers) {
    for (const size_t at : {101, 605}) {
        for (const auto & [plus, minus] : {std::pair<float, float>{-INF, 1}, {1, -INF}}) {
            std::vector<float> logits;
            adl_row            row;
            CHECK_EQ(call(with_outlier(at, plus, minus), logits, row), ADL_OK);
            CHECK(std::isfinite(row.mean) && std::isfinite(row.kl));
            CHECK(std::all_of(logits.begin(), logits.end(), [](float z) { return std::isfinite(z); }));
        }
    }
}

TEST(an_epsilon_that_is_no_float_is_refused) {
    Case c    = random_case(17, 600, 600, 600);
    c.epsilon = 1e-60; // Δ would be infinite
    check_fails(c, ADL_ERROR_PROXY, "not");
}

TEST(pointers_are_checked) {
    Case    c = random_case(18, 40, 40, 40);
    adl_row row;
    float * z = c.logits.data();
    CHECK_EQ(adl_adjust(nullptr, 40, c.plus.data(), c.minus.data(), 40, 40, nullptr, 0, 1, 1, 0, &row), ADL_ERROR_INPUT);
    CHECK_EQ(adl_adjust(z, 40, nullptr, c.minus.data(), 40, 40, nullptr, 0, 1, 1, 0, &row), ADL_ERROR_INPUT);
    CHECK_EQ(adl_adjust(z, 40, c.plus.data(), nullptr, 40, 40, nullptr, 0, 1, 1, 0, &row), ADL_ERROR_INPUT);
    CHECK_EQ(adl_adjust(z, 40, c.plus.data(), c.minus.data(), 40, 40, nullptr, 0, 1, 1, 0, nullptr), ADL_ERROR_INPUT);
    CHECK_EQ(adl_adjust(z, 40, c.plus.data(), c.minus.data(), 40, 40, nullptr, 1, 1, 1, 0, &row), ADL_ERROR_INPUT);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
}

TEST(numbers_are_checked) {
    const double nan = NOT_A_NUMBER, inf = INF;
    for (const int32_t n_shared : {0, -1, INT32_MIN, 41, 101}) {
        Case c     = random_case(19, 100, 40, 40);
        c.n_shared = n_shared;
        check_fails(c, ADL_ERROR_INPUT, "n_shared=");
        std::swap(c.plus, c.logits);
        c.minus = c.plus;
        check_fails(c, ADL_ERROR_INPUT, "n_shared=");
    }
    for (const llama_token end : {-1, 40, INT32_MAX, INT32_MIN}) {
        Case c = random_case(20, 40, 40, 40);
        c.ends = {39, end};
        check_fails(c, ADL_ERROR_INPUT, "ends: ");
    }
    for (const double epsilon : {0.0, -0.01, nan, inf, -inf}) {
        Case c    = random_case(20, 40, 40, 40);
        c.epsilon = epsilon;
        check_fails(c, ADL_ERROR_INPUT, "epsilon=");
    }
    for (const double lam : {nan, inf, -inf}) {
        Case c = random_case(21, 40, 40, 40);
        c.lam  = lam;
        check_fails(c, ADL_ERROR_INPUT, "lam=");
    }
    for (const double guard : {-1e-9, 1 + 1e-9, nan, inf, -inf}) {
        Case c  = random_case(22, 40, 40, 40);
        c.guard = guard;
        check_fails(c, ADL_ERROR_INPUT, "guard=");
    }
}

TEST(threads_do_not_disturb_each_other) {
    const Case c = random_case(23, 20000, 20000, 20000);
    std::vector<float> alone;
    adl_row            row;
    CHECK_EQ(call(c, alone, row), ADL_OK);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < 10; ++i) {
                std::vector<float> logits;
                adl_row            mine;
                CHECK_EQ(call(c, logits, mine), ADL_OK);
                CHECK(same_bits(logits, alone));
                CHECK_EQ(mine.kl, row.kl);
            }
        });
    }
    for (std::thread & thread : threads) {
        thread.join();
    }
}

} // namespace

MAIN
