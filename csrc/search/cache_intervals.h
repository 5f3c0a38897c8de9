// The alphas at which a sample is right, for a cache at many settings.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scoring/microkernels.h"
#include "search/intervals.h"

namespace iosr {

// Setting k * G + g has
//     z = base + gammas[g] * extra
//     s[v, c] = sum over keys j of class c: weights[k, j] * exp(-betas[k] * (1 - <query[v], keys[j]>))
// All arrays are row-major and contiguous, and checked by the caller; a null pointer omits its factor or term.
struct CacheView {
    std::size_t n_samples = 0;                    // V
    std::size_t n_classes = 0;                    // C
    std::size_t width = 0;                        // D
    std::size_t n_betas = 0;                      // K
    std::size_t n_gammas = 1;                     // G, 1 without extra
    const float* base = nullptr;                  // (V, C)
    const float* extra = nullptr;                 // (V, C)
    const double* gammas = nullptr;               // (G,)
    const float* query = nullptr;                 // (V, D)
    const float* keys = nullptr;                  // (N, D), sorted by class
    const std::int64_t* class_offsets = nullptr;  // (C + 1,), as in scoring/plan.h
    const double* betas = nullptr;                // (K,)
    const float* weights = nullptr;               // (K, N)
    const std::int64_t* labels = nullptr;         // (V,), in [0, C)
};

// Writes the intervals (K * G, V) with up to `threads` threads (at least 1), whose number doesn't change the result. It
// stores nothing of size V x N, N x C or V x C: besides its arguments it uses about 10 MB per thread, and more only if
// 16 * C bytes per lane exceed that. Throws std::bad_alloc before any work if memory is insufficient.
void cache_intervals(const CacheView& cache, const Microkernels& kernels, std::size_t threads,
                     const IntervalRows& out);

}  // namespace iosr
