// The pair as a llama_sampler, driven as a chain drives it: apply, accept, clone, reset, free.

#include "check.hpp"
#include "models.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <random>

namespace {

using namespace models;

constexpr float  INF      = std::numeric_limits<float>::infinity();
constexpr double STRENGTH = 1.5, GUARD = 0.05;

// Clones the k-th sampler, with what a test keeps beside it, until there are six.
template <typename Beside>
void clone_one(std::vector<llama_sampler *> & samplers, std::vector<Beside> & beside, size_t k) {
    if (samplers.size() < 6) {
        samplers.push_back(llama_sampler_clone(samplers[k]));
        beside.push_back(Beside(beside[k]));
    }
}

struct Candidates {
    std::vector<llama_token_data> data;
    bool                          sorted = false; // as the sampler left it

    // The teacher's row after `tokens`, every id in order.
    explicit Candidates(const Tokens & tokens) {
        const std::vector<float> logits = fake::logits(TEACHER, tokens);
        for (llama_token id = 0; id < N_TEACHER; ++id) {
            data.push_back({id, logits[id], 0.0f});
        }
    }

    void apply(llama_sampler * smpl, bool was_sorted = false) {
        llama_token_data_array array = {data.data(), data.size(), -1, was_sorted};
        smpl->iface->apply(smpl, &array);
        CHECK(array.data == data.data());
        data.resize(array.size);
        sorted = array.sorted;
    }

    float & logit(llama_token id) {
        return std::find_if(data.begin(), data.end(), [&](const llama_token_data & d) { return d.id == id; })->logit;
    }

    std::vector<float> logits() const {
        std::vector<float> z;
        for (const llama_token_data & d : data) {
            z.push_back(d.logit);
        }
        return z;
    }

    void shuffle(uint64_t seed) { std::shuffle(data.begin(), data.end(), std::mt19937_64(seed)); }

    void sort_and_keep(size_t n) { // top_k
        std::sort(data.begin(), data.end(), [](const auto & a, const auto & b) { return a.logit > b.logit; });
        data.resize(n);
    }

    template <typename Predicate>
    void drop(Predicate && predicate) {
        data.erase(std::remove_if(data.begin(), data.end(), predicate), data.end());
    }
};

bool is_end(const llama_token_data & d) {
    return d.id == EOS || d.id == EOT;
}

// What adl_adjust makes of the candidates after `tokens`: those with a Δ first, as it wants them, then back in order.
adl_row expect(const Tokens & tokens, std::vector<llama_token_data> & data, double strength = STRENGTH, double guard = GUARD) {
    const std::vector<float> plus = fake::logits(PLUS, tokens), minus = fake::logits(MINUS, tokens);
    std::vector<float>       z, p, m;
    std::vector<size_t>      order;
    Tokens                   ends; // where they are in z
    for (const bool shared : {true, false}) {
        for (size_t i = 0; i < data.size(); ++i) {
            if ((data[i].id < N_PROXY) == shared) {
                order.push_back(i);
                if (is_end(data[i])) {
                    ends.push_back(static_cast<llama_token>(z.size()));
                }
                z.push_back(data[i].logit);
            }
            if (data[i].id < N_PROXY && shared) {
                p.push_back(plus[data[i].id]);
                m.push_back(minus[data[i].id]);
            }
        }
    }
    adl_row   row = {};
    const int n   = static_cast<int>(p.size());
    CHECK_EQ(adl_adjust(z.data(), static_cast<int>(z.size()), p.data(), m.data(), n, n, ends.data(), ends.size(), EPSILON,
                        strength / DELTA_SCALE, guard, &row), ADL_OK);
    for (size_t k = 0; k < order.size(); ++k) {
        data[order[k]].logit = z[k];
    }
    return row;
}

void check_same(const Candidates & given, const std::vector<llama_token_data> & expected) {
    CHECK_EQ(given.data.size(), expected.size());
    for (size_t i = 0; i < std::min(given.data.size(), expected.size()); ++i) {
        CHECK_EQ(given.data[i].id, expected[i].id);
        CHECK(given.data[i].logit == expected[i].logit || std::fabs(given.data[i].logit - expected[i].logit) < 2e-6f);
    }
}

// Applies the sampler to the full row after `tokens` and checks it.
void check_applied(llama_sampler * smpl, const Tokens & tokens) {
    Candidates given(tokens), before(tokens);
    given.apply(smpl);
    CHECK(adl_sampler_error(smpl) == nullptr);
    expect(tokens, before.data);
    check_same(given, before.data);
}

struct Fixture : Host {
    llama_sampler * smpl;
    explicit Fixture(const adl_pair_params & p = params()) : Host(p), smpl(adl_sampler_init(pair, STRENGTH, GUARD)) { CHECK(smpl != nullptr); }
    ~Fixture() { llama_sampler_free(smpl); }

    void prefix(const Tokens & tokens) { CHECK_EQ(adl_sampler_set_prefix(smpl, tokens.data(), tokens.size()), ADL_OK); }
    void accept(llama_token token) { smpl->iface->accept(smpl, token); }
};

//
// Applying
//

TEST(the_interface_is_whole) {
    install();
    Fixture f;
    const llama_sampler_i * i = f.smpl->iface;
    CHECK(i->accept && i->apply && i->reset && i->clone && i->free && i->name);
    CHECK_CONTAINS(i->name(f.smpl), "adlocal");
    CHECK(!i->backend_init && !i->backend_apply); // on a device logits would be sampled before they are adjusted
    CHECK(adl_sampler_error(f.smpl) == nullptr);
}

TEST(the_full_row) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    check_applied(f.smpl, {5, 6, 7});
}

