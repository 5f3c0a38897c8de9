// The alphas at which a sample is right.
#pragma once

#include <cstddef>
#include <cstdint>

namespace iosr {

// Of an interval of alphas. What an empty one says of its ends means nothing.
enum IntervalFlags : std::uint8_t { kLowerOpen = 1, kUpperOpen = 2, kEmpty = 4 };

// Where intervals are written to, (n,) each.
struct IntervalRows {
    double* lower;
    double* upper;
    std::uint8_t* flags;

    IntervalRows from(std::size_t i) const { return {lower + i, upper + i, flags + i}; }
};

// Panels are (C, stride) with a sample a lane; stride is a multiple of kLaneGroup, and so many are worked on at once.
constexpr std::size_t kLaneGroup = 8;

// The intervals of the first `lanes` samples of a panel, whatever the other lanes hold. A sample with label y and
// logits z + alpha * s is right where the first of its largest logits is y. With d = s_y - s_c and e = z_c - z_y each
// other class c asks for
//     alpha >= e / d  where d > 0,    alpha <= e / d  where d < 0,    e <= 0  where d == 0,
// the bound itself left out where c < y. Lower begins at 0, and is infinite where d == 0 and e is too large; upper
// begins at infinity.
//     e       (C, stride) panel of z_c - z_y
//     slope   (C, stride) panel of s_c
//     labels  (lanes,)
void panel_intervals(const double* e, const double* slope, std::size_t stride, std::size_t n_classes,
                     const std::int64_t* labels, std::size_t lanes, const IntervalRows& out);

// e of samples [first, first + lanes) as a panel, other lanes 0, where z = base + gamma * extra; base and extra (V, C),
// of which extra may be null; labels (V,).
void pack_differences(const float* base, const float* extra, double gamma, const std::int64_t* labels,
                      std::size_t first, std::size_t lanes, std::size_t n_classes, std::size_t stride, double* e);

// The intervals of all V samples: base (z) and slope (s) (V, C), row-major; labels (V,) in [0, C). Up to `threads`
// threads, on which the result doesn't depend.
void find_intervals(const float* base, const float* slope, const std::int64_t* labels, std::size_t n_samples,
                    std::size_t n_classes, std::size_t threads, const IntervalRows& out);

}  // namespace iosr
