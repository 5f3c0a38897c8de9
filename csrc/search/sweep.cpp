// A position on the axis of alphas is twice v's bits for the point v, and one more for just after it. (Numbers >= 0
// sort like their bits.) An interval, open or closed, covers the positions from its start to before its end, so the
// number of right samples changes at positions only: the sweep sorts starts and ends and merges both.
#include "search/sweep.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "scoring/buffers.h"
#include "scoring/threads.h"
#include "search/intervals.h"

namespace iosr {
namespace {

constexpr std::size_t kThreadWork = 1 << 13;  // intervals that justify waking a thread

std::uint64_t position(double alpha, bool after) {
    std::uint64_t bits;
    std::memcpy(&bits, &alpha, sizeof(bits));
    return bits << 1 | (after ? 1U : 0U);  // the sign bit, which is shifted out, is 0
}

double alpha_at(std::uint64_t position) {
    const std::uint64_t bits = position >> 1;
    double alpha;
    std::memcpy(&alpha, &bits, sizeof(alpha));
    return alpha;
}

struct Plateau {
    std::uint64_t begin = 0, end = 0;
    std::int64_t right = -1;

    double width() const { return alpha_at(end) - alpha_at(begin); }
    bool beats(const Plateau& other) const {
        return right > other.right || (right == other.right && width() > other.width());
    }
};

// Intervals of one setting, cut to the range of alphas.
class Setting {
  public:
    Setting(const double* lower, const double* upper, const std::uint8_t* flags, std::size_t n,
            std::uint64_t* starts, std::uint64_t* ends)
        : starts_(starts), ends_(ends) {
        const double alpha_max = twice_the_largest_end(lower, upper, flags, n);
        for (std::size_t v = 0; v < n; ++v) {
            if ((flags[v] & kEmpty) != 0 || !(lower[v] <= alpha_max && upper[v] >= 0.0)) {
                continue;
            }
            // Adding 0 turns -0 into 0.
            const std::uint64_t start =
                lower[v] >= 0.0 ? position(lower[v] + 0.0, (flags[v] & kLowerOpen) != 0) : position(0.0, false);
            const std::uint64_t end = upper[v] <= alpha_max ? position(upper[v] + 0.0, (flags[v] & kUpperOpen) == 0)
                                                            : position(alpha_max, true);
            if (start < end) {
                starts_[n_] = start;
                ends_[n_++] = end;
            }
        }
        std::sort(starts_, starts_ + n_);
        std::sort(ends_, ends_ + n_);
        end_ = position(alpha_max, true);
    }

    Plateau best() const {
        Plateau best;
        Plateau plateau;  // the current one
        plateau.right = 0;
        std::size_t s = 0;
        std::size_t e = 0;
        while (s < n_ || e < n_) {
            const std::uint64_t here = s < n_ ? std::min(starts_[s], ends_[e]) : ends_[e];
            std::int64_t right = plateau.right;
            for (; s < n_ && starts_[s] == here; ++s) {
                ++right;
            }
            for (; e < n_ && ends_[e] == here; ++e) {
                --right;
            }
            if (right != plateau.right) {
                finish(plateau, here, best);
                plateau.begin = here;
                plateau.right = right;
            }
        }
        finish(plateau, end_, best);
        return best;
    }

  private:
    static void finish(Plateau& plateau, std::uint64_t end, Plateau& best) {
        plateau.end = end;
        if (plateau.begin < end && plateau.beats(best)) {
            best = plateau;
        }
    }

    static double twice_the_largest_end(const double* lower, const double* upper, const std::uint8_t* flags,
                                        std::size_t n) {
        constexpr double kLargest = std::numeric_limits<double>::max();
        double largest = 0.0;
        for (std::size_t v = 0; v < n; ++v) {
            for (const double end : {lower[v], upper[v]}) {
                if ((flags[v] & kEmpty) == 0 && end > largest && end <= kLargest) {
                    largest = end;
                }
            }
        }
        return largest == 0.0 ? 2.0 : std::min(2.0 * largest, kLargest);
    }

    std::uint64_t* starts_;
    std::uint64_t* ends_;
    std::size_t n_ = 0;
    std::uint64_t end_;
};

}  // namespace

void sweep(const double* lower, const double* upper, const std::uint8_t* flags, std::size_t n_settings,
           std::size_t n_samples, std::size_t threads, const BestRows& out) {
    const std::size_t workers =
        std::clamp<std::size_t>(std::min(n_settings, n_settings * n_samples / kThreadWork), 1, threads);
    const Buffer<std::uint64_t> scratch = make_buffer<std::uint64_t>(2 * workers * n_samples);
    run_phases(workers, {{n_settings, [&](std::size_t worker, std::size_t i) {
                              std::uint64_t* starts = scratch.get() + 2 * worker * n_samples;
                              const std::size_t row = i * n_samples;
                              const Setting setting(lower + row, upper + row, flags + row, n_samples, starts,
                                                    starts + n_samples);
                              const Plateau best = setting.best();
                              out.low[i] = alpha_at(best.begin);
                              out.high[i] = alpha_at(best.end);
                              out.alpha[i] = out.low[i] + (out.high[i] - out.low[i]) / 2.0;
                              out.ends[i] = static_cast<std::uint8_t>(((best.begin & 1U) != 0 ? kLowerOpen : 0) |
                                                                      ((best.end & 1U) == 0 ? kUpperOpen : 0));
                              out.right[i] = best.right;
                          }}});
}

}  // namespace iosr