TEST(candidates_are_told_by_their_id) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
        install();
        Fixture f;
        f.prefix({5, 6, 7});
        Candidates given({5, 6, 7});
        given.shuffle(seed);
        std::vector<llama_token_data> expected = given.data;
        given.apply(f.smpl);
        expect({5, 6, 7}, expected);
        check_same(given, expected);
    }
}

TEST(candidates_that_were_dropped_are_not_missed) {
    for (const size_t n : {1, 2, 10, 40}) {
        install();
        Fixture f;
        f.prefix({5, 6, 7});
        Candidates given({5, 6, 7});
        given.sort_and_keep(n);
        std::vector<llama_token_data> expected = given.data;
        given.apply(f.smpl, /* was_sorted = */ true);
        expect({5, 6, 7}, expected);
        check_same(given, expected);
        CHECK_EQ(given.sorted, n == 1); // where there was a choice, in another order
    }
}

// By id: wherever they lie, whatever was dropped, and beyond the proxies' vocabulary too.
TEST(ends_stay_the_teachers) {
    for (const llama_token end : {EOT, N_TEACHER - 1}) {
        install();
        fake::file(TEACHER).vocab.ends = {end};
        Fixture f;
        f.prefix({5, 6, 7});
        Candidates given({5, 6, 7});
        given.logit(end) = 9;
        given.logit(30)  = 8.75f;
        given.logit(31)  = 8.5f;
        given.shuffle(3);
        given.drop([&](const llama_token_data & d) { return d.id != end && d.id != 30 && d.id != 31 && d.id < 40; });
        const std::vector<llama_token_data> before = given.data;
        given.apply(f.smpl);
        CHECK_EQ(given.logit(end), 9.0f);
        CHECK(given.logit(30) != 8.75f && given.logit(31) != 8.5f);
        double mass_before = 0, mass = 0;
        for (size_t i = 0; i < before.size(); ++i) {
            mass_before += std::exp(before[i].logit);
            mass += std::exp(given.data[i].logit);
        }
        CHECK_NEAR(mass / mass_before, 1.0, 1e-5);
        f.accept(30);
        CHECK_EQ(adl_sampler_get_dose(f.smpl).n_steerable, 1);
    }
}

// What one application knew of the ends is not the next one's.
TEST(ends_lie_elsewhere_the_next_time) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    for (const uint64_t seed : {1, 2, 3}) {
        Candidates given({5, 6, 7});
        given.shuffle(seed);
        std::vector<llama_token_data> expected = given.data;
        given.apply(f.smpl);
        expect({5, 6, 7}, expected);
        check_same(given, expected);
    }
}

TEST(candidates_that_a_grammar_ruled_out_stay_so) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    Candidates given({5, 6, 7});
    for (llama_token_data & d : given.data) {
        d.logit = d.id % 3 ? d.logit : -INF;
    }
    std::vector<llama_token_data> expected = given.data;
    given.apply(f.smpl);
    expect({5, 6, 7}, expected);
    check_same(given, expected);
    CHECK_EQ(given.logit(30), -INF);
}

TEST(padded_tokens_alone_are_not_lifted) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    Candidates given({5, 6, 7});
    given.drop([](const llama_token_data & d) { return d.id < N_PROXY; });
    const std::vector<float> before = given.logits();
    given.apply(f.smpl);
    CHECK(adl_sampler_error(f.smpl) == nullptr);
    CHECK(given.logits() == before);
}

TEST(no_candidates_are_no_failure) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    llama_token_data_array none = {nullptr, 0, -1, false};
    f.smpl->iface->apply(f.smpl, &none);
    CHECK_EQ(none.size, size_t{0});
    check_applied(f.smpl, {5, 6, 7});
}

TEST(strength_0_leaves_every_bit) {
    install();
    Host            host;
    llama_sampler * smpl = adl_sampler_init(host.pair, 0, GUARD);
    const Tokens    tokens = {5, 6};
    CHECK_EQ(adl_sampler_set_prefix(smpl, tokens.data(), tokens.size()), ADL_OK);
    Candidates given(tokens);
    given.apply(smpl, true);
    CHECK(given.logits() == fake::logits(TEACHER, tokens));
    CHECK(given.sorted);
    smpl->iface->accept(smpl, 7);
    const adl_dose dose = adl_sampler_get_dose(smpl);
    CHECK_EQ(dose.n_dosed, 1); // it is measured, where there was a choice
    CHECK(dose.total != 0 && dose.kl == 0);
    llama_sampler_free(smpl);
}

//
// Rows without a choice
//

// Leaves at most one candidate that passes the guard, in each of the ways there are.
using Narrow = void (*)(Candidates &);
const std::vector<Narrow> NARROW = {
    [](Candidates & c) { c.logit(40) = 60; },
    [](Candidates & c) { c.sort_and_keep(1); },
    [](Candidates & c) { c.logit(EOS) = 60; },                    // an end is no candidate
    [](Candidates & c) { c.logit(EOS) = 60, c.logit(40) = 60; },
    [](Candidates & c) { c.logit(N_PROXY) = 60, c.logit(N_PROXY + 1) = 60; }, // nor what the proxies do not know
    [](Candidates & c) { c.drop([](const llama_token_data & d) { return d.id < N_PROXY; }); },
    [](Candidates & c) { // a grammar
        for (llama_token_data & d : c.data) {
            d.logit = d.id == 33 ? d.logit : -INF;
        }
    },
};

