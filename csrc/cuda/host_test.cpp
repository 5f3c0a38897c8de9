// Runs the block programs of the CUDA kernels on the CPU and compares them with the formula in double.
//
//   host_test fp32|fp16|bf16|int8|linear     prints one line a problem; exits with 1 if one of them is wrong
#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "host_machine.h"

namespace {

using namespace iosr::cuda;

std::mt19937 generator(2409);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

struct Problem {
    const char* name;
    int n_queries;
    int width;
    std::vector<int> counts;  // keys of each class
    bool weighted = true;
    float alpha = 1.7F;
    float beta = 5.5F;

    int n_classes() const { return static_cast<int>(counts.size()); }
    int n_keys() const {
        int total = 0;
        for (const int count : counts) {
            total += count;
        }
        return total;
    }
};

// A matrix as the kernels read it, and its values. The padding between rows must never be read as channels; the storage
// ends with the last row, so that an address sanitizer detects a read beyond it.
struct Matrix {
    int64_t row_bytes = 0;
    std::vector<char> storage;
    std::vector<double> values;
    const char* data = nullptr;
};

std::vector<float> unit_rows(int n, int width) {
    std::vector<float> rows(static_cast<std::size_t>(n) * width);
    std::normal_distribution<float> normal;
    for (int i = 0; i < n; ++i) {
        double square = 0.0;
        for (int d = 0; d < width; ++d) {
            rows[i * width + d] = normal(generator);
            square += static_cast<double>(rows[i * width + d]) * rows[i * width + d];
        }
        for (int d = 0; d < width; ++d) {
            rows[i * width + d] /= static_cast<float>(std::sqrt(square));
        }
    }
    return rows;
}

Matrix matrix_of(const std::vector<float>& rows, int n, int width, Keys format) {
    const int size = format == Keys::kFp32 ? 4 : format == Keys::kInt8 ? 1 : 2;
    Matrix out;
    out.row_bytes = (static_cast<int64_t>(width) * size + 15) / 16 * 16;
    out.storage.assign(n * out.row_bytes + 16, 0);
    char* data = out.storage.data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) {
        ++data;
    }
    out.data = data;
    out.values.resize(rows.size());
    for (int i = 0; i < n; ++i) {
        for (int d = 0; d < width; ++d) {
            const float value = rows[i * width + d];
            char* at = data + i * out.row_bytes + static_cast<int64_t>(d) * size;
            uint16_t half = 0;
            float kept = value;
            if (format == Keys::kFp32) {
                std::memcpy(at, &value, 4);
            } else if (format == Keys::kInt8) {
                const auto byte = static_cast<int8_t>(std::lround(value));
                std::memcpy(at, &byte, 1);
                kept = byte;
            } else {
                half = format == Keys::kFp16 ? to_fp16(value) : to_bf16(value);
                std::memcpy(at, &half, 2);
                kept = format == Keys::kFp16 ? from_fp16(half) : from_bf16(half);
            }
            out.values[i * width + d] = kept;
        }
    }
    return out;
}

// Rows as the sum of parts side by side, each the scaled remainder of the more significant ones; the least significant
// comes first.
Matrix parts_of(std::vector<float> rows, int n, int width, Keys format, int parts, float part_scale) {
    if (parts == 1) {
        return matrix_of(rows, n, width, format);
    }
    const int padded = (width + 31) / 32 * 32;
    std::vector<float> beside(static_cast<std::size_t>(n) * padded * parts, 0.0F);
    std::vector<double> sums(rows.size(), 0.0);
    double scale = 1.0;
    for (int part = parts - 1; part >= 0; --part) {
        const Matrix rounded = matrix_of(rows, n, width, format);
        for (int i = 0; i < n; ++i) {
            for (int d = 0; d < width; ++d) {
                float& left = rows[i * width + d];
                const auto kept = static_cast<float>(rounded.values[i * width + d]);
                beside[(i * parts + part) * padded + d] = kept;
                sums[i * width + d] += scale * kept;
                left = (left - kept) / part_scale;
            }
        }
        scale *= part_scale;
    }
    Matrix out = matrix_of(beside, n, padded * parts, format);
    out.values = sums;
    return out;
}

