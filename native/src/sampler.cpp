// The pair as a llama_sampler.

#include "adjust.hpp"
#include "error.hpp"
#include "pair.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

namespace adl {

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// Room for one application. Not state: a copy starts without, which keeps clones cheap.
struct Scratch {
    Scratch() = default;
    Scratch(const Scratch &) {}
    Scratch & operator=(const Scratch &) = delete;

    std::vector<size_t> order; // of the candidates, those with a Δ first
    std::vector<float>  logits, plus, minus;

    std::vector<llama_token> ends; // where they are in the order
};

class Sampler {
  public:
    Sampler(adl_pair * pair, double strength, double guard) : pair_(pair), strength_(strength), guard_(guard) {}

    adl_pair *    pair() const { return pair_; }
    const char *  error() const { return error_.empty() ? nullptr : error_.c_str(); }
    adl_dose      dose() const { return dose_; }

    // Without them the sampler must not go on with the tokens that it had.
    void set_prefix(const llama_token * tokens, size_t n) {
        reset();
        fail("the prefix could not be set; set it again");
        if (tokens == nullptr && n > 0) {
            throw Error{ADL_ERROR_INPUT, "adl_sampler_set_prefix: tokens is NULL"};
        }
        tokens_.assign(tokens, tokens + n);
        n_prompt_ = n;
        error_.clear();
    }

    void reset() noexcept {
        tokens_.clear();
        evaluated_.reset();
        n_prompt_ = 0;
        applied_  = false;
        dose_     = {};
        error_.clear();
    }

    void accept(llama_token token) noexcept {
        count(token);
        evaluated_.reset();
        or_stick([&] { tokens_.push_back(token); });
        n_prompt_ = applied_ ? n_prompt_ : tokens_.size(); // the host's own
        applied_  = false;
    }

    void apply(llama_token_data_array * candidates) noexcept {
        or_stick([&] {
            if (error_.empty() && candidates->size > 0) {
                steer(candidates);
            }
        });
        if (!error_.empty()) {
            close(candidates);
        }
    }

    void fail(const char * message) noexcept {
        try {
            error_ = message;
        } catch (...) {
            error_.assign(1, '!'); // fits a string without allocation: not empty is what counts
        }
    }

  private:
    template <typename Body>
    void or_stick(Body && body) noexcept {
        if (guarded<int32_t>(-1, [&] { body(); return 0; }) != 0) {
            fail(adl_last_error());
        }
    }

    // Asks the pair only where the guard leaves a choice. What else is wrong is an error in either case.
    void steer(llama_token_data_array * candidates) {
        if (tokens_.empty()) {
            throw Error{ADL_ERROR_PROXY, "nothing to evaluate: tell the sampler the prompt with adl_sampler_set_prefix"};
        }
        const int32_t n_shared = gather(candidates);
        const auto &  logits   = scratch_.logits;
        adl_row       row      = {};
        row.n_candidates       = n_candidates(logits.data(), static_cast<int32_t>(logits.size()), n_shared, guard_, ends());
        if (row.n_candidates > 1) {
            evaluate();
            row = adjust(candidates, n_shared);
        }
        row_     = row;
        applied_ = true;
    }

    // Once a position: what is there stays until a token is accepted.
    void evaluate() {
        if (evaluated_) {
            return;
        }
        const std::lock_guard<std::mutex> lock(pair_->mutex);
        pair_->follow(tokens_, n_prompt_);
        evaluated_ = std::make_shared<Evaluated>(pair_->copy_row(0, pair_->expectation(0)));
    }

    adl_row adjust(llama_token_data_array * candidates, int32_t n_shared) {
        gather_proxies(candidates->data, n_shared);
        const Settings settings = {evaluated_->epsilon, pair_->lam(strength_), guard_};
        const Proxies  proxies  = {scratch_.plus.data(), scratch_.minus.data(), n_shared};
        auto &         logits   = scratch_.logits;
        const adl_row  row =
            adl::adjust(logits.data(), static_cast<int32_t>(logits.size()), proxies, n_shared, settings, ends(), evaluated_->mean);
        if (strength_ > 0) {
            for (size_t k = 0; k < logits.size(); ++k) {
                candidates->data[scratch_.order[k]].logit = logits[k];
            }
            candidates->sorted = false;
        }
        return row;
    }