TEST(a_row_without_a_choice_stays_and_evaluates_nothing) {
    for (const Narrow narrow : NARROW) {
        for (const bool sorted : {false, true}) {
            install();
            Fixture f;
            f.prefix({5, 6, 7});
            Candidates given({5, 6, 7});
            narrow(given);
            const auto before = given.data;
            given.apply(f.smpl, sorted);
            CHECK(given.data.size() == before.size() && std::memcmp(given.data.data(), before.data(), before.size() * sizeof before[0]) == 0);
            CHECK_EQ(given.sorted, sorted);
            CHECK_EQ(fake::counts().decodes, 0);
            CHECK(adl_sampler_error(f.smpl) == nullptr);
        }
    }
}

TEST(tokens_wait_for_a_choice_and_are_decoded_together) { // the last of the prompt with them; the pair's batches are of 32
    const std::vector<std::pair<size_t, const char *>> cases = {
        {1, "1 2"}, {5, "1 6"}, {29, "1 30"}, {30, "1 31"}, {31, "1 31 1"}, {100, "1 31 32 32 6"}};
    for (const auto & [n, sizes] : cases) {
        install();
        Fixture f;
        Tokens  tokens = {5, 6};
        f.prefix(tokens);
        for (size_t i = 0; i < n; ++i) {
            Candidates given(tokens);
            given.logit(40) = 60;
            given.apply(f.smpl);
            f.accept(static_cast<llama_token>(3 + i % 50));
            tokens.push_back(static_cast<llama_token>(3 + i % 50));
        }
        CHECK_EQ(fake::counts().decodes, 0);
        check_applied(f.smpl, tokens);
        CHECK_EQ(batches(f.pair), sizes);
    }
}

TEST(a_position_that_comes_to_have_a_choice_is_evaluated_then) { // grammar resampling, either way round
    install();
    Fixture f;
    f.prefix({5, 6});
    for (int i = 0; i < 2; ++i) {
        Candidates given({5, 6});
        given.logit(40) = 60;
        given.apply(f.smpl);
        CHECK_EQ(given.logit(40), 60.0f);
        CHECK_EQ(batches(f.pair), i == 0 ? "" : "1 1");
        check_applied(f.smpl, {5, 6});
    }
    CHECK_EQ(batches(f.pair), "1 1");
}

// What a sampler should have counted, evaluating every position.
struct Eager {
    Tokens   text;
    adl_row  row   = {};    // of the last application
    double   mean  = 0;     // E[Δ]
    bool     dosed = false; // any at this position had a choice
    bool     applied = false;
    adl_dose dose  = {};

    void accept(llama_token token) {
        if (applied) {
            ++dose.n_tokens;
            dose.n_steerable += row.n_candidates > 1;
            dose.kl += row.kl;
        }
        if (dosed) {
            const float delta = fake::logits(PLUS, text)[token] - fake::logits(MINUS, text)[token];
            dose.total += static_cast<double>(delta / static_cast<float>(2 * EPSILON)) - mean;
            ++dose.n_dosed;
        }
        text.push_back(token);
        applied = dosed = false;
    }

    // Applies `smpl` to what `narrow` leaves of the row, and checks it.
    void apply(llama_sampler * smpl, double guard, const std::function<void(Candidates &)> & narrow) {
        Candidates given(text), expected(text), whole(text);
        narrow(given);
        narrow(expected);
        mean    = expect(text, whole.data).mean;
        row     = expect(text, expected.data, STRENGTH, guard);
        applied = true;
        dosed |= row.n_candidates > 1;
        given.apply(smpl);
        CHECK(adl_sampler_error(smpl) == nullptr);
        CHECK(given.logits() == expected.logits());
    }

    void check(llama_sampler * smpl) const {
        const adl_dose found = adl_sampler_get_dose(smpl);
        CHECK_EQ(found.n_tokens, dose.n_tokens);
        CHECK_EQ(found.n_steerable, dose.n_steerable);
        CHECK_EQ(found.n_dosed, dose.n_dosed);
        CHECK_EQ(found.total, dose.total);
        CHECK_EQ(found.kl, dose.kl);
    }
};

// Tokens, grammars that are applied second, and clones, at a guard at which about half of the rows have a choice.
TEST(lazy_logits_and_doses_are_eager_ones_over_a_random_walk) {
    constexpr double HALF = 0.7;
    install();
    Host                         host;
    std::mt19937                 random(7);
    std::vector<llama_sampler *> samplers = {adl_sampler_init(host.pair, STRENGTH, HALF)};
    std::vector<Eager>           eager(1);
    for (int i = 0; i < 600; ++i) {
        const size_t      k    = random() % samplers.size();
        const llama_token some = static_cast<llama_token>(3 + random() % 50), every = static_cast<llama_token>(2 + random() % 20);
        const auto grammar = [every](Candidates & c) { c.drop([every](const llama_token_data & d) { return d.id % every != 0; }); };
        switch (random() % 5) {
            case 0:
                clone_one(samplers, eager, k);
                break;
            case 1:
            case 2:
                if (eager[k].text.size() < 100) {
                    samplers[k]->iface->accept(samplers[k], some);
                    eager[k].accept(some);
                }
                break;
            default:
                if (!eager[k].text.empty()) {
                    eager[k].apply(samplers[k], HALF, random() % 2 ? +[](Candidates &) {} : std::function<void(Candidates &)>(grammar));
                }
        }
        eager[k].check(samplers[k]);
    }
    int64_t n_tokens = 0, n_dosed = 0;
    for (size_t k = 0; k < samplers.size(); ++k) {
        n_tokens += eager[k].dose.n_tokens;
        n_dosed += eager[k].dose.n_dosed;
        llama_sampler_free(samplers[k]);
    }
    CHECK(n_dosed > n_tokens / 5 && n_dosed < n_tokens * 4 / 5); // the walk saw both kinds
}

