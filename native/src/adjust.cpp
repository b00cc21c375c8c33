// Two passes over the vocabulary (the largest logits, then the sums of exponentials), and three more over the few blocks
// that hold candidates. Ends are −inf meanwhile, so that no pass has to tell them. `omp simd` allows the compiler to reorder
// a reduction's terms, without which no float sum is vectorized; a compiler that does not know it is slower, not wrong. Sums
// run over blocks that are short enough for float accumulators, and are added up in double.

#include "adjust.hpp"

#include "error.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

namespace adl {

namespace {

constexpr int32_t MAX_BLOCKS = 512; // of a row; their maxima are kept to skip blocks without candidates
constexpr int32_t MIN_BLOCK  = 512;

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float LEAST_EXPONENT = -87.0f;
constexpr double NEXT_TO_NOTHING = 1e-300;

// e^x for x ≤ 0, to 2 ulp; NaN stays NaN, and below −87 it is 1e-38 instead of 0. The polynomial is that of Cephes' expf.
inline float exp_nonpositive(float x) {
    constexpr float MAGIC = 12582912.0f; // 1.5 · 2²³: adding it rounds to an integer, which then lies in the low bits
    x                     = x < LEAST_EXPONENT ? LEAST_EXPONENT : x;
    const float t         = x * 1.44269504088896341f + MAGIC;
    const float k         = t - MAGIC;
    const float r         = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    float       y         = 1.9875691500e-4f;
    y                     = y * r + 1.3981999507e-3f;
    y                     = y * r + 8.3334519073e-3f;
    y                     = y * r + 4.1665795894e-2f;
    y                     = y * r + 1.6666665459e-1f;
    y                     = y * r + 5.0000001201e-1f;
    y                     = (y * r) * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &t, sizeof bits);
    bits = (bits + 127u) << 23; // MAGIC's own low bits are 0, its exponent is shifted out
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return y * scale;
}

// Largest value of [begin, end), −inf if empty; NaN is passed over and has to be found by a sum.
float max_of(const float * x, int32_t begin, int32_t end) {
    float m = -INF;
#pragma omp simd reduction(max : m)
    for (int32_t i = begin; i < end; ++i) {
        m = x[i] > m ? x[i] : m;
    }
    return m;
}

constexpr const char * NO_NUMBERS = "the teacher's logits are not numbers; the model or its quantization is broken";

// The largest logit, which has to be a number.
float checked_top(float top) {
    if (!std::isfinite(top)) {
        throw Error{ADL_ERROR_PROXY, format("the teacher's largest logit is %g; the model or its quantization is broken", top)};
    }
    return top;
}

float top_of(const float * logits, int32_t begin, int32_t end) {
    return checked_top(max_of(logits, begin, end));
}

// Least float that is a candidate's logit: top + log(guard), rounded up. guard 0 keeps all but −inf.
float floor_of(float top, double guard) {
    if (guard == 0) {
        return -FLT_MAX;
    }
    const double exact = static_cast<double>(top) + std::log(guard);
    const auto   near  = static_cast<float>(exact);
    return near < exact ? std::nextafter(near, INF) : near;
}

// Σ e^(x − top) over [begin, end).
double exp_sum(const float * x, int32_t begin, int32_t end, float top) {
    double total = 0;
    for (; begin < end; begin += MIN_BLOCK) {
        const int32_t stop = std::min(begin + MIN_BLOCK, end);
        float         s    = 0;
#pragma omp simd reduction(+ : s)
        for (int32_t i = begin; i < stop; ++i) {
            s += exp_nonpositive(x[i] - top);
        }
        total += s;
    }
    return total;
}

// A row's blocks, with the largest teacher's logit of each.
struct Blocks {
    int32_t size;
    int32_t n; // of the shared ids
    float   max[MAX_BLOCKS];

