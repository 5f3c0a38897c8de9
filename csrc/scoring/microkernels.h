// The inner loops that differ between instruction sets: one table of functions for each, one source file each.
//
// The driver (score.cpp) is compiled for the baseline processor. Only these functions are compiled with wider flags, so
// that the rest of the program can't link an inline function of the standard library from a wide file.
#pragma once

#include <cstddef>

#include "scoring/plan.h"

namespace iosr {

// A panel is P queries packed channel by channel: panel[d * P + lane]; missing queries are zero.
constexpr std::size_t kMaxPanel = 32;

struct Microkernels {
    std::size_t panel;  // P, at most kMaxPanel

    // dots[r * P + lane] = <rows[r], the lane's query>; rows (n_rows, width).
    void (*dot_panel)(const float* rows, std::size_t n_rows, std::size_t width, const float* panel, float* dots);

    // sums[lane] = sum over r: weights[r] * exp2(scale * key_scales[r] * dots[r * P + lane] - scale).
    void (*exp_sum)(const float* dots, std::size_t n_rows, float scale, const float* key_scales, const float* weights,
                    float* sums);

    // out[i] = the i-th of n keys' channels as float (an int8 code without its scale).
    void (*widen)(const void* channels, KeyType type, std::size_t n, float* out);

    // dots[b * stride + r] = <rows[r], queries[b]>; rows (n_rows, width) of `type`, queries (n_queries, width).
    void (*dot_rows)(const void* rows, KeyType type, std::size_t n_rows, std::size_t width, const float* queries,
                     std::size_t n_queries, float* dots, std::size_t stride);

    // dots[i] = weights[i] * exp2(scale * key_scales[i] * dots[i] - scale), in place.
    void (*exp_run)(float* dots, std::size_t n, float scale, const float* key_scales, const float* weights);
};

extern const Microkernels kScalarKernels;
#ifdef IOSR_FAST_X86
extern const Microkernels kAvx2Kernels;
extern const Microkernels kAvx512Kernels;
#endif
#ifdef IOSR_FAST_NEON
extern const Microkernels kNeonKernels;
#endif

}  // namespace iosr