//
// Following the text
//

TEST(a_position_is_evaluated_once) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    check_applied(f.smpl, {5, 6, 7});
    CHECK_EQ(batches(f.pair), "2 1");
    for (int i = 0; i < 3; ++i) { // grammar resampling
        check_applied(f.smpl, {5, 6, 7});
    }
    CHECK_EQ(batches(f.pair), "2 1");
}

TEST(an_accepted_token_is_one_more_to_evaluate) {
    install();
    Fixture f;
    f.prefix({5, 6, 7});
    check_applied(f.smpl, {5, 6, 7});
    Tokens tokens = {5, 6, 7};
    for (llama_token token = 10; token < 20; ++token) {
        f.accept(token);
        tokens.push_back(token);
        check_applied(f.smpl, tokens);
        CHECK_EQ(batches(f.pair, 2 + token - 10), "1");
        CHECK_EQ(fake::memory(adl_pair_get_context(f.pair, ADL_PLUS), 0).size(), tokens.size());
        CHECK(fake::memory(adl_pair_get_context(f.pair, ADL_PLUS), 0) == fake::memory(adl_pair_get_context(f.pair, ADL_MINUS), 0));
    }
}

TEST(tokens_that_are_only_accepted_wait_for_the_next_apply) { // and are of the prompt
    install();
    Fixture f;
    f.prefix({5});
    for (const llama_token token : {6, 7, 8}) {
        f.accept(token);
    }
    CHECK_EQ(fake::counts().decodes, 0);
    check_applied(f.smpl, {5, 6, 7, 8});
    CHECK_EQ(batches(f.pair), "3 1");
    for (const llama_token token : {9, 10, 11}) { // the first of them was sampled
        f.accept(token);
    }
    check_applied(f.smpl, {5, 6, 7, 8, 9, 10, 11});
    CHECK_EQ(batches(f.pair, 2), "6 1");
}

TEST(a_prompt_may_be_accepted_instead) {
    install();
    Fixture f;
    for (const llama_token token : {BOS, 9, 11}) {
        f.accept(token);
    }
    check_applied(f.smpl, {BOS, 9, 11});
}

TEST(a_prefix_is_longer_than_a_batch) {
    const std::vector<std::pair<size_t, const char *>> cases = {
        {31, "30 1"}, {32, "31 1"}, {33, "32 1"}, {34, "32 1 1"}, {64, "32 31 1"}, {65, "32 32 1"}, {128, "32 32 32 31 1"}};
    for (const auto & [n, sizes] : cases) {
        install();
        Fixture f;
        Tokens  tokens;
        for (size_t i = 0; i < n; ++i) {
            tokens.push_back(static_cast<llama_token>(3 + i % 50));
        }
        f.prefix(tokens);
        check_applied(f.smpl, tokens);
        CHECK_EQ(batches(f.pair), sizes);
    }
}

// A text whose first n tokens are the same whatever the seed.
Tokens text(size_t n, size_t n_shared, llama_token seed) {
    Tokens tokens;
    for (size_t i = 0; i < n; ++i) {
        tokens.push_back(static_cast<llama_token>(3 + (i < n_shared ? i : i + seed) % 50));
    }
    return tokens;
}

TEST(what_is_kept_of_a_prompt_is_what_a_fresh_pair_would_have) {
    struct Next {
        Tokens       prompt;
        size_t       n_sampled; // after it
        const char * sizes;     // of its batches
    };
    adl_pair_params large = models::params();
    large.context.n_ctx = large.context.n_batch = 256;
    const auto goes_on = [](Tokens tokens, size_t n_sampled) { // from what is sampled after it, and has five tokens more
        tokens.insert(tokens.end(), n_sampled, 9);
        tokens.insert(tokens.end(), 5, 10);
        return tokens;
    };
    const Tokens first = text(100, 100, 0), second = text(128, 128, 5);
    const std::vector<Next> nexts = {
        {first, 40, "99 1"},
        {first, 3, "1"},              // the same again: all of it
        {text(90, 70, 1), 1, "25 1"}, // from a block's begin on
        {first, 2, "35 1"},
        {text(80, 40, 1), 0, "47 1"},
        {text(80, 31, 2), 0, "79 1"},
        {first, 40, "99 1"},
        {text(66, 66, 0), 0, "33 1"}, // a fresh pair evaluates no 65th token alone: one block less
        {text(65, 65, 0), 0, "1"},
        {text(33, 33, 0), 0, "1"},
        {first, 40, "67 1"},
        {goes_on(first, 40), 0, "4 1"},
        {text(20, 5, 3), 0, "19 1"},
        {second, 22, "127 1"},
        {goes_on(second, 22), 0, "58 1"}, // from too little to be worth it
    };
    install();
    Fixture f(large);
    for (const Next & next : nexts) {
        Tokens tokens = next.prompt;
        f.prefix(tokens);
        const size_t before = fake::batches(adl_pair_get_context(f.pair, ADL_PLUS)).size();
        check_applied(f.smpl, tokens);
        CHECK_EQ(batches(f.pair, before), next.sizes);
        for (size_t i = 0; i < next.n_sampled; ++i) {
            f.accept(9);
            tokens.push_back(9);
            check_applied(f.smpl, tokens);
        }
    }
}

TEST(the_default_parameters_are_enough) { // one sequence, one row
    install();
    const adl_llama llama = fake_llama_table();
    Fixture         f(adl_pair_default_params(&llama));
    f.prefix(Tokens(300, 5));
    check_applied(f.smpl, Tokens(300, 5));
}

