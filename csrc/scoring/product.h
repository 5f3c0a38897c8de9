// The product of rows and a matrix, for all terms of a scoring plan but the cache term.
#pragma once

#include <cstddef>

#include "scoring/microkernels.h"

namespace iosr {

// logits (B, C) += factor * rows (B, K) @ matrix' (C, K), with up to `threads` threads (at least 1), whose number
// doesn't change the result. A row's logits have the same bits in any batch.
void add_product(const float* rows, std::size_t n_rows, const float* matrix, std::size_t n_classes, std::size_t width,
                 float factor, const Microkernels& kernels, std::size_t threads, float* logits);

// Whether each of rows (B, K) is finite and its norm differs from 1 by no more than `tolerance`.
bool unit_rows(const float* rows, std::size_t n_rows, std::size_t width, float tolerance, const Microkernels& kernels);

}  // namespace iosr