    // Lays the candidates out as adl::adjust wants them: those with a Δ first. Returns their number.
    int32_t gather(const llama_token_data_array * candidates) {
        const llama_token_data * data = candidates->data;
        auto &                   order = scratch_.order;
        order.resize(candidates->size);
        for (size_t i = 0; i < order.size(); ++i) {
            check_id(data[i].id);
            order[i] = i;
        }
        const auto shared   = std::stable_partition(order.begin(), order.end(), [&](size_t i) { return data[i].id < pair_->n_shared; });
        const auto n_shared = static_cast<int32_t>(shared - order.begin());
        scratch_.logits.resize(order.size());
        scratch_.ends.clear();
        for (size_t k = 0; k < order.size(); ++k) {
            scratch_.logits[k] = data[order[k]].logit;
            if (is_end(data[order[k]].id)) {
                scratch_.ends.push_back(static_cast<llama_token>(k));
            }
        }
        return n_shared;
    }

    // The proxies' logits of the first n_shared of them.
    void gather_proxies(const llama_token_data * data, int32_t n_shared) {
        scratch_.plus.resize(n_shared);
        scratch_.minus.resize(n_shared);
        for (int32_t k = 0; k < n_shared; ++k) {
            const llama_token id = data[scratch_.order[k]].id;
            scratch_.plus[k]     = evaluated_->plus[id];
            scratch_.minus[k]    = evaluated_->minus[id];
        }
    }

    Ends ends() const { return {scratch_.ends.data(), scratch_.ends.size()}; }

    void check_id(llama_token id) const {
        if (id < 0 || id >= pair_->n_vocab_teacher) {
            throw Error{ADL_ERROR_PROXY, format("candidate %d is none of the teacher's %d tokens; is this chain another model's?", id,
                                                pair_->n_vocab_teacher)};
        }
    }

    void count(llama_token token) noexcept {
        if (!applied_ || token < 0) {
            return;
        }
        ++dose_.n_tokens;
        dose_.n_steerable += row_.n_candidates > 1 ? 1 : 0;
        dose_.kl += row_.kl;
        if (evaluated_) {
            ++dose_.n_dosed;
            dose_.total += evaluated_->dose(token);
        }
    }

    bool is_end(llama_token token) const {
        return std::find(pair_->teacher_ends.begin(), pair_->teacher_ends.end(), token) != pair_->teacher_ends.end();
    }

    // Leaves nothing of the teacher in the candidates; see adl_sampler_init.
    void close(llama_token_data_array * candidates) const noexcept {
        bool may_end = false, may_go_on = false, has_end = false, bans = false;
        for (size_t i = 0; i < candidates->size; ++i) {
            const bool banned = candidates->data[i].logit == -INF, end = is_end(candidates->data[i].id);
            has_end |= end;
            bans |= banned;
            may_end |= end && !banned;
            may_go_on |= !end && !banned;
        }
        const bool dropped = !has_end && !bans; // a truncation: what it kept is the teacher's choice
        if (!may_end && (dropped || !may_go_on)) {
            only_end(candidates);
        }
        for (size_t i = 0; i < candidates->size; ++i) {
            float & logit = candidates->data[i].logit;
            logit         = logit == -INF ? -INF : is_end(candidates->data[i].id) ? 0.0f : CLOSED;
        }
        candidates->sorted = false;
    }

    void only_end(llama_token_data_array * candidates) const noexcept {
        if (candidates->size > 0 && !pair_->teacher_ends.empty()) {
            candidates->data[0] = {pair_->teacher_ends.front(), 0.0f, 0.0f};
            candidates->size    = 1;
        }
    }