TEST(a_new_prefix_forgets_what_was_accepted) {
    install();
    Fixture f;
    f.prefix({5, 6, 7, 8});
    check_applied(f.smpl, {5, 6, 7, 8});
    f.accept(9);
    for (const Tokens & prefix : {Tokens{5, 6, 7, 20}, {5, 6}, {5, 6, 30, 31, 32}, {40}, {5, 6, 7, 8}, {5, 6, 7, 8}}) {
        f.prefix(prefix);
        check_applied(f.smpl, prefix);
        f.accept(10);
    }
}

TEST(a_shared_prefix_is_not_evaluated_again) {
    install();
    Fixture f;
    Tokens  tokens(60, 5);
    f.prefix(tokens);
    check_applied(f.smpl, tokens);
    const int before = fake::counts().decodes; // two batches in both halves
    tokens.back()    = 6;
    f.prefix(tokens);
    check_applied(f.smpl, tokens);
    CHECK_EQ(fake::counts().decodes, before + 2);
}

TEST(reset_forgets_the_prompt_too) {
    install();
    Fixture f;
    f.prefix({5, 6});
    check_applied(f.smpl, {5, 6});
    f.smpl->iface->reset(f.smpl);
    f.accept(7);
    check_applied(f.smpl, {7});
}

TEST(the_host_may_use_the_pair_in_between) {
    const std::vector<void (*)(adl_pair *)> uses = {
        [](adl_pair * pair) { adl_pair_memory_clear(pair); },
        [](adl_pair * pair) { adl_pair_memory_seq_rm(pair, 0, 1, -1); },
        [](adl_pair * pair) { adl_pair_memory_seq_keep(pair, 2); },
        [](adl_pair * pair) { CHECK(adl_pair_decode(pair, Batch({30}, 3).get()) != 0); }, // in the sampler's own sequence: refused the second time
        [](adl_pair * pair) { Batch batch; CHECK(adl_pair_decode(pair, batch.add(30, 0, {2}, true).get()) != 0); },
        [](adl_pair * pair) { adl_pair_memory_clear(pair); CHECK_EQ(adl_pair_decode(pair, Batch({40, 41, 42}).get()), 1); },
        [](adl_pair * pair) { CHECK_EQ(adl_pair_decode(pair, Batch({N_PROXY}).get()), ADL_ERROR_PROXY); }, // an error that sticks
        [](adl_pair * pair) { // both memories replaced
            for (const adl_sign sign : {ADL_PLUS, ADL_MINUS}) {
                llama_memory_clear(llama_get_memory(adl_pair_get_context(pair, sign)), true);
            }
            adl_pair_touch(pair);
        },
    };
    for (const auto use : uses) {
        install();
        Fixture f;
        f.prefix({5, 6, 7});
        check_applied(f.smpl, {5, 6, 7});
        use(f.pair);
        check_applied(f.smpl, {5, 6, 7}); // what is known of the position stays
        f.accept(8);
        use(f.pair);
        check_applied(f.smpl, {5, 6, 7, 8});
        f.accept(9);
        check_applied(f.smpl, {5, 6, 7, 8, 9});
    }
}

TEST(a_memory_that_forgets_all_or_nothing) {
    for (const auto & [plus, minus] : {std::pair<bool, bool>{true, true}, {true, false}, {false, true}}) {
        install();
        fake::file(PLUS).recurrent  = plus;
        fake::file(MINUS).recurrent = minus;
        Fixture f;
        for (const Tokens & prefix : {Tokens{5, 6, 7, 8}, {5, 6, 7, 20}, {5, 6}, {5, 6, 9}, {40}}) {
            f.prefix(prefix);
            check_applied(f.smpl, prefix);
        }
    }
}

//
// Clones
//

TEST(a_clone_is_a_snapshot) {
    install();
    Fixture f;
    f.prefix({5, 6});
    check_applied(f.smpl, {5, 6});
    llama_sampler * clone = llama_sampler_clone(f.smpl);
    const int       before = fake::counts().decodes;
    check_applied(clone, {5, 6}); // knows what is evaluated
    CHECK_EQ(fake::counts().decodes, before);
    f.accept(7);
    check_applied(clone, {5, 6});
    check_applied(f.smpl, {5, 6, 7});
    clone->iface->accept(clone, 20);
    check_applied(clone, {5, 6, 20});
    check_applied(f.smpl, {5, 6, 7});
    llama_sampler_free(clone);
    f.accept(8);
    check_applied(f.smpl, {5, 6, 7, 8});
}

TEST(clones_that_part_each_follow_their_own_text) {
    install();
    Fixture                      f;
    std::mt19937                 random(1);
    std::vector<llama_sampler *> samplers = {f.smpl};
    std::vector<Tokens>          texts    = {{5, 6, 7}};
    f.prefix(texts[0]);
    for (int i = 0; i < 200; ++i) {
        const size_t k = random() % samplers.size();
        switch (random() % 4) {
            case 0:
                clone_one(samplers, texts, k);
                break;
            case 1:
                if (texts[k].size() < 100) {
                    texts[k].push_back(static_cast<llama_token>(3 + random() % 50));
                    samplers[k]->iface->accept(samplers[k], texts[k].back());
                }
                break;
            default: check_applied(samplers[k], texts[k]);
        }
    }
    for (size_t k = 1; k < samplers.size(); ++k) {
        check_applied(samplers[k], texts[k]);
        llama_sampler_free(samplers[k]);
    }
}

