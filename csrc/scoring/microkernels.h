// The inner loops that differ between instruction sets: one table of functions for each, one source file each.
//
// The drivers (affinity_sums.cpp, product.cpp) are compiled for the baseline processor. Only these functions are
// compiled with wider flags, so that the rest of the program can't link an inline function of the standard library from
// a wide file.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iosr {

enum class ElementType { kFloat32, kFloat16, kBfloat16, kInt8 };

// A panel is P queries packed channel by channel: panel[d * P + lane]; missing queries are zero.
constexpr std::size_t kMaxPanel = 32;

constexpr std::size_t kTileRows = 6;  // rows of a tile of any panel
constexpr std::size_t kVector = 16;   // a multiple of any vector's lanes
// Values are summed in whole tiles or vectors: so many elements more than a block of values are read, and sums of
// classes that don't exist are written, up to a multiple of 48 classes.
constexpr std::size_t kReadAhead = kVector;
constexpr std::size_t kWholeClasses = 3 * kVector;

struct Microkernels {
    std::size_t panel;  // P, at most kMaxPanel

    // dots[r * P + lane] = <rows[r], the lane's query>; rows (n_rows, width). Prefetches `bytes` of `ahead`, unless
    // null.
    void (*dot_panel)(const float* rows, std::size_t n_rows, std::size_t width, const float* panel, float* dots,
                      const void* ahead, std::size_t bytes);

    // tile[r * P + lane] = weights[r] * exp2(scale * key_scales[r] * tile[r * P + lane] - scale), in place.
    void (*exp_tile)(float* tile, std::size_t n_rows, float scale, const float* key_scales, const float* weights);

    // sums[c * P + lane] (+)= sum over r: values[r, c] * tile[r * P + lane]; values (n_keys, n_classes).
    // Prefetches as dot_panel does.
    void (*sum_panel)(const float* values, std::size_t n_keys, std::size_t n_classes, const float* tile, float* sums,
                      bool add, const void* ahead, std::size_t bytes);

    // out[i] = the i-th of n elements as float (an int8 code without its scale).
    void (*widen)(const void* elements, ElementType type, std::size_t n, float* out);

    // dots[b * stride + r] = <rows[r], queries[b]>; rows (n_rows, width) of `type`, queries (n_queries, width). A dot's
    // bits depend on its row and its query alone.
    void (*dot_rows)(const void* rows, ElementType type, std::size_t n_rows, std::size_t width, const float* queries,
                     std::size_t n_queries, float* dots, std::size_t stride);

    // dots[i] = weights[i] * exp2(scale * key_scales[i] * dots[i] - scale), in place, for n dots; more are changed, up
    // to the next multiple of kVector.
    void (*exp_run)(float* dots, std::size_t n, float scale, const float* key_scales, const float* weights);

    // sums[b * sums_stride + c] (+)= sum over r: affinities[b * stride + r] * values[r, c]; values (n_keys, n_classes)
    // of `type`.
    void (*sum_rows)(const void* values, ElementType type, std::size_t n_keys, std::size_t n_classes,
                     const float* affinities, std::size_t n_queries, std::size_t stride, float* sums,
                     std::size_t sums_stride, bool add);
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
