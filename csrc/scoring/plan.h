// Arguments of a scoring kernel: views of arrays that it doesn't own. The caller checks shapes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scoring/microkernels.h"

namespace iosr {

// logits[b, c] = tau * <plain[b], text[c]>
//              + alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - key_scales[j] * <query[b], keys[j]>))
//              + <feature[b], linear[c]> + bias[c]
// All arrays are row-major and contiguous; a null pointer omits its term (for weights and scales, its factor).
struct PlanView {
    std::size_t n_classes = 0;  // C
    std::size_t width = 0;      // D
    const float* text = nullptr;  // (C, D)
    const void* keys = nullptr;   // (N, D) of key_type, sorted by class
    ElementType key_type = ElementType::kFloat32;
    const float* key_scales = nullptr;            // (N,)
    const std::int64_t* class_offsets = nullptr;  // (C + 1,): class c owns keys [class_offsets[c], class_offsets[c + 1])
    const float* weights = nullptr;               // (N,)
    const float* query_transform = nullptr;       // (D, D): query_transform @ query[b] replaces query[b] in the cache term
    const float* linear = nullptr;                // (C, D)
    const float* bias = nullptr;                  // (C,)
    float tau = 0.0F;
    float alpha = 0.0F;
    float beta = 0.0F;
};

// The embeddings that each term reads, (B, D) each; they may be the same array.
struct QueryView {
    std::size_t n_queries = 0;       // B
    const float* plain = nullptr;    // read with text
    const float* query = nullptr;    // read with keys
    const float* feature = nullptr;  // read with linear
};

}  // namespace iosr