TEST(a_clone_outlives_its_original) {
    install();
    Host            host;
    llama_sampler * original = adl_sampler_init(host.pair, STRENGTH, GUARD);
    original->iface->accept(original, 5);
    check_applied(original, {5});
    llama_sampler * clone = llama_sampler_clone(original);
    llama_sampler_free(original);
    check_applied(clone, {5});
    clone->iface->accept(clone, 6);
    check_applied(clone, {5, 6});
    llama_sampler_free(clone);
}

TEST(llama_sampler_copy_works) {
    install();
    Fixture f;
    f.prefix({5, 6});
    check_applied(f.smpl, {5, 6});
    llama_sampler * other = adl_sampler_init(f.pair, STRENGTH, GUARD);
    llama_sampler_copy(f.smpl, other);
    other->iface->accept(other, 9);
    check_applied(other, {5, 6, 9});
    check_applied(f.smpl, {5, 6});
    llama_sampler_free(other);
}

TEST(samplers_of_their_own_share_a_pair) {
    install();
    Fixture         f;
    llama_sampler * other = adl_sampler_init(f.pair, 4.0, 0.5);
    const Tokens    tokens = {30, 31};
    CHECK_EQ(adl_sampler_set_prefix(other, tokens.data(), tokens.size()), ADL_OK);
    f.prefix({5, 6, 7});
    check_applied(f.smpl, {5, 6, 7});
    Candidates given(tokens), expected(tokens);
    given.apply(other);
    expect(tokens, expected.data, 4.0, 0.5);
    check_same(given, expected.data);
    f.accept(8);
    check_applied(f.smpl, {5, 6, 7, 8});
    llama_sampler_free(other);
}

TEST(clones_in_two_threads) {
    install();
    fake::settings().decode_time = std::chrono::microseconds(200);
    Fixture f;
    f.prefix({5, 6, 7});
    llama_sampler * clone = llama_sampler_clone(f.smpl);
    const auto      work  = [](llama_sampler * smpl, llama_token first) {
        Tokens tokens = {5, 6, 7};
        for (llama_token token = first; token < first + 15; ++token) {
            check_applied(smpl, tokens);
            smpl->iface->accept(smpl, token);
            tokens.push_back(token);
        }
    };
    std::thread thread(work, clone, 30);
    work(f.smpl, 10);
    thread.join();
    llama_sampler_free(clone);
}

//
// Dose
//

TEST(the_dose_is_summed_over_accepted_tokens) {
    install();
    Fixture  f;
    Tokens   tokens = {5, 6, 7};
    adl_dose sum    = {};
    f.prefix(tokens);
    for (const llama_token token : {10, 33, N_PROXY - 1, EOS, 12}) {
        Candidates given(tokens), before(tokens);
        given.apply(f.smpl);
        const adl_row row = expect(tokens, before.data);
        f.accept(token);
        const double delta = (static_cast<double>(fake::logits(PLUS, tokens)[token]) - fake::logits(MINUS, tokens)[token]) / (2 * EPSILON);
        sum.total += delta - row.mean;
        sum.kl += row.kl;
        sum.n_steerable += row.n_candidates > 1;
        ++sum.n_tokens;
        tokens.push_back(token);
        const adl_dose dose = adl_sampler_get_dose(f.smpl);
        CHECK_EQ(dose.n_tokens, sum.n_tokens);
        CHECK_EQ(dose.n_steerable, sum.n_steerable);
        CHECK_NEAR(dose.total, sum.total, 1e-4);
        CHECK_NEAR(dose.kl, sum.kl, 1e-5);
    }
    CHECK(sum.kl > 0);
}

void check_dose(llama_sampler * smpl, int64_t n_tokens, int64_t n_steerable) {
    const adl_dose dose = adl_sampler_get_dose(smpl);
    CHECK_EQ(dose.n_tokens, n_tokens);
    CHECK_EQ(dose.n_steerable, n_steerable);
    CHECK_EQ(dose.n_dosed, n_steerable);
    CHECK(n_steerable > 0 || (dose.total == 0 && dose.kl == 0));
}

TEST(tokens_whose_position_was_not_applied_have_no_dose) {
    install();
    Fixture f;
    f.prefix({5});
    f.accept(6);
    check_dose(f.smpl, 0, 0);
    check_applied(f.smpl, {5, 6});
    f.accept(7);
    f.accept(8);
    check_dose(f.smpl, 1, 1);
}

TEST(a_position_that_one_token_holds_is_not_steerable) {
    install();
    Fixture f;
    f.prefix({5});
    Candidates given({5});
    given.logit(40) = 60;
    given.apply(f.smpl);
    f.accept(40);
    check_dose(f.smpl, 1, 0);
}

TEST(a_token_beyond_the_proxys_vocabulary_adds_nothing) {
    install();
    Fixture f;
    f.prefix({5});
    check_applied(f.smpl, {5});
    f.accept(N_PROXY + 2);
    check_dose(f.smpl, 1, 1);
    CHECK_EQ(adl_sampler_get_dose(f.smpl).total, 0.0);
}

TEST(reset_and_a_new_prefix_start_a_new_dose) {
    install();
    Fixture f;
    for (int i = 0; i < 2; ++i) {
        f.prefix({5});
        check_dose(f.smpl, 0, 0);
        check_applied(f.smpl, {5});
        f.accept(6);
        check_dose(f.smpl, 1, 1);
    }
    f.smpl->iface->reset(f.smpl);
    check_dose(f.smpl, 0, 0);
}

TEST(a_clone_has_a_dose_of_its_own) {
    install();
    Fixture f;
    f.prefix({5});
    check_applied(f.smpl, {5});
    f.accept(6);
    check_applied(f.smpl, {5, 6});
    llama_sampler * clone = llama_sampler_clone(f.smpl);
    clone->iface->accept(clone, 7);
    check_dose(clone, 2, 2);
    check_dose(f.smpl, 1, 1);
    llama_sampler_free(clone);
}