    Blocks(const float * logits, int32_t n_shared) {
        size = std::max(MIN_BLOCK, (n_shared + MAX_BLOCKS - 1) / MAX_BLOCKS);
        n    = (n_shared + size - 1) / size;
        for (int32_t b = 0; b < n; ++b) {
            max[b] = max_of(logits, b * size, std::min((b + 1) * size, n_shared));
        }
    }
};

// Takes the ends out of a row for as long as it lives.
class Hidden {
  public:
    Hidden(float * logits, const Ends & ends) : logits_(logits), ends_(ends), saved_(ends.n) {
        for (size_t i = 0; i < ends.n; ++i) {
            saved_[i] = std::exchange(logits[ends.ids[i]], -INF);
        }
    }
    Hidden(const Hidden &) = delete;
    Hidden & operator=(const Hidden &) = delete;

    ~Hidden() {
        for (size_t i = ends_.n; i-- > 0;) { // backwards: an id that is named twice has its logit in the first
            logits_[ends_.ids[i]] = saved_[i];
        }
    }

    const float * logits() const { return saved_.data(); }
    int32_t       n() const { return static_cast<int32_t>(saved_.size()); }

  private:
    float * const      logits_;
    const Ends         ends_;
    std::vector<float> saved_;
};

// One row's adjustment, step by step. The row's ends are hidden.
class Row {
  public:
    Row(float * logits, int32_t n, const Proxies & proxies, int32_t n_shared, const Settings & settings, const Hidden & ends)
        : z_(logits), n_(n), plus_(proxies.plus), minus_(proxies.minus), n_shared_(n_shared), settings_(settings), ends_(ends),
          two_epsilon_(static_cast<float>(2 * settings.epsilon)), blocks_(logits, n_shared) {
        end_    = max_of(ends.logits(), 0, ends.n());
        beyond_ = max_of(z_, n_shared_, n_);
        other_  = std::max(max_of(blocks_.max, 0, blocks_.n), beyond_);
        top_    = checked_top(std::max(other_, end_));
        floor_  = floor_of(top_, settings.guard);
    }

    adl_row adjust(double mean) {
        weigh();
        adl_row row = {mean, 0.0, n_candidates_};
        if (settings_.lam != 0 && n_candidates_ > 1) {
            measure_shift();
            weigh_shifted();
            set_largest();
            row.kl = kl();
            write();
        }
        return row;
    }

  private:
    float delta(int32_t i) const { return (plus_[i] - minus_[i]) / two_epsilon_; }

    template <typename Body>
    void for_candidate_blocks(Body && body) const {
        for (int32_t b = 0; b < blocks_.n; ++b) {
            if (blocks_.max[b] >= floor_) {
                body(b * blocks_.size, std::min((b + 1) * blocks_.size, n_shared_));
            }
        }
    }

    // Teacher's probability mass inside and outside of the candidates (times e^top), and their number.
    void weigh() {
        for (int32_t b = 0; b < blocks_.n; ++b) {
            const int32_t begin = b * blocks_.size, end = std::min(begin + blocks_.size, n_shared_);
            if (blocks_.max[b] >= floor_) {
                weigh_candidates(begin, end);
            } else {
                outside_ += exp_sum(z_, begin, end, top_);
            }
        }
        outside_ += exp_sum(z_, n_shared_, n_, top_) + exp_sum(ends_.logits(), 0, ends_.n(), top_);
        if (!std::isfinite(inside_ + outside_)) {
            throw Error{ADL_ERROR_PROXY, NO_NUMBERS};
        }
        if (!std::isfinite(sum_delta_)) {
            throw Error{ADL_ERROR_PROXY, format("Δ of token %d is not finite: a proxy gave NaN or inf; nothing emitted", first_bad())};
        }
    }