double dot(const Matrix& x, int i, const Matrix& y, int j, int width) {
    double sum = 0.0;
    for (int d = 0; d < width; ++d) {
        sum += x.values[static_cast<std::size_t>(i) * width + d] * y.values[static_cast<std::size_t>(j) * width + d];
    }
    return sum;
}

// Blocks run in the opposite order: their results must not depend on it.
template <class R, class Program>
void run_blocks(int threads, int shared_bytes, int64_t blocks, Program&& program) {
    for (int64_t block = blocks - 1; block >= 0; --block) {
        HostMachine<R> machine(threads, shared_bytes);
        program(machine, block);
    }
}

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
void run_linear(const LinearArgs& args) {
    run_blocks<Registers<T>>(T::kThreads, T::kSharedBytes,
                             tiles(args.n_queries, T::kQueries) * tiles(args.n_classes, T::kTileKeys),
                             [&](auto& machine, int64_t block) { linear_block<T>(machine, args, block); });
}

bool report(const char* tile, const Problem& problem, const std::vector<float>& logits,
            const std::vector<double>& truth, double tolerance) {
    double error = 0.0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
        const double difference = std::fabs(logits[i] - truth[i]);
        error = difference <= error ? error : difference;  // NaN is kept
    }
    const bool good = error <= tolerance;
    std::printf("%s %s, %s: B=%d N=%d D=%d C=%d error %.2e of at most %.2e\n", good ? "ok" : "WRONG", tile,
                problem.name, problem.n_queries, problem.n_keys(), problem.width, problem.n_classes(), error,
                tolerance);
    return good;
}

