// Tests of the search that need no Python, so that they run under the sanitizers (make sanitize).
//
// Intervals and sweep against rational arithmetic, the search over a cache against its formula in double, on every path
// that this processor can run and on the wide one in plain C++.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "search/cache_intervals.h"
#include "search/intervals.h"
#include "search/sweep.h"
#include "tests/support.h"

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::size_t below(std::size_t n) { return rng() % n; }

// Arrays are exactly as long as they must be, so that a sanitizer sees a read or a write past their end.
struct Found {
    std::vector<double> lower, upper;
    std::vector<std::uint8_t> flags;

    explicit Found(std::size_t n) : lower(n, std::nan("")), upper(n, std::nan("")), flags(n, 255) {}
    iosr::IntervalRows rows() { return {lower.data(), upper.data(), flags.data()}; }
    bool operator==(const Found& other) const {
        return lower == other.lower && upper == other.upper && flags == other.flags;
    }
};

struct Best {
    double alpha = -1.0, low = -1.0, high = -1.0;
    std::uint8_t ends = 255;
    std::int64_t right = -1;
};

std::vector<Best> sweep(const Found& found, std::size_t n_settings, std::size_t threads) {
    std::vector<double> alpha(n_settings), low(n_settings), high(n_settings);
    std::vector<std::uint8_t> ends(n_settings);
    std::vector<std::int64_t> right(n_settings);
    iosr::sweep(found.lower.data(), found.upper.data(), found.flags.data(), n_settings, found.lower.size() / n_settings,
                threads, {alpha.data(), low.data(), high.data(), ends.data(), right.data()});
    std::vector<Best> best(n_settings);
    for (std::size_t s = 0; s < n_settings; ++s) {
        best[s] = {alpha[s], low[s], high[s], ends[s], right[s]};
    }
    return best;
}

struct Fraction {
    std::int64_t up, down;  // down > 0

    bool operator<(const Fraction& other) const { return up * other.down < other.up * down; }
    bool operator==(const Fraction& other) const { return up * other.down == other.up * down; }
    double value() const { return static_cast<double>(up) / static_cast<double>(down); }
};

// Logits of small whole numbers, so that ties abound and rational arithmetic is exact.
struct Whole {
    std::size_t n, n_classes;
    std::vector<float> base, slope;
    std::vector<std::int64_t> labels;

    Whole(std::size_t n_, std::size_t n_classes_, std::size_t largest) : n(n_), n_classes(n_classes_) {
        for (std::size_t i = 0; i < n * n_classes; ++i) {
            base.push_back(static_cast<float>(below(2 * largest + 1)) - static_cast<float>(largest));
            slope.push_back(static_cast<float>(below(2 * largest + 1)) - static_cast<float>(largest));
        }
        for (std::size_t v = 0; v < n; ++v) {
            labels.push_back(static_cast<std::int64_t>(below(n_classes)));
        }
    }

    std::int64_t logit(std::size_t v, std::size_t c, Fraction alpha) const {  // times alpha.down
        const std::size_t i = v * n_classes + c;
        return static_cast<std::int64_t>(base[i]) * alpha.down + static_cast<std::int64_t>(slope[i]) * alpha.up;
    }

    std::int64_t right(Fraction alpha) const {
        std::int64_t count = 0;
        for (std::size_t v = 0; v < n; ++v) {
            std::size_t first = 0;
            for (std::size_t c = 1; c < n_classes; ++c) {
                first = logit(v, c, alpha) > logit(v, first, alpha) ? c : first;
            }
            count += static_cast<std::int64_t>(first) == labels[v] ? 1 : 0;
        }
        return count;
    }

    // Where the order of two logits changes, from 0 to alpha_max.
    std::vector<Fraction> crossings(Fraction alpha_max) const {
        std::vector<Fraction> found = {{0, 1}, alpha_max};
        for (std::size_t v = 0; v < n; ++v) {
            const auto y = static_cast<std::size_t>(labels[v]);
            for (std::size_t c = 0; c < n_classes; ++c) {
                const std::int64_t e = logit(v, c, {0, 1}) - logit(v, y, {0, 1});
                const std::int64_t d = logit(v, y, {1, 1}) - logit(v, c, {1, 1}) + e;
                const Fraction cross = d > 0 ? Fraction{e, d} : Fraction{-e, -d};
                if (d != 0 && Fraction{0, 1} < cross && cross < alpha_max) {
                    found.push_back(cross);
                }
            }
        }
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        return found;
    }