    void weigh_candidates(int32_t begin, int32_t end) {
        const float *z = z_, *plus = plus_, *minus = minus_;
        const float  floor = floor_, top = top_, two_epsilon = two_epsilon_;
        float        in = 0, out = 0;
        double       total = 0;
        int32_t      count = 0;
#pragma omp simd reduction(+ : in, out, total, count)
        for (int32_t i = begin; i < end; ++i) {
            const bool  candidate = z[i] >= floor;
            const float e         = exp_nonpositive(z[i] - top);
            const float delta     = (plus[i] - minus[i]) / two_epsilon;
            in += candidate ? e : 0.0f;
            out += candidate ? 0.0f : e;
            total += candidate ? delta : 0.0f;
            count += candidate ? 1 : 0;
        }
        inside_ += in;
        outside_ += out;
        sum_delta_ += total;
        n_candidates_ += count;
    }

    int32_t first_bad() const {
        int32_t i = 0;
        while (i + 1 < n_shared_ && !(z_[i] >= floor_ && !std::isfinite(delta(i)))) {
            ++i;
        }
        return i;
    }

    // Largest and least z + λΔ of the candidates.
    void measure_shift() {
        const float *z = z_, *plus = plus_, *minus = minus_;
        const float  floor = floor_, two_epsilon = two_epsilon_;
        const double lam = settings_.lam;
        double       peak = -DBL_MAX, least = DBL_MAX;
        int32_t      bad = 0;
        for_candidate_blocks([&](int32_t begin, int32_t end) {
#pragma omp simd reduction(max : peak) reduction(min : least) reduction(+ : bad)
            for (int32_t i = begin; i < end; ++i) {
                const bool   candidate = z[i] >= floor;
                const float  delta     = (plus[i] - minus[i]) / two_epsilon;
                const double after     = z[i] + lam * static_cast<double>(delta);
                peak                   = candidate && after > peak ? after : peak;
                least                  = candidate && after < least ? after : least;
                bad += (candidate ? 1 : 0) & (std::fabs(after) <= DBL_MAX ? 0 : 1);
            }
        });
        if (bad > 0 || !(least - peak + top_ >= -FLT_MAX)) { // the largest ends up between top − log |C| and top
            throw Error{ADL_ERROR_PROXY,
                        format("λ = %g shifts a logit beyond float32; nothing emitted, ask for a smaller strength", lam)};
        }
        peak_ = peak;
    }

    // Over the candidates: Σ e^(z + λΔ − peak), and by these weights the sum of what λΔ − (peak − top) is.
    void weigh_shifted() {
        const float *z = z_, *plus = plus_, *minus = minus_;
        const float  floor = floor_, top = top_, two_epsilon = two_epsilon_;
        const double lam = settings_.lam, peak = peak_;
        for_candidate_blocks([&](int32_t begin, int32_t end) {
            float m = 0, w = 0;
#pragma omp simd reduction(+ : m, w)
            for (int32_t i = begin; i < end; ++i) {
                const bool  candidate = z[i] >= floor;
                const float delta     = (plus[i] - minus[i]) / two_epsilon;
                const auto  lead      = static_cast<float>(z[i] + lam * static_cast<double>(delta) - peak);
                const float after     = lead < LEAST_EXPONENT ? LEAST_EXPONENT : lead < 0.0f ? lead : 0.0f;
                const float e         = exp_nonpositive(after);
                m += candidate ? e : 0.0f;
                w += candidate ? e * (after - (z[i] - top)) : 0.0f;
            }
            shifted_ += m;
            weighted_ += w;
        });
    }

    // Where the largest candidate goes, and a lead of 0 for the others: one constant keeps the candidates' mass. If no token
    // were above the ends any more, and some was, the largest goes above them and the others pay for it.
    void set_largest() {
        kept_ = largest_ = top_ + std::log(inside_ / shifted_);
        if (other_ > end_ && end_ >= beyond_ && static_cast<float>(largest_) <= end_) {
            raised_  = true;
            largest_ = std::nextafter(end_, INF);
            peak_at_ = find_peak();
            // Sums of floats: where the others have next to nothing, rounding must not give them more.
            const double left = std::max(inside_ - std::exp(largest_ - top_), NEXT_TO_NOTHING);
            const double had  = std::max(shifted_ - 1, NEXT_TO_NOTHING);
            kept_             = std::min(kept_, top_ + std::log(left / had));
        }
    }

