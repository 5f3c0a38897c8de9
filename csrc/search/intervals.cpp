#include "search/intervals.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "scoring/buffers.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::size_t kThreadWork = 1 << 17;  // differences that justify waking a thread
constexpr double kRounding = 0x1p-17;  // numpy_search.ROUNDING, 64 roundings of float32

// The bounds of one group of lanes so far, with excluded bounds (strict) apart from the others: every step is a plain
// maximum or minimum, and one comparison at the end decides whether an end is open. The loop over lanes has no
// branches, so that the compiler vectorises it.
struct Bounds {
    double lower[kLaneGroup], lower_strict[kLaneGroup], upper[kLaneGroup], upper_strict[kLaneGroup];
};

inline void narrow(Bounds& bounds, const double* e, const double* slope, const double* own_slope, const double* label,
                   double c) {
    for (std::size_t i = 0; i < kLaneGroup; ++i) {
        const double exact = own_slope[i] - slope[i];
        const double size = std::abs(own_slope[i]) + std::abs(slope[i]);
        const double d = (std::abs(exact) <= kRounding * size) & (e[i] != 0.0) ? 0.0 : exact;
        const double bound = e[i] / d;
        const bool strict = c < label[i];
        const bool beaten = (d == 0.0) & ((e[i] > 0.0) | ((e[i] == 0.0) & strict));
        const double rising = d > 0.0 ? bound : -kInfinity;
        const double below = beaten ? kInfinity : rising;
        const double above = d < 0.0 ? bound : kInfinity;
        const double below_strict = strict ? below : -kInfinity;
        const double below_loose = strict ? -kInfinity : below;
        const double above_strict = strict ? above : kInfinity;
        const double above_loose = strict ? kInfinity : above;
        bounds.lower[i] = bounds.lower[i] > below_loose ? bounds.lower[i] : below_loose;
        bounds.lower_strict[i] = bounds.lower_strict[i] > below_strict ? bounds.lower_strict[i] : below_strict;
        bounds.upper[i] = bounds.upper[i] < above_loose ? bounds.upper[i] : above_loose;
        bounds.upper_strict[i] = bounds.upper_strict[i] < above_strict ? bounds.upper_strict[i] : above_strict;
    }
}

void write(const Bounds& bounds, std::size_t i, const IntervalRows& out) {
    const bool lower_open = bounds.lower_strict[i] >= bounds.lower[i];
    const bool upper_open = bounds.upper_strict[i] <= bounds.upper[i] && bounds.upper_strict[i] < kInfinity;
    // Adding 0 turns -0 into 0.
    const double lower = std::max(bounds.lower[i], bounds.lower_strict[i]) + 0.0;
    const double upper = std::min(bounds.upper[i], bounds.upper_strict[i]) + 0.0;
    const bool empty = lower == kInfinity || lower > upper || (lower == upper && (lower_open || upper_open));
    *out.lower = lower;
    *out.upper = upper;
    *out.flags = static_cast<std::uint8_t>((lower_open ? kLowerOpen : 0) | (upper_open ? kUpperOpen : 0) |
                                           (empty ? kEmpty : 0));
}

}  // namespace

void panel_intervals(const double* e, const double* slope, std::size_t stride, std::size_t n_classes,
                     const std::int64_t* labels, std::size_t lanes, const IntervalRows& out) {
    for (std::size_t first = 0; first < lanes; first += kLaneGroup) {
        const std::size_t n = std::min(kLaneGroup, lanes - first);
        Bounds bounds;
        double own_slope[kLaneGroup] = {};
        double label[kLaneGroup] = {};
        for (std::size_t i = 0; i < kLaneGroup; ++i) {
            bounds.lower[i] = 0.0;
            bounds.lower_strict[i] = -kInfinity;
            bounds.upper[i] = bounds.upper_strict[i] = kInfinity;
            if (i < n) {
                own_slope[i] = slope[static_cast<std::size_t>(labels[first + i]) * stride + first + i];
                label[i] = static_cast<double>(labels[first + i]);
            }
        }
        for (std::size_t c = 0; c < n_classes; ++c) {
            const std::size_t at = c * stride + first;
            narrow(bounds, e + at, slope + at, own_slope, label, static_cast<double>(c));
        }
        for (std::size_t i = 0; i < n; ++i) {
            write(bounds, i, out.from(first + i));
        }
    }
}

void pack_differences(const float* base, const float* extra, double gamma, const std::int64_t* labels,
                      std::size_t first, std::size_t lanes, std::size_t n_classes, std::size_t stride, double* e) {
    for (std::size_t lane = 0; lane < stride; ++lane) {
        const std::size_t row = (first + lane) * n_classes;
        const auto z = [&](std::size_t c) {
            return extra == nullptr ? static_cast<double>(base[row + c]) : base[row + c] + gamma * extra[row + c];
        };
        const double own = lane < lanes ? z(static_cast<std::size_t>(labels[first + lane])) : 0.0;
        for (std::size_t c = 0; c < n_classes; ++c) {
            e[c * stride + lane] = lane < lanes ? z(c) - own : 0.0;
        }
    }
}

void find_intervals(const float* base, const float* slope, const std::int64_t* labels, std::size_t n_samples,
                    std::size_t n_classes, std::size_t threads, const IntervalRows& out) {
    const std::size_t workers = std::clamp<std::size_t>(n_samples * n_classes / kThreadWork, 1, threads);
    const std::size_t panel = n_classes * kLaneGroup;
    const Buffer<double> scratch = make_buffer<double>(2 * workers * panel);
    run_phases(workers, {{ceil_div(n_samples, kLaneGroup), [&](std::size_t worker, std::size_t i) {
                              double* e = scratch.get() + 2 * worker * panel;
                              double* s = e + panel;
                              const std::size_t first = i * kLaneGroup;
                              const std::size_t lanes = std::min(kLaneGroup, n_samples - first);
                              pack_differences(base, nullptr, 0.0, labels, first, lanes, n_classes, kLaneGroup, e);
                              for (std::size_t lane = 0; lane < kLaneGroup; ++lane) {
                                  for (std::size_t c = 0; c < n_classes; ++c) {
                                      s[c * kLaneGroup + lane] =
                                          lane < lanes ? slope[(first + lane) * n_classes + c] : 0.0F;
                                  }
                              }
                              panel_intervals(e, s, kLaneGroup, n_classes, labels + first, lanes, out.from(first));
                          }}});
}

}  // namespace iosr