    // The best plateau, found by counting at every crossing and between each two.
    Best best(Fraction alpha_max) const {
        const std::vector<Fraction> points = crossings(alpha_max);
        std::vector<std::int64_t> counts;  // at a point, beside it, at the next point, ...
        for (std::size_t i = 0; i < points.size(); ++i) {
            counts.push_back(right(points[i]));
            if (i + 1 < points.size()) {
                const Fraction a = points[i];
                const Fraction b = points[i + 1];
                counts.push_back(right({a.up * b.down + b.up * a.down, 2 * a.down * b.down}));
            }
        }
        Best best;
        best.right = *std::max_element(counts.begin(), counts.end());
        double width = -1.0;
        for (std::size_t i = 0; i < counts.size(); ++i) {
            std::size_t last = i;
            while (last + 1 < counts.size() && counts[last + 1] == counts[i]) {
                ++last;
            }
            const double low = points[i / 2].value();
            const double high = points[(last + 1) / 2].value();
            if (counts[i] == best.right && high - low > width) {
                width = high - low;
                best.low = low;
                best.high = high;
                best.alpha = low + width / 2;
                best.ends = static_cast<std::uint8_t>((i % 2 == 1 ? iosr::kLowerOpen : 0) |
                                                      (last % 2 == 1 ? iosr::kUpperOpen : 0));
            }
            i = last;
        }
        return best;
    }
};

Fraction twice_the_largest_end(const Whole& whole, const Found& found) {
    Fraction largest = {1, 1};
    for (const Fraction point : whole.crossings({1000, 1})) {  // in ascending order
        for (std::size_t v = 0; v < whole.n; ++v) {
            const bool is_end = found.lower[v] == point.value() || found.upper[v] == point.value();
            if (point.up > 0 && is_end && (found.flags[v] & iosr::kEmpty) == 0) {
                largest = point;
            }
        }
    }
    return {2 * largest.up, largest.down};
}

void test_intervals_and_sweep_are_exact() {
    for (const std::size_t n_classes : {1, 2, 3, 9}) {
        for (const std::size_t n : {1, 7, 8, 9, 30}) {
            for (const std::size_t largest : {1, 4}) {
                for (int repeat = 0; repeat < 4; ++repeat) {
                    const Whole whole(n, n_classes, largest);
                    Found found(n);
                    iosr::find_intervals(whole.base.data(), whole.slope.data(), whole.labels.data(), n, n_classes, 2,
                                         found.rows());
                    const Best truth = whole.best(twice_the_largest_end(whole, found));
                    const Best got = sweep(found, 1, 2)[0];
                    check(got.right == truth.right && got.low == truth.low && got.high == truth.high &&
                              got.alpha == truth.alpha && got.ends == truth.ends,
                          "sweep of " + std::to_string(n) + " x " + std::to_string(n_classes));
                }
            }
        }
    }
}

void test_the_domain() {
    check(sweep(Found(0), 1, 1)[0].alpha == 1.0, "no samples: the middle of [0, 2]");
    Found found(3);
    found.lower = {1.0, 2.0, 3.0};
    found.upper = {4.0, kInfinity, 9.0};
    found.flags = {0, iosr::kLowerOpen, iosr::kEmpty};
    Best best = sweep(found, 1, 1)[0];
    check(best.low == 2.0 && best.high == 4.0 && best.right == 2 && best.ends == iosr::kLowerOpen, "two overlap");
    best = sweep(found, 3, 3)[1];
    check(best.low == 2.0 && best.high == 4.0 && best.right == 1, "a plateau without end goes to twice its start");
    best = sweep(found, 3, 3)[2];
    check(best.low == 0.0 && best.high == 2.0 && best.right == 0, "an empty interval's ends don't count");
    Found apart(3);
    apart.lower = {5.0, 1.0, 3.0};
    apart.upper = {6.0, 2.0, 4.0};
    apart.flags = {0, 0, 0};
    check(sweep(apart, 1, 1)[0].alpha == 1.5, "the first of equally wide plateaus");
}