    int32_t find_peak() const {
        int32_t peak = 0;
        double  most = -DBL_MAX;
        for_candidate_blocks([&](int32_t begin, int32_t end) {
            for (int32_t i = begin; i < end; ++i) {
                const double after = z_[i] + settings_.lam * static_cast<double>(delta(i));
                if (z_[i] >= floor_ && after > most) {
                    peak = i;
                    most = after;
                }
            }
        });
        return peak;
    }

    // KL(adjusted ‖ teacher) = Σ p' · shift: the partition functions are one.
    double kl() const {
        double sum = weighted_ + shifted_ * (kept_ - top_);
        double all = shifted_;
        if (raised_) { // the peak's weight was 1, at a lead of 0
            const double weight = std::exp(largest_ - kept_), own = z_[peak_at_];
            sum += weight * (largest_ - own) - (kept_ - own);
            all += weight - 1;
        }
        return std::max(0.0, inside_ / (inside_ + outside_) * sum / all);
    }

    void write() {
        float *      z    = z_;
        const float *plus = plus_, *minus = minus_;
        const float  floor = floor_, two_epsilon = two_epsilon_;
        const double lam = settings_.lam, peak = peak_, kept = kept_;
        for_candidate_blocks([&](int32_t begin, int32_t end) {
#pragma omp simd
            for (int32_t i = begin; i < end; ++i) {
                const float  delta = (plus[i] - minus[i]) / two_epsilon;
                const double after = z[i] + lam * static_cast<double>(delta) - peak + kept;
                z[i]               = z[i] >= floor ? static_cast<float>(after) : z[i];
            }
        });
        if (raised_) {
            z[peak_at_] = static_cast<float>(largest_);
        }
    }

    float *        z_;
    const int32_t  n_;
    const float *  plus_;
    const float *  minus_;
    const int32_t  n_shared_;
    const Settings settings_;
    const Hidden & ends_;
    const float    two_epsilon_;
    const Blocks   blocks_;

    float   end_          = 0; // the largest logits: of an end, of a token beyond the shared, of any but an end, of all
    float   beyond_       = 0;
    float   other_        = 0;
    float   top_          = 0;
    float   floor_        = 0;
    double  inside_       = 0;
    double  outside_      = 0;
    double  sum_delta_    = 0; // a number if each candidate's Δ is
    int32_t n_candidates_ = 0;
    double  peak_         = 0;
    double  shifted_      = 0;
    double  weighted_     = 0;
    double  largest_      = 0; // adjusted logit of a candidate
    double  kept_         = 0; // that of a candidate with the peak's z + λΔ, but for the raised one
    bool    raised_       = false;
    int32_t peak_at_      = 0; // if raised
};

} // namespace

void check_strength(double strength, double guard) {
    if (!(strength >= 0 && std::isfinite(strength))) {
        throw Error{ADL_ERROR_INPUT, format("strength=%g: give nats from 0 (the plain teacher) up, for example 1.0", strength)};
    }
    if (!(guard >= 0 && guard <= 1)) {
        throw Error{ADL_ERROR_INPUT, format("guard=%g: give a share of the top token's probability, 0 (off) to 1, for example 0.05", guard)};
    }
}

double expectation(const Proxies & p, double epsilon) {
    const float *plus = p.plus, *minus = p.minus;
    float        top = -INF;
#pragma omp simd reduction(max : top)
    for (int32_t i = 0; i < p.n; ++i) {
        const float twice = plus[i] + minus[i];
        top               = twice > top ? twice : top;
    }
    double mass = 0, weighted = 0;
    for (int32_t begin = 0; begin < p.n; begin += MIN_BLOCK) {
        const int32_t end = std::min(begin + MIN_BLOCK, p.n);
        float         m = 0, w = 0;
#pragma omp simd reduction(+ : m, w)
        for (int32_t i = begin; i < end; ++i) {
            const float twice = plus[i] + minus[i];
            const float e     = exp_nonpositive(0.5f * (twice - top));
            m += e;
            w += twice < -FLT_MAX ? 0.0f : e * (plus[i] - minus[i]); // −inf has no weight and no Δ
        }
        mass += m;
        weighted += w;
    }
    return weighted / mass / (2 * epsilon);
}

