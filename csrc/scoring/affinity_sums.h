// The cache term of a scoring plan.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scoring/microkernels.h"

namespace iosr {

// Views of a plan's arrays, row-major and contiguous; the caller checks shapes. Either class_offsets or values is
// given.
struct CacheTerm {
    std::size_t n_keys = 0;  // N
    std::size_t n_classes = 0;  // C
    std::size_t width = 0;      // D
    const void* keys = nullptr;  // (N, D) of key_type
    ElementType key_type = ElementType::kFloat32;
    const float* key_scales = nullptr;            // (N,), or null: ones
    const float* weights = nullptr;               // (N,), or null: ones
    const std::int64_t* class_offsets = nullptr;  // (C + 1,): class c owns keys [offsets[c], offsets[c + 1])
    const void* values = nullptr;                 // (N, C) of value_type, float32 or float16
    ElementType value_type = ElementType::kFloat32;
    float alpha = 0.0F;
    float beta = 0.0F;
};

// With affinity[b, j] = weights[j] * exp(-beta * (1 - key_scales[j] * <queries[b], keys[j]>)):
//   logits[b, c] += alpha * sum over keys j of class c: affinity[b, j]              with class_offsets
//   logits[b, c] += alpha * sum over all keys j: affinity[b, j] * values[j, c]      with values
// queries (B, D), logits (B, C). Uses up to `threads` threads (at least 1), whose number doesn't change the result. May
// be called from several threads at once. Besides its arguments it uses memory for packed queries and partial sums:
// about 45 MB at most for D <= 12288 and C <= 30000, and 1 MB per thread. Throws std::bad_alloc before any work if
// memory is insufficient.
void affinity_sums(const CacheTerm& term, const float* queries, std::size_t n_queries, const Microkernels& kernels,
                   std::size_t threads, float* logits);

}  // namespace iosr