void test_intervals_with_threads() {
    const Whole whole(3000, 120, 3);
    Found alone(3000);
    iosr::find_intervals(whole.base.data(), whole.slope.data(), whole.labels.data(), 3000, 120, 1, alone.rows());
    const std::vector<Best> best = sweep(alone, 30, 1);
    for (const std::size_t threads : {2, 3, 7}) {
        Found found(3000);
        iosr::find_intervals(whole.base.data(), whole.slope.data(), whole.labels.data(), 3000, 120, threads,
                             found.rows());
        check(found == alone, "intervals with threads");
        const std::vector<Best> again = sweep(alone, 30, threads);
        for (std::size_t s = 0; s < best.size(); ++s) {
            check(again[s].alpha == best[s].alpha && again[s].right == best[s].right, "sweep with threads");
        }
    }
}

// A search that owns its arrays; every second one is without weights and gammas.
struct Cache {
    iosr::CacheView view;
    std::vector<std::int64_t> offsets, labels;
    std::vector<float> base, extra, query, keys, weights;
    std::vector<double> betas, gammas;

    Cache(std::vector<std::int64_t> offsets_, std::size_t width, std::size_t n, std::vector<double> betas_, bool with)
        : offsets(std::move(offsets_)), betas(std::move(betas_)) {
        const auto n_keys = static_cast<std::size_t>(offsets.back());
        const std::size_t n_classes = offsets.size() - 1;
        base = unit_rows(n, n_classes);
        query = unit_rows(n, width);
        keys = unit_rows(n_keys, width);
        for (std::size_t v = 0; v < n; ++v) {
            labels.push_back(static_cast<std::int64_t>(below(n_classes)));
        }
        view = {n, n_classes, width, betas.size()};
        if (with) {
            extra = unit_rows(n, n_classes);
            gammas = {0.0, 0.7, -1.5};
            weights = unit_rows(betas.size(), n_keys);
            view.n_gammas = gammas.size();
            view.extra = extra.data();
            view.gammas = gammas.data();
            view.weights = weights.data();
        }
        view.base = base.data();
        view.query = query.data();
        view.keys = keys.data();
        view.class_offsets = offsets.data();
        view.betas = betas.data();
        view.labels = labels.data();
    }

    Found run(const iosr::Microkernels& kernels, std::size_t threads) const {
        Found found(view.n_betas * view.n_gammas * view.n_samples);
        iosr::cache_intervals(view, kernels, threads, found.rows());
        return found;
    }

    // Terms of the logits, base + alpha * slope, by the formula in double: (K, V, C) slopes and (G, V, C) bases.
    struct Lines {
        std::vector<double> base, slope;
    };

    Lines lines() const {
        Lines lines;
        for (std::size_t i = 0; i < view.n_gammas * base.size(); ++i) {
            const std::size_t at = i % base.size();
            lines.base.push_back(base[at] + (extra.empty() ? 0.0 : gammas[i / base.size()] * extra[at]));
        }
        for (std::size_t k = 0; k < view.n_betas; ++k) {
            for (std::size_t v = 0; v < view.n_samples; ++v) {
                for (std::size_t c = 0; c < view.n_classes; ++c) {
                    double sum = 0.0;
                    for (auto j = static_cast<std::size_t>(offsets[c]); j < static_cast<std::size_t>(offsets[c + 1]); ++j) {
                        double cosine = 0.0;
                        for (std::size_t d = 0; d < view.width; ++d) {
                            cosine += static_cast<double>(query[v * view.width + d]) * keys[j * view.width + d];
                        }
                        const double weight =
                            weights.empty() ? 1.0 : weights[k * static_cast<std::size_t>(offsets.back()) + j];
                        sum += weight * std::exp(-betas[k] * (1.0 - cosine));
                    }
                    lines.slope.push_back(sum);
                }
            }
        }
        return lines;
    }