//
// Failure
//

// A sampler that cannot evaluate its position.
struct Broken : Fixture {
    Broken() {
        prefix({5, 6});
        fake::file(PLUS).faults.decode_in = 1;
    }
};

void check_failed(llama_sampler * smpl, const std::string & words) {
    CHECK(adl_sampler_error(smpl) != nullptr);
    CHECK_CONTAINS(adl_sampler_error(smpl) ? adl_sampler_error(smpl) : "", words);
}

void check_closed(const Candidates & given) {
    for (const llama_token_data & d : given.data) {
        CHECK_EQ(d.logit, is_end(d) ? 0.0f : given.data[0].logit); // token 0 is no end
    }
    CHECK(given.data[0].logit <= -1e6f && std::isfinite(given.data[0].logit));
    CHECK(!given.sorted);
}

TEST(a_failure_closes_the_row) {
    install();
    Broken     f;
    Candidates given({5, 6});
    given.apply(f.smpl, true);
    CHECK_EQ(given.data.size(), size_t{N_TEACHER});
    check_closed(given);
    check_failed(f.smpl, "llama_decode returned -3");
}

TEST(where_a_truncation_dropped_the_ends_one_is_put_back) {
    install();
    Broken     f;
    Candidates given({5, 6});
    given.drop(is_end);
    given.sort_and_keep(10);
    given.apply(f.smpl, true);
    CHECK_EQ(given.data.size(), size_t{1});
    CHECK(is_end(given.data[0]));
    CHECK(std::isfinite(given.data[0].logit));
    check_failed(f.smpl, "");
}

TEST(where_a_grammar_forbids_the_ends_nothing_of_the_teacher_is_left) {
    install();
    Broken     f;
    Candidates given({5, 6});
    for (llama_token_data & d : given.data) {
        d.logit = is_end(d) || d.id % 2 ? -INF : d.logit;
    }
    given.apply(f.smpl);
    CHECK_EQ(given.data.size(), size_t{N_TEACHER});
    for (const llama_token_data & d : given.data) {
        CHECK_EQ(d.logit, is_end(d) || d.id % 2 ? -INF : given.data[0].logit);
    }
    CHECK(std::isfinite(given.data[0].logit));
    check_failed(f.smpl, "");
}

TEST(where_a_grammar_forbids_one_end_the_other_has_all) {
    install();
    Broken     f;
    Candidates given({5, 6});
    given.logit(EOS) = -INF;
    given.apply(f.smpl);
    CHECK_EQ(given.logit(EOS), -INF);
    CHECK_EQ(given.logit(EOT), 0.0f);
    CHECK(given.logit(10) <= -1e6f && given.logit(10) == given.logit(20));
}

TEST(where_everything_is_forbidden_an_end_is_left) {
    install();
    Broken     f;
    Candidates given({5, 6});
    for (llama_token_data & d : given.data) {
        d.logit = -INF;
    }
    given.apply(f.smpl);
    CHECK_EQ(given.data.size(), size_t{1});
    CHECK(is_end(given.data[0]) && given.data[0].logit == 0);
}

TEST(a_teacher_without_an_end_leaves_equal_tokens) {
    install();
    fake::file(TEACHER).vocab.ends.clear();
    Broken     f;
    Candidates given({5, 6});
    given.sort_and_keep(10);
    given.apply(f.smpl);
    CHECK(std::all_of(given.data.begin(), given.data.end(), [&](const auto & d) { return d.logit == given.data[0].logit; }));
    CHECK(!given.data.empty());
}

TEST(a_proxy_that_fails_is_met_where_there_is_a_choice) {
    install();
    Broken     f;
    Candidates sure({5, 6});
    sure.logit(40) = 60;
    sure.apply(f.smpl);
    CHECK(adl_sampler_error(f.smpl) == nullptr);
    f.accept(40);
    Candidates given({5, 6, 40});
    given.apply(f.smpl);
    check_closed(given);
    check_failed(f.smpl, "llama_decode returned -3");
    check_dose(f.smpl, 1, 0);
}

TEST(nonsense_closes_a_row_without_a_choice_too) {
    const std::vector<std::pair<const char *, Narrow>> nonsense = {
        {"teacher's logits are not numbers", [](Candidates & c) { c.logit(9) = std::numeric_limits<float>::quiet_NaN(); }},
        {"teacher's logits are not numbers", [](Candidates & c) { c.logit(EOT) = std::numeric_limits<float>::quiet_NaN(); }},
        {"teacher's largest logit is inf", [](Candidates & c) { c.logit(9) = INF; }},
        {"candidate 72 is none of the teacher's 72 tokens", [](Candidates & c) { c.data[9].id = N_TEACHER; }},
    };
    for (const auto & [words, spoil] : nonsense) {
        install();
        Fixture    f;
        Candidates given({5, 6});
        f.prefix({5, 6});
        given.logit(40) = 60;
        spoil(given);
        given.apply(f.smpl, true);
        check_closed(given);
        check_failed(f.smpl, words);
        CHECK_EQ(fake::counts().decodes, 0);
    }
    install();
    Fixture    f; // without a prefix
    Candidates given({});
    given.logit(40) = 60;
    given.apply(f.smpl);
    check_closed(given);
    check_failed(f.smpl, "adl_sampler_set_prefix");
}

