// The alphas at which a sample is right.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iosr {

// Flags of an interval of alphas. The ends of an empty one have no meaning.
enum IntervalFlags : std::uint8_t { kLowerOpen = 1, kUpperOpen = 2, kEmpty = 4 };

// The destination of intervals, (n,) each.
struct IntervalRows {
    double* lower;
    double* upper;
    std::uint8_t* flags;

    IntervalRows from(std::size_t i) const { return {lower + i, upper + i, flags + i}; }
};

// Panels are (C, stride) with one sample per lane; stride is a multiple of kLaneGroup, the lanes processed at once.
constexpr std::size_t kLaneGroup = 8;

// The intervals of the first `lanes` samples of a panel; other lanes are ignored. A sample with label y and logits z +
// alpha * s is right if the first of its largest logits is y. With d = s_y - s_c and e = z_c - z_y each other class c
// requires
//     alpha >= e / d  if d > 0,    alpha <= e / d  if d < 0,    e <= 0  if d == 0,
// without equality if c < y. Lower starts at 0, and is infinite if d == 0 and e is too large; upper starts at infinity.
//     e       (C, stride) panel of z_c - z_y
//     slope   (C, stride) panel of s_c
//     labels  (lanes,)
void panel_intervals(const double* e, const double* slope, std::size_t stride, std::size_t n_classes,
                     const std::int64_t* labels, std::size_t lanes, const IntervalRows& out);

// e of samples [first, first + lanes) as a panel, other lanes 0, with z = base + gamma * extra; base and extra (V, C),
// extra may be null; labels (V,).
void pack_differences(const float* base, const float* extra, double gamma, const std::int64_t* labels,
                      std::size_t first, std::size_t lanes, std::size_t n_classes, std::size_t stride, double* e);

// The intervals of all V samples: base (z) and slope (s) (V, C), row-major; labels (V,) in [0, C). Up to `threads`
// threads, whose number doesn't change the result.
void find_intervals(const float* base, const float* slope, const std::int64_t* labels, std::size_t n_samples,
                    std::size_t n_classes, std::size_t threads, const IntervalRows& out);

}  // namespace iosr
