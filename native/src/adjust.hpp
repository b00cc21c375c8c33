// The equation, for one row.

#pragma once

#include "adlocal.h"

#include <cstddef>

namespace adl {

struct Proxies {
    const float * plus;
    const float * minus;
    int32_t       n; // vocabulary of both
};

struct Settings {
    double epsilon;
    double lam;   // λ
    double guard; // 0 to 1
};

// Indices of a row that end generation. They keep their logits.
struct Ends {
    const llama_token * ids;
    size_t              n;
};

// Throws Error{ADL_ERROR_INPUT} unless strength is finite and not negative, and guard within 0 and 1.
void check_strength(double strength, double guard);

// E[Δ] under softmax((z₊ + z₋) / 2). NaN if any of the logits is NaN or +inf.
double expectation(const Proxies & proxies, double epsilon);

// How many of the teacher's tokens below n_shared pass the guard, without ends: what adjust() would count. Throws Error when
// the row is no numbers.
int32_t n_candidates(const float * logits, int32_t n, int32_t n_shared, double guard, const Ends & ends);

// Δ of a token, centred: less `mean`, which is what expectation() gave. 0 for a token that the proxies do not know.
double dose(const Proxies & proxies, llama_token token, double epsilon, double mean) noexcept;

// Adjusts `logits` (n) in place, ids below n_shared only and no ends. Throws Error and changes nothing when a number is not
// finite that has to be. `mean` is what expectation() gave.
adl_row adjust(
        float * logits, int32_t n, const Proxies & proxies, int32_t n_shared, const Settings & settings, const Ends & ends, double mean);

} // namespace adl