    adl_pair *                       pair_;
    double                           strength_;
    double                           guard_;
    std::vector<llama_token>         tokens_;
    size_t                           n_prompt_ = 0; // of them, those up to the last that was not sampled here
    std::shared_ptr<const Evaluated> evaluated_; // at the position after tokens_, where it was needed; clones share it
    bool                             applied_ = false;
    adl_row                          row_     = {}; // of the last apply
    adl_dose                         dose_    = {};
    std::string                      error_;

    Scratch scratch_;
};

Sampler * self(const llama_sampler * smpl) {
    return static_cast<Sampler *>(smpl->ctx);
}

const char * sampler_name(const llama_sampler *) {
    return "adlocal";
}

void sampler_accept(llama_sampler * smpl, llama_token token) {
    self(smpl)->accept(token);
}

void sampler_apply(llama_sampler * smpl, llama_token_data_array * candidates) {
    self(smpl)->apply(candidates);
}

void sampler_reset(llama_sampler * smpl) {
    self(smpl)->reset();
}

void sampler_free(llama_sampler * smpl) {
    delete self(smpl);
}

llama_sampler * sampler_clone(const llama_sampler * smpl);

// Not const: llama_sampler_init takes a pointer to a changeable one. Backend sampling is left out (NULL): it would read
// logits on the device, before they can be adjusted.
llama_sampler_i sampler_interface = {
    sampler_name, sampler_accept, sampler_apply, sampler_reset, sampler_clone, sampler_free, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
};

llama_sampler * make_sampler(std::unique_ptr<Sampler> sampler) {
    llama_sampler * smpl = sampler->pair()->llama.llama_sampler_init(&sampler_interface, sampler.get());
    if (smpl != nullptr) {
        sampler.release(); // llama.cpp's now: sampler_free ends it
    }
    return smpl;
}

// A chain adds whatever clone returns, so NULL would end the process: a copy that finds no memory is an empty, closed one.
llama_sampler * sampler_clone(const llama_sampler * smpl) {
    const Sampler & original = *self(smpl);
    if (auto * copy = guarded<llama_sampler *>(nullptr, [&] { return make_sampler(std::make_unique<Sampler>(original)); })) {
        return copy;
    }
    return guarded<llama_sampler *>(nullptr, [&] {
        auto closed = std::make_unique<Sampler>(original.pair(), 0.0, 0.0);
        closed->fail(adl_last_error());
        return make_sampler(std::move(closed));
    });
}

Sampler * checked(const llama_sampler * smpl) {
    if (smpl == nullptr || smpl->iface != &sampler_interface) {
        throw Error{ADL_ERROR_INPUT, "this is no sampler of adlocal's; llama_sampler_chain_get gives the one that a chain holds"};
    }
    return self(smpl);
}

} // namespace

} // namespace adl

struct llama_sampler * adl_sampler_init(struct adl_pair * pair, double strength, double guard) {
    return adl::guarded<llama_sampler *>(nullptr, [&] {
        if (pair == nullptr || pair->n_vocab_teacher == 0) {
            throw adl::Error{ADL_ERROR_INPUT, "a sampler needs a pair that was made with a teacher"};
        }
        adl::check_strength(strength, guard);
        return adl::make_sampler(std::make_unique<adl::Sampler>(pair, strength, guard));
    });
}

int32_t adl_sampler_set_prefix(struct llama_sampler * smpl, const llama_token * tokens, size_t n_tokens) {
    return adl::status_of([&] {
        adl::checked(smpl)->set_prefix(tokens, n_tokens);
        return static_cast<int32_t>(ADL_OK);
    });
}

const char * adl_sampler_error(const struct llama_sampler * smpl) {
    return adl::guarded<const char *>(adl_last_error(), [&] { return adl::checked(smpl)->error(); });
}

struct adl_dose adl_sampler_get_dose(const struct llama_sampler * smpl) {
    return adl::guarded<adl_dose>({}, [&] { return adl::checked(smpl)->dose(); });
}