int32_t n_candidates(const float * logits, int32_t n, int32_t n_shared, double guard, const Ends & ends) {
    const float top = top_of(logits, 0, n);
    const float floor = floor_of(top, guard);
    int32_t     count = 0, bad = 0;
#pragma omp simd reduction(+ : count, bad)
    for (int32_t i = 0; i < n; ++i) {
        bad += logits[i] != logits[i] ? 1 : 0;
        count += (i < n_shared ? 1 : 0) & (logits[i] >= floor ? 1 : 0);
    }
    if (bad > 0) {
        throw Error{ADL_ERROR_PROXY, NO_NUMBERS};
    }
    return count - static_cast<int32_t>(std::count_if(ends.ids, ends.ids + ends.n, [&](llama_token end) {
               return end < n_shared && logits[end] >= floor;
           }));
}

double dose(const Proxies & p, llama_token token, double epsilon, double mean) noexcept {
    if (token >= p.n) {
        return 0.0;
    }
    return static_cast<double>((p.plus[token] - p.minus[token]) / static_cast<float>(2 * epsilon)) - mean;
}

adl_row adjust(
        float * logits, int32_t n, const Proxies & proxies, int32_t n_shared, const Settings & settings, const Ends & ends, double mean) {
    if (!std::isfinite(mean)) {
        throw Error{ADL_ERROR_PROXY, "a proxy's logits are not numbers (NaN or inf); nothing emitted"};
    }
    const Hidden hidden(logits, ends);
    return Row(logits, n, proxies, n_shared, settings, hidden).adjust(mean);
}

} // namespace adl

int32_t adl_adjust(
        float * logits, int32_t n_vocab, const float * plus, const float * minus, int32_t n_proxy, int32_t n_shared,
        const llama_token * ends, size_t n_ends, double epsilon, double lam, double guard, struct adl_row * out) {
    return adl::status_of([&] {
        if (logits == nullptr || plus == nullptr || minus == nullptr || out == nullptr || (ends == nullptr && n_ends > 0)) {
            throw adl::Error{ADL_ERROR_INPUT, "adl_adjust: a pointer is NULL"};
        }
        if (n_shared < 1 || n_shared > n_vocab || n_shared > n_proxy) {
            throw adl::Error{ADL_ERROR_INPUT, adl::format("n_shared=%d: give 1 to n_vocab=%d and n_proxy=%d", n_shared, n_vocab, n_proxy)};
        }
        for (size_t i = 0; i < n_ends; ++i) {
            if (ends[i] < 0 || ends[i] >= n_vocab) {
                throw adl::Error{ADL_ERROR_INPUT, adl::format("ends: %d is none of the teacher's %d tokens", ends[i], n_vocab)};
            }
        }
        if (!(std::isfinite(epsilon) && epsilon > 0) || !std::isfinite(lam) || !(guard >= 0 && guard <= 1)) {
            throw adl::Error{ADL_ERROR_INPUT,
                             adl::format("epsilon=%g, lam=%g, guard=%g: give a positive ε, a finite λ and a guard from 0 to 1",
                                         epsilon, lam, guard)};
        }
        const adl::Proxies proxies = {plus, minus, n_proxy};
        const double       mean    = adl::expectation(proxies, epsilon);
        *out = adl::adjust(logits, n_vocab, proxies, n_shared, {epsilon, lam, guard}, {ends, n_ends}, mean);
        return static_cast<int32_t>(ADL_OK);
    });
}
