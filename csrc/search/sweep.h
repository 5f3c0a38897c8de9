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

// For each setting the middle of the widest plateau (the first of equals) of the number of intervals that cover an
// alpha from 0 to twice the largest finite end above 0 of the setting's intervals, or to 2 without one; a single point is
// a plateau of width 0. lower, upper, flags (S, V) as in intervals.h, without NaN. Up to `threads` threads, whose number doesn't change the result. Throws std::bad_alloc before any work.
void sweep(const double* lower, const double* upper, const std::uint8_t* flags, std::size_t n_settings,
           std::size_t n_samples, std::size_t threads, const BestRows& out);

}  // namespace iosr