// The cache term by cache_block, merge_block and a linear_block without operands, as launched by score.cu.
template <Keys K, class T>
bool check_cache(const char* tile, const Problem& problem, int parts) {
    const int n_keys = problem.n_keys();
    const int n_classes = problem.n_classes();
    std::vector<float> rows = unit_rows(n_keys, problem.width);
    // The first queries are keys, so that affinities of 1 occur.
    std::vector<float> queries = unit_rows(problem.n_queries, problem.width);
    std::copy_n(rows.begin(), std::min<std::size_t>(3, std::min(n_keys, problem.n_queries)) * problem.width,
                queries.begin());
    std::vector<float> scales(n_keys, 1.0F);
    if (K == Keys::kInt8) {
        for (int j = 0; j < n_keys; ++j) {
            float largest = 0.0F;
            for (int d = 0; d < problem.width; ++d) {
                largest = std::max(largest, std::fabs(rows[j * problem.width + d]));
            }
            scales[j] = largest / 127.0F;
            for (int d = 0; d < problem.width; ++d) {
                rows[j * problem.width + d] /= scales[j];
            }
        }
    }
    const Matrix key = matrix_of(rows, n_keys, problem.width, K);
    constexpr Keys kQueryFormat = K == Keys::kInt8 ? Keys::kFp16 : K;
    const float part_scale = kQueryFormat == Keys::kFp16 ? 1.0F / 2048.0F : 1.0F;
    const Matrix query = parts_of(queries, problem.n_queries, problem.width, kQueryFormat, parts, part_scale);
    std::vector<float> weights(n_keys, 1.0F);
    std::vector<float> bias(n_classes);
    std::vector<int32_t> key_class;
    std::vector<int32_t> offsets{0};
    for (int c = 0; c < n_classes; ++c) {
        key_class.insert(key_class.end(), problem.counts[c], c);
        offsets.push_back(offsets.back() + problem.counts[c]);
        bias[c] = uniform(-1.0F, 1.0F);
    }
    if (problem.weighted) {
        for (float& weight : weights) {
            weight = uniform(0.1F, 3.0F);
        }
    }

    std::vector<double> truth(static_cast<std::size_t>(problem.n_queries) * n_classes);
    double largest = 1.0;
    for (int b = 0; b < problem.n_queries; ++b) {
        for (int c = 0; c < n_classes; ++c) {
            double sum = 0.0;
            for (int j = offsets[c]; j < offsets[c + 1]; ++j) {
                const double cosine = scales[j] * dot(query, b, key, j, problem.width);
                sum += weights[j] * std::exp(-problem.beta * (1.0 - cosine));
            }
            truth[b * n_classes + c] = problem.alpha * sum + bias[c];
            largest = std::max(largest, std::fabs(truth[b * n_classes + c]));
        }
    }

    // What the kernels leave unwritten stays NaN and shows.
    std::vector<float> logits(truth.size(), NAN);
    std::vector<float> edges(2 * tiles(n_keys, kChunk) * problem.n_queries, NAN);
    CacheArgs args;
    args.queries = query.data;
    args.keys = key.data;
    args.n_queries = problem.n_queries;
    args.n_keys = n_keys;
    args.n_classes = n_classes;
    args.query_bytes = query.row_bytes;
    args.key_bytes = key.row_bytes;
    args.query_parts = parts;
    args.part_scale = part_scale;
    args.key_class = key_class.data();
    args.weights = problem.weighted ? weights.data() : nullptr;
    args.key_scales = K == Keys::kInt8 ? scales.data() : nullptr;
    args.scale = problem.beta * 1.4426950408889634F;
    args.alpha = problem.alpha;
    args.edges = edges.data();
    args.logits = logits.data();
    run_blocks<Registers<T>>(T::kThreads, T::kSharedBytes,
                             tiles(problem.n_queries, T::kQueries) * tiles(n_keys, T::kTileKeys),
                             [&](auto& machine, int64_t block) { cache_block<T>(machine, args, block); });

    MergeArgs merge;
    merge.class_offsets = offsets.data();
    merge.key_class = key_class.data();
    merge.n_queries = problem.n_queries;
    merge.n_keys = n_keys;
    merge.n_classes = n_classes;
    merge.edges = edges.data();
    merge.alpha = problem.alpha;
    merge.logits = logits.data();
    run_blocks<MergeRegisters>(kMergeThreads, kMergeThreads * 4,
                               (tiles(n_keys, kChunk) - 1) * tiles(problem.n_queries, kMergeThreads),
                               [&](auto& machine, int64_t block) { merge_block(machine, merge, block); });

    LinearArgs finish;
    finish.n_queries = problem.n_queries;
    finish.n_classes = n_classes;
    finish.bias = bias.data();
    finish.class_offsets = offsets.data();
    finish.logits = logits.data();
    run_linear<LinearTile<Keys::kFp32>>(finish);
    // The exponent's rounding is beta times the dot product's, which grows like a random walk over the channels.
    const double walk = std::max(1.0, std::sqrt(problem.width) / 4.0);
    return report(tile, problem, logits, truth, largest * (2.0 + 2.0 * problem.beta * walk) * 1.2e-7);
}

template <class T>
bool check_linear(const char* tile, const Problem& problem, int n_operands) {
    const int n_classes = problem.n_classes();
    std::vector<Matrix> matrices;
    const bool half = T::kSplitKeys;
    for (int i = 0; i < n_operands; ++i) {
        const std::vector<float> rows = unit_rows(n_classes, problem.width);
        matrices.push_back(matrix_of(unit_rows(problem.n_queries, problem.width), problem.n_queries, problem.width,
                                     half ? Keys::kFp16 : Keys::kFp32));
        matrices.push_back(half ? parts_of(rows, n_classes, problem.width, Keys::kFp16, 2, 1.0F / 2048.0F)
                                : matrix_of(rows, n_classes, problem.width, Keys::kFp32));
    }
    const float factors[2] = {100.0F, 1.0F};
    LinearArgs args;
    args.n_operands = n_operands;
    args.row_parts = half ? 2 : 1;
    args.part_scale = 1.0F / 2048.0F;
    args.n_queries = problem.n_queries;
    args.n_classes = n_classes;
    for (int i = 0; i < n_operands; ++i) {
        const Matrix& queries = matrices[2 * i];
        const Matrix& rows = matrices[2 * i + 1];
        args.operands[i] = {queries.data, rows.data, queries.row_bytes, rows.row_bytes, factors[i]};
    }
    std::vector<float> logits(static_cast<std::size_t>(problem.n_queries) * n_classes, NAN);
    std::vector<double> truth(logits.size());
    std::vector<int32_t> offsets{0};
    for (const int count : problem.counts) {
        offsets.push_back(offsets.back() + count);
    }
    for (int b = 0; b < problem.n_queries; ++b) {
        for (int c = 0; c < n_classes; ++c) {
            const std::size_t at = static_cast<std::size_t>(b) * n_classes + c;
            if (problem.counts[c] > 0) {  // the cache term was written before
                logits[at] = uniform(0.0F, 3.0F);
                truth[at] = logits[at];
            }
            for (int i = 0; i < n_operands; ++i) {
                truth[at] += factors[i] * dot(matrices[2 * i], b, matrices[2 * i + 1], c, problem.width);
            }
        }
    }
    args.class_offsets = offsets.data();
    args.logits = logits.data();
    run_linear<T>(args);
    return report(tile, problem, logits, truth, 100.0 * 3e-7);
}