    // The label's logit minus the largest of the others.
    double margin(const Lines& lines, std::size_t k, std::size_t g, std::size_t v, double alpha) const {
        const double* z = lines.base.data() + (g * view.n_samples + v) * view.n_classes;
        const double* s = lines.slope.data() + (k * view.n_samples + v) * view.n_classes;
        const auto label = static_cast<std::size_t>(labels[v]);
        double other = -kInfinity;
        for (std::size_t c = 0; c < view.n_classes; ++c) {
            other = c == label ? other : std::max(other, z[c] + alpha * s[c]);
        }
        return z[label] + alpha * s[label] - other;
    }

    // Right inside the interval, wrong outside, at a distance that rounding of the sums can't bridge.
    bool good(const Found& found, const Lines& lines, double step) const {
        for (std::size_t i = 0; i < found.lower.size(); ++i) {
            const std::size_t v = i % view.n_samples;
            const std::size_t g = i / view.n_samples % view.n_gammas;
            const std::size_t k = i / view.n_samples / view.n_gammas;
            const bool empty = (found.flags[i] & iosr::kEmpty) != 0;
            for (double alpha = 0.0; alpha < 8.0; alpha += step) {
                const bool inside = !empty && found.lower[i] <= alpha && alpha <= found.upper[i];
                const double distance = margin(lines, k, g, v, alpha);
                if (!((inside ? -distance : distance) <= 1e-5 * (1.0 + alpha * static_cast<double>(offsets.back())))) {
                    return false;
                }
            }
        }
        return true;
    }
};

void test_the_cache_against_the_formula() {
    const std::vector<std::vector<std::int64_t>> layouts = {
        {0, 3, 4, 8, 9, 14}, {0, 0, 0, 2, 2, 9, 9}, {0, 1}, {0, 7}, {0, 0, 1}, {0, 1, 2, 3, 4, 5}, {0, 99, 99, 207}};
    std::size_t i = 0;
    for (const std::vector<std::int64_t>& layout : layouts) {
        for (const std::size_t width : {1, 7, 300}) {
            for (const std::size_t n : {1, 9, 40}) {
                const Cache cache(layout, width, n, {0.0, 5.5, 60.0}, ++i % 2 == 0);
                const Cache::Lines lines = cache.lines();
                for (const Path& path : paths()) {
                    check(cache.good(cache.run(*path.kernels, 2), lines, 0.9),
                          path.name + ", layout of " + std::to_string(layout.back()) + " keys, D " +
                              std::to_string(width) + ", V " + std::to_string(n));
                }
            }
        }
    }
}

void test_the_cache_with_threads() {
    const Cache cache({0, 1, 300, 300, 310, 411, 600}, 24, 700, {1.0, 5.5}, true);
    for (const Path& path : paths()) {
        const Found alone = cache.run(*path.kernels, 1);
        for (const std::size_t threads : {2, 3, 7}) {
            check(cache.run(*path.kernels, threads) == alone, path.name + ": the cache with threads");
        }
    }
}

void test_betas_in_groups() {
    // The sums of all betas are more than a thread may hold at once.
    std::vector<std::int64_t> offsets(4001, 7);
    std::fill_n(offsets.begin(), 2000, 0);
    std::vector<double> betas;
    for (int k = 0; k < 40; ++k) {
        betas.push_back(0.5 * k);
    }
    const Cache cache(offsets, 5, 40, betas, true);
    for (const Path& path : paths()) {
        const Found all = cache.run(*path.kernels, 2);
        Cache one = cache;
        one.view.n_betas = 1;
        for (std::size_t k = 0; k < betas.size(); ++k) {
            one.view.betas = cache.betas.data() + k;
            one.view.weights = cache.weights.data() + k * 7;
            const Found alone = one.run(*path.kernels, 2);
            const auto at = static_cast<std::ptrdiff_t>(k * alone.lower.size());
            check(std::equal(alone.lower.begin(), alone.lower.end(), all.lower.begin() + at) &&
                      std::equal(alone.upper.begin(), alone.upper.end(), all.upper.begin() + at),
                  path.name + ": betas in groups");
        }
    }
}

}  // namespace

int main() {
    test_intervals_and_sweep_are_exact();
    test_the_domain();
    test_intervals_with_threads();
    test_the_cache_against_the_formula();
    test_the_cache_with_threads();
    test_betas_in_groups();
    return report();
}
