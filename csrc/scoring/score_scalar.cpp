// The portable kernel: C++17 without intrinsics.
//
// Rows (text, keys, linear) stream past a block of kQueries queries, so each is read B / kQueries times, and only a
// (kRows, kQueries) tile of affinities exists at a time. Queries are packed lane-wise, which turns the inner loop into
// independent sums that a compiler vectorises without being allowed to reorder any. Products are summed in float over
// kDepth channels and in double beyond that; exponent, class sums and logits are double and rounded once.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "scoring/score.h"

namespace iosr {
namespace {

constexpr std::size_t kQueries = 64;  // queries a block
constexpr std::size_t kRows = 64;     // rows a tile
constexpr std::size_t kLanes = 8;     // queries in the inner loop
constexpr std::size_t kDepth = 64;    // channels summed in float
constexpr double kLog2E = 1.4426950408889634;

// packed[g][d][lane] = block[g * kLanes + lane][d], zero where the block ends early.
void pack(const float* block, std::size_t n_queries, std::size_t width, std::vector<float>& packed) {
    packed.assign(kQueries * width, 0.0F);
    for (std::size_t b = 0; b < n_queries; ++b) {
        float* lane = packed.data() + (b / kLanes) * width * kLanes + b % kLanes;
        for (std::size_t d = 0; d < width; ++d) {
            lane[d * kLanes] = block[b * width + d];
        }
    }
}

// dots[r * kQueries + lane] = <rows[r], lane's query> for R rows and kLanes queries.
template <std::size_t R>
void dot_lanes(const float* rows, std::size_t width, const float* packed, double* dots) {
    double total[R][kLanes] = {};
    for (std::size_t begin = 0; begin < width; begin += kDepth) {
        const std::size_t end = std::min(begin + kDepth, width);
        float partial[R][kLanes] = {};
        for (std::size_t d = begin; d < end; ++d) {
            for (std::size_t r = 0; r < R; ++r) {
                const float value = rows[r * width + d];
                for (std::size_t lane = 0; lane < kLanes; ++lane) {
                    partial[r][lane] += value * packed[d * kLanes + lane];
                }
            }
        }
        for (std::size_t r = 0; r < R; ++r) {
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                total[r][lane] += partial[r][lane];
            }
        }
    }
    for (std::size_t r = 0; r < R; ++r) {
        std::copy_n(total[r], kLanes, dots + r * kQueries);
    }
}

// dots (n_rows, kQueries) = rows (n_rows, D) @ packed queries, n_rows <= kRows.
void dot_tile(const float* rows, std::size_t n_rows, std::size_t width, const std::vector<float>& packed,
              std::size_t n_queries, double* dots) {
    constexpr std::size_t kRegisterRows = 4;
    std::size_t r = 0;
    for (; r + kRegisterRows <= n_rows; r += kRegisterRows) {
        for (std::size_t b = 0; b < n_queries; b += kLanes) {
            dot_lanes<kRegisterRows>(rows + r * width, width, packed.data() + b * width, dots + r * kQueries + b);
        }
    }
    for (; r < n_rows; ++r) {
        for (std::size_t b = 0; b < n_queries; b += kLanes) {
            dot_lanes<1>(rows + r * width, width, packed.data() + b * width, dots + r * kQueries + b);
        }
    }
}

// logits (kRows, kQueries) += alpha * the affinity sums of classes [first, last).
void add_cache_term(const PlanView& plan, std::size_t first, std::size_t last, const std::vector<float>& packed,
                    std::size_t n_queries, double* dots, double* logits) {
    const double alpha = plan.alpha;
    const double scale = plan.beta * kLog2E;
    const auto end = static_cast<std::size_t>(plan.class_offsets[last]);
    std::size_t c = first;
    for (auto begin = static_cast<std::size_t>(plan.class_offsets[first]); begin < end; begin += kRows) {
        const std::size_t n_rows = std::min(kRows, end - begin);
        dot_tile(plan.keys + begin * plan.width, n_rows, plan.width, packed, n_queries, dots);
        for (std::size_t r = 0; r < n_rows; ++r) {
            while (static_cast<std::size_t>(plan.class_offsets[c + 1]) <= begin + r) {
                ++c;  // classes without keys are stepped over here
            }
            const double weight = plan.weights == nullptr ? alpha : alpha * plan.weights[begin + r];
            double* sums = logits + (c - first) * kQueries;
            for (std::size_t b = 0; b < n_queries; ++b) {
                sums[b] += weight * std::exp2(static_cast<float>(scale * (dots[r * kQueries + b] - 1.0)));
            }
        }
    }
}

// logits (n_rows, kQueries) += factor * rows @ packed queries.
void add_linear_term(const float* rows, std::size_t n_rows, std::size_t width, double factor,
                     const std::vector<float>& packed, std::size_t n_queries, double* dots, double* logits) {
    dot_tile(rows, n_rows, width, packed, n_queries, dots);
    for (std::size_t r = 0; r < n_rows; ++r) {
        for (std::size_t b = 0; b < n_queries; ++b) {
            logits[r * kQueries + b] += factor * dots[r * kQueries + b];
        }
    }
}

}  // namespace

void score_scalar(const PlanView& plan, const QueryView& queries, float* logits) {
    const std::size_t n_classes = plan.n_classes;
    const std::size_t width = plan.width;
    std::vector<float> plain;
    std::vector<float> query;
    std::vector<float> feature;
    std::vector<double> dots(kRows * kQueries);
    std::vector<double> tile(kRows * kQueries);

    for (std::size_t b0 = 0; b0 < queries.n_queries; b0 += kQueries) {
        const std::size_t n_queries = std::min(kQueries, queries.n_queries - b0);
        if (plan.text != nullptr) {
            pack(queries.plain + b0 * width, n_queries, width, plain);
        }
        if (plan.keys != nullptr) {
            pack(queries.query + b0 * width, n_queries, width, query);
        }
        if (plan.linear != nullptr) {
            pack(queries.feature + b0 * width, n_queries, width, feature);
        }
        for (std::size_t c0 = 0; c0 < n_classes; c0 += kRows) {
            const std::size_t n_rows = std::min(kRows, n_classes - c0);
            for (std::size_t r = 0; r < n_rows; ++r) {
                const double bias = plan.bias == nullptr ? 0.0 : plan.bias[c0 + r];
                std::fill_n(tile.data() + r * kQueries, n_queries, bias);
            }
            if (plan.text != nullptr) {
                add_linear_term(plan.text + c0 * width, n_rows, width, plan.tau, plain, n_queries, dots.data(),
                                tile.data());
            }
            if (plan.linear != nullptr) {
                add_linear_term(plan.linear + c0 * width, n_rows, width, 1.0, feature, n_queries, dots.data(),
                                tile.data());
            }
            if (plan.keys != nullptr) {
                add_cache_term(plan, c0, c0 + n_rows, query, n_queries, dots.data(), tile.data());
            }
            for (std::size_t b = 0; b < n_queries; ++b) {
                for (std::size_t r = 0; r < n_rows; ++r) {
                    logits[(b0 + b) * n_classes + c0 + r] = static_cast<float>(tile[r * kQueries + b]);
                }
            }
        }
    }
}

}  // namespace iosr