std::vector<int> ones(int n) { return std::vector<int>(n, 1); }

std::vector<int> ragged(int n_classes, int largest) {
    std::vector<int> counts(n_classes);
    for (int& count : counts) {
        count = static_cast<int>(generator() % (largest + 1));
    }
    return counts;
}

std::vector<Problem> problems() {
    return {
        {"one key", 1, 1, {1}},
        {"one key among empty classes", 3, 3, {0, 1, 0}},
        {"empty classes at both ends", 5, 7, {0, 0, 2, 0, 7, 0}, false},
        {"exactly a chunk", 2, 16, {64}},
        {"a chunk and a key", 2, 17, {64, 1}},
        {"a class over every chunk of two tiles", 19, 33, {5, 300, 2}},
        {"one class over everything", 7, 8, {651}, false},
        {"one shot", 16, 32, ones(131)},
        {"16 shots, aligned", 33, 64, std::vector<int>(17, 16)},
        {"ragged, ends inside a chunk", 131, 123, ragged(41, 13)},
        {"ragged, wide", 17, 507, ragged(23, 40)},
        {"beta 0 counts keys", 5, 9, {70, 3}, false, 1.0F, 0.0F},
        {"sharp", 4, 15, {3, 140}, true, -0.5F, 100.0F},
    };
}

template <Keys K>
bool check_keys() {
    bool good = true;
    for (const Problem& problem : problems()) {
        good = check_cache<K, LargeTile<K>>("large", problem, 1) && good;
        good = check_cache<K, SmallTile<K>>("small", problem, 1) && good;
        if (K != Keys::kFp32) {
            good = check_cache<K, LargeTile<K>>("large, split queries", problem, K == Keys::kBf16 ? 3 : 2) && good;
        }
    }
    return good;
}

bool check_linears() {
    bool good = true;
    for (const Problem& problem : problems()) {
        for (int n_operands = 1; n_operands <= 2; ++n_operands) {
            good = check_linear<LinearTile<Keys::kFp32>>("linear", problem, n_operands) && good;
            good = check_linear<LinearSmallTile<Keys::kFp32>>("linear small", problem, n_operands) && good;
            good = check_linear<LinearTile<Keys::kFp16>>("linear, split rows", problem, n_operands) && good;
            good = check_linear<LinearSmallTile<Keys::kFp16>>("linear small, split rows", problem, n_operands) && good;
        }
    }
    return good;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string what = argc == 2 ? argv[1] : "";
    try {
        const bool good = what == "fp32"     ? check_keys<Keys::kFp32>()
                          : what == "fp16"   ? check_keys<Keys::kFp16>()
                          : what == "bf16"   ? check_keys<Keys::kBf16>()
                          : what == "int8"   ? check_keys<Keys::kInt8>()
                          : what == "linear" ? check_linears()
                                             : throw std::runtime_error("expected fp32, fp16, bf16, int8 or linear");
        return good ? 0 : 1;
    } catch (const std::exception& error) {
        std::printf("WRONG %s\n", error.what());
        return 1;
    }
}
