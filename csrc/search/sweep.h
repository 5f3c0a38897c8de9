// The alpha at which most samples are right.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iosr {

// The destination of the best alphas of S settings, (S,) each.
struct BestRows {
    double* alpha;
    double* low;
    double* high;
    std::uint8_t* ends;  // kLowerOpen and kUpperOpen if the plateau excludes that end
    std::int64_t* right;
};

// For each setting, count the intervals that cover each alpha from 0 to alpha_max, which is twice the largest finite
// end above 0 of the setting's intervals, or 2 without one. The best alpha is the middle of the widest plateau of the
// largest count (the first one of equals); a single point is a plateau of width 0. lower, upper, flags (S, V) as in
// intervals.h, without NaN. Uses up to `threads` threads, whose number doesn't change the result. Throws std::bad_alloc
// before any work if memory is insufficient.
void sweep(const double* lower, const double* upper, const std::uint8_t* flags, std::size_t n_settings,
           std::size_t n_samples, std::size_t threads, const BestRows& out);

}  // namespace iosr