TEST(a_failure_sticks) {
    install();
    Broken f;
    for (int i = 0; i < 3; ++i) { // though the proxies work again
        Candidates given({5, 6});
        given.apply(f.smpl);
        check_closed(given);
        check_failed(f.smpl, "returned -3");
        CHECK_EQ(fake::counts().decodes, 2);
        f.accept(7);
    }
    llama_sampler * clone = llama_sampler_clone(f.smpl);
    Candidates      given({5, 6});
    given.apply(clone);
    check_closed(given);
    check_failed(clone, "returned -3");
    llama_sampler_free(clone);
    check_dose(f.smpl, 0, 0);
}

TEST(a_new_prefix_or_reset_mends_a_failure) {
    install();
    Broken     f;
    Candidates given({5, 6});
    given.apply(f.smpl);
    f.prefix({5, 6, 8});
    CHECK(adl_sampler_error(f.smpl) == nullptr);
    check_applied(f.smpl, {5, 6, 8});

    fake::file(MINUS).faults.decode_in = 1;
    f.accept(9);
    given = Candidates({5, 6, 8, 9});
    given.apply(f.smpl);
    check_failed(f.smpl, "−ε");
    f.smpl->iface->reset(f.smpl);
    CHECK(adl_sampler_error(f.smpl) == nullptr);
    f.accept(5);
    check_applied(f.smpl, {5});
}

TEST(another_sampler_of_the_pair_is_not_disturbed) {
    install();
    Broken          f;
    llama_sampler * other = adl_sampler_init(f.pair, STRENGTH, GUARD);
    const Tokens    tokens = {30, 31};
    CHECK_EQ(adl_sampler_set_prefix(other, tokens.data(), tokens.size()), ADL_OK);
    Candidates given({5, 6});
    given.apply(f.smpl);
    check_failed(f.smpl, "");
    check_applied(other, tokens);
    llama_sampler_free(other);
}

TEST(nothing_to_evaluate_is_a_failure) {
    install();
    Fixture    f;
    Candidates given({});
    given.apply(f.smpl);
    check_closed(given);
    check_failed(f.smpl, "adl_sampler_set_prefix");
    CHECK_EQ(adl_sampler_set_prefix(f.smpl, nullptr, 0), ADL_OK);
    CHECK(adl_sampler_error(f.smpl) == nullptr);
}

TEST(every_kind_of_failure_closes) {
    const auto check = [](Fixture & f, const Tokens & tokens, const std::string & words) {
        Candidates given(tokens);
        f.prefix(tokens);
        given.apply(f.smpl);
        check_closed(given);
        check_failed(f.smpl, words);
    };
    install();
    Fixture f;
    check(f, {5, N_PROXY}, "token 64 is none of the proxy's 64");
    check(f, {5, -1}, "token -1");
    check(f, Tokens(129, 5), "larger n_ctx");
    fake::file(MINUS).faults.decode_in = 1;
    fake::file(MINUS).faults.throws    = fake::Throws::EXCEPTION;
    check(f, {5}, "backend is gone");
    for (const float value : {std::numeric_limits<float>::quiet_NaN(), INF}) {
        fake::file(PLUS).faults.logits[33] = value;
        check(f, {6}, "not");
    }
    fake::file(PLUS).faults.logits.clear();
    fake::file(TEACHER).faults.logits[33] = std::numeric_limits<float>::quiet_NaN();
    check(f, {6, 7}, "teacher");
}

TEST(another_models_candidates_are_a_failure) {
    for (const llama_token id : {N_TEACHER, -1, INT32_MAX, INT32_MIN}) {
        install();
        Fixture f;
        f.prefix({5});
        Candidates given({5});
        given.data[40].id = id;
        given.apply(f.smpl);
        check_closed(given);
        check_failed(f.smpl, "candidate " + std::to_string(id));
    }
}

//
// Making
//

TEST(arguments_are_checked) {
    install();
    Host         host;
    const double inf = HUGE_VAL, nan = std::nan("");
    for (const auto & [strength, guard] : {std::pair<double, double>{-0.1, 0.05}, {nan, 0.05}, {inf, 0.05}, {1, -0.1}, {1, 1.1}, {1, nan},
                                           {1, inf}}) {
        CHECK(adl_sampler_init(host.pair, strength, guard) == nullptr);
        CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
    }
    CHECK(adl_sampler_init(nullptr, 1, 0) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);

    const adl_llama llama = fake_llama_table();
    adl_pair *      alone = adl_pair_init_from_files(&llama, PLUS, MINUS, EPSILON, DELTA_SCALE, nullptr, params());
    CHECK(adl_sampler_init(alone, 1, 0) == nullptr);
    CHECK_EQ(adl_last_status(), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "teacher");
    adl_pair_free(alone);
}

TEST(a_prefix_is_given_with_its_tokens) {
    install();
    Fixture f;
    CHECK_EQ(adl_sampler_set_prefix(f.smpl, nullptr, 3), ADL_ERROR_INPUT);
    CHECK_CONTAINS(adl_last_error(), "tokens is NULL");
    f.prefix({5});
    check_applied(f.smpl, {5});
}

TEST(other_samplers_are_told) {
    install();
    llama_sampler_i iface = {};
    llama_sampler   other = {&iface, nullptr};
    const llama_token token = 5;
    for (llama_sampler * smpl : {&other, static_cast<llama_sampler *>(nullptr)}) {
        CHECK_EQ(adl_sampler_set_prefix(smpl, &token, 1), ADL_ERROR_INPUT);
        CHECK_CONTAINS(adl_last_error(), "sampler");
        CHECK(adl_sampler_error(smpl) != nullptr); // not "all is well"
        CHECK_EQ(adl_sampler_get_dose(smpl).n_tokens, 0);
    }
}

} // namespace

MAIN
