// Tests of the CPU kernels that need no Python, so that they run under the sanitizers (make sanitize).
//
// Every path that this processor can run, and the wide one in plain C++, against the formulas in double.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__unix__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "scoring/affinity_sums.h"
#include "scoring/paths.h"
#include "scoring/product.h"

namespace iosr {

// The inner loops at the sixteen lanes of AVX-512, in plain C++ (wide_kernels.cpp).
extern const Microkernels kWideKernels;
float half_to_float(std::uint16_t bits);

}  // namespace iosr

namespace {

using iosr::ElementType;

int failures = 0;
int checks = 0;

void check(bool good, const std::string& what) {
    ++checks;
    if (!good && ++failures <= 20) {
        std::printf("FAILED %s\n", what.c_str());
    }
}

struct Path {
    std::string name;
    const iosr::Microkernels* kernels;
};

// The wide path, and every path that this processor can run.
std::vector<Path> paths() {
    std::vector<Path> supported = {{"wide", &iosr::kWideKernels}};
    for (const iosr::ScoringPath& path : iosr::scoring_paths()) {
        if (path.supported()) {
            supported.push_back({path.name, path.kernels});
        }
    }
    return supported;
}

std::mt19937 rng(20240911);  // NOLINT: the same numbers in every run

std::vector<float> random_rows(std::size_t n, std::size_t width, bool unit) {
    std::normal_distribution<float> normal;
    std::vector<float> rows(n * width);
    for (std::size_t r = 0; r < n; ++r) {
        float* row = rows.data() + r * width;
        double square = 0.0;
        for (std::size_t d = 0; d < width; ++d) {
            row[d] = normal(rng);
            square += row[d] * row[d];
        }
        for (std::size_t d = 0; unit && d < width; ++d) {
            row[d] = static_cast<float>(row[d] / std::sqrt(square));
        }
    }
    return rows;
}

// Rows in a narrower type: exactly as long as they must be, so that a sanitizer sees a read past their end.
struct Elements {
    ElementType type;
    std::vector<std::uint8_t> bytes;
    std::vector<float> exact;

    Elements(const std::vector<float>& rows, ElementType type_) : type(type_), exact(rows) {
        for (float& x : exact) {
            std::uint32_t bits = 0;
            std::memcpy(&bits, &x, 4);
            if (type == ElementType::kInt8) {
                x = std::nearbyint(x * 127.0F);
                append(static_cast<std::int8_t>(x));
            } else if (type == ElementType::kBfloat16) {
                append(static_cast<std::uint16_t>(bits >> 16));
                bits &= 0xffff0000U;
                std::memcpy(&x, &bits, 4);
            } else if (type == ElementType::kFloat16) {
                // Cuts the mantissa; values too small for a normal half become zero.
                const std::uint32_t exponent = (bits >> 23) & 0xffU;
                const std::uint32_t half = exponent < 113 ? 0 : ((exponent - 112) << 10) | ((bits >> 13) & 0x3ffU);
                const auto narrow = static_cast<std::uint16_t>(((bits >> 16) & 0x8000U) | half);
                append(narrow);
                x = iosr::half_to_float(narrow);
            } else {
                append(x);
            }
        }
    }

    template <typename T>
    void append(T x) {
        const auto* begin = reinterpret_cast<const std::uint8_t*>(&x);
        bytes.insert(bytes.end(), begin, begin + sizeof(x));
    }
};

// A cache term that owns its arrays; with `values`, keys have values of this type in place of classes.
struct Problem {
    std::size_t width, batch, n_keys, n_classes;
    std::vector<std::int64_t> offsets;
    std::vector<float> queries, weights, scales, start;
    Elements keys, values;
    bool has_values;

    Problem(std::vector<std::int64_t> offsets_, std::size_t width_, std::size_t batch_, ElementType type,
            bool has_values_ = false, ElementType value_type = ElementType::kFloat32)
        : width(width_), batch(batch_), n_keys(static_cast<std::size_t>(offsets_.back())), n_classes(offsets_.size() - 1),
          offsets(std::move(offsets_)), queries(random_rows(batch, width, true)), weights(n_keys),
          scales(n_keys, 1.0F / 127.0F), start(random_rows(batch, n_classes, false)),
          keys(random_rows(n_keys, width, true), type), values(random_rows(n_keys, n_classes, false), value_type),
          has_values(has_values_) {
        std::uniform_real_distribution<float> uniform(0.1F, 3.0F);
        std::generate(weights.begin(), weights.end(), [&] { return uniform(rng); });
    }

    std::vector<float> run(const iosr::Microkernels& kernels, std::size_t threads) const {
        iosr::CacheTerm term;
        term.n_keys = n_keys;
        term.n_classes = n_classes;
        term.width = width;
        term.keys = keys.bytes.data();
        term.key_type = keys.type;
        term.key_scales = keys.type == ElementType::kInt8 ? scales.data() : nullptr;
        term.weights = weights.data();
        term.class_offsets = has_values ? nullptr : offsets.data();
        term.values = has_values ? values.bytes.data() : nullptr;
        term.value_type = values.type;
        term.alpha = 1.7F;
        term.beta = 5.5F;
        std::vector<float> logits = start;
        iosr::affinity_sums(term, queries.data(), batch, kernels, threads, logits.data());
        return logits;
    }

    // The formula of affinity_sums.h, literally, and the size of its summands.
    std::pair<std::vector<double>, double> truth() const {
        std::vector<double> logits(start.begin(), start.end());
        std::vector<double> sizes(logits.size(), 0.0);
        for (std::size_t b = 0; b < batch; ++b) {
            for (std::size_t c = 0, j = 0; j < n_keys; ++j) {
                double dot = 0.0;
                for (std::size_t d = 0; d < width; ++d) {
                    dot += static_cast<double>(queries[b * width + d]) * keys.exact[j * width + d];
                }
                dot *= keys.type == ElementType::kInt8 ? static_cast<double>(scales[j]) : 1.0;
                const double term = 1.7F * weights[j] * std::exp(-5.5 * (1.0 - dot));
                for (; j >= static_cast<std::size_t>(offsets[c + 1]); ++c) {
                }
                for (std::size_t k = has_values ? 0 : c; k < (has_values ? n_classes : c + 1); ++k) {
                    const double value = has_values ? values.exact[j * n_classes + k] : 1.0;
                    logits[b * n_classes + k] += term * value;
                    sizes[b * n_classes + k] += term * std::abs(value);
                }
            }
        }
        return {logits, 1.0 + *std::max_element(sizes.begin(), sizes.end())};
    }
};

double largest_error(const std::vector<float>& found, const std::vector<double>& truth) {
    double error = 0.0;
    for (std::size_t i = 0; i < truth.size(); ++i) {
        const double off = std::abs(found[i] - truth[i]);
        error = off <= error ? error : off;  // NaN counts
    }
    return error;
}

void test_affinity_sums() {
    const std::vector<std::vector<std::int64_t>> layouts = {
        {0, 3, 4, 8, 9, 14}, {0, 0, 0, 2, 2, 9, 9}, {0, 1}, {0, 97}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 150, 150, 377}};
    const std::vector<std::pair<bool, ElementType>> targets = {
        {false, ElementType::kFloat32}, {true, ElementType::kFloat32}, {true, ElementType::kFloat16}};
    for (const auto type : {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBfloat16, ElementType::kInt8}) {
        for (const auto& [has_values, value_type] : targets) {
            for (const std::size_t width : {1, 3, 8, 15, 17, 33, 300}) {
                for (const std::size_t batch : {1, 2, 3, 4, 5, 6, 9, 12, 17, 24, 33}) {
                    const Problem problem(layouts[(width + batch) % layouts.size()], width, batch, type, has_values, value_type);
                    const auto [truth, size] = problem.truth();
                    for (const Path& path : paths()) {
                        const double error = largest_error(problem.run(*path.kernels, 1), truth);
                        check(error <= 2e-6 * size, path.name + ", type " + std::to_string(static_cast<int>(type)) +
                                                        (has_values ? ", values, D " : ", D ") + std::to_string(width) +
                                                        ", B " + std::to_string(batch) + ": error " + std::to_string(error));
                    }
                }
            }
        }
    }
}

void test_threads_change_nothing() {
    // A class of one key, one that spans many chunks, then ragged ones: sums cross the borders of chunks.
    const std::vector<std::int64_t> offsets = {0, 1, 9000, 9000, 9100, 9301, 12000};
    for (const std::size_t batch : {1, 6, 16, 40, 300}) {
        const Problem problem(offsets, 8, batch, ElementType::kInt8, batch % 4 == 0, ElementType::kFloat16);
        const auto [truth, size] = problem.truth();
        for (const Path& path : paths()) {
            const std::vector<float> alone = problem.run(*path.kernels, 1);
            check(largest_error(alone, truth) <= 2e-6 * size, path.name + " in chunks");
            for (const std::size_t threads : {2, 3, 7}) {
                check(problem.run(*path.kernels, threads) == alone, path.name + " with threads");
            }
        }
    }
}

void test_products() {
    for (const std::size_t batch : {1, 7, 50, 120}) {
        for (const std::size_t width : {1, 17, 130}) {
            const std::size_t n_classes = 3 * batch / 2 + 1;
            const std::vector<float> rows = random_rows(batch, width, true);
            const std::vector<float> matrix = random_rows(n_classes, width, true);
            std::vector<double> truth(batch * n_classes);
            for (std::size_t i = 0; i < truth.size(); ++i) {
                truth[i] = 1.0;
                for (std::size_t d = 0; d < width; ++d) {
                    truth[i] += 3.0 * rows[i / n_classes * width + d] * matrix[i % n_classes * width + d];
                }
            }
            for (const Path& path : paths()) {
                std::vector<float> logits(truth.size(), 1.0F);
                iosr::add_product(rows.data(), batch, matrix.data(), n_classes, width, 3.0F, *path.kernels, 3, logits.data());
                check(largest_error(logits, truth) <= 4e-6, path.name + " product");
                check(iosr::unit_rows(rows.data(), batch, width, 1e-3F, *path.kernels), path.name + " unit rows");
                std::vector<float> longer = rows;
                longer.back() += 2.5F;
                check(!iosr::unit_rows(longer.data(), batch, width, 1e-3F, *path.kernels), path.name + " longer rows");
            }
        }
    }
}

// A thread that leaves the core of its caller is forbidden it for a moment, and for no longer.
void test_threads_may_run_wherever_they_might() {
#if defined(__linux__)
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32);
    const iosr::Microkernels& kernels = *iosr::choose_path("").kernels;
    const std::vector<float> alone = problem.run(kernels, 1);
    cpu_set_t expected;
    check(sched_getaffinity(0, sizeof(expected), &expected) == 0, "the affinity can be asked for");
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(3));  // longer than threads of the pool stay awake
        check(problem.run(kernels, 3) == alone, "threads that slept change nothing");
        for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
            cpu_set_t found;
            const pid_t id = std::stoi(task.path().filename());
            check(sched_getaffinity(id, sizeof(found), &found) != 0 || CPU_EQUAL(&found, &expected), "affinity is kept");
        }
    }
#endif
}

void test_many_callers_at_once() {
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32, true);
    const iosr::Microkernels& kernels = *iosr::choose_path("").kernels;
    const std::vector<float> alone = problem.run(kernels, 1);
    std::vector<std::thread> callers;
    std::vector<int> good(6, 1);
    for (std::size_t t = 0; t < good.size(); ++t) {
        callers.emplace_back([&, t] {
            for (int i = 0; i < 20; ++i) {
                good[t] = good[t] != 0 && problem.run(kernels, 1 + t % 3) == alone ? 1 : 0;
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    check(std::count(good.begin(), good.end(), 1) == static_cast<long>(good.size()), "many callers at once");
}

void test_after_fork() {
#if defined(__unix__) && !defined(__SANITIZE_THREAD__)
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32);
    const iosr::Microkernels& kernels = *iosr::choose_path("").kernels;
    const std::vector<float> before = problem.run(kernels, 3);
    const pid_t child = fork();
    if (child == 0) {
        _exit(problem.run(kernels, 3) == before ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(status == 0, "a child of fork() scores");
#endif
}

void test_exp2() {
    for (const Path& path : paths()) {
        std::vector<float> dots;
        for (double t = -130.0; t <= 0.5; t += 0.000917) {
            dots.push_back(static_cast<float>(t + 1.0));
        }
        const std::vector<float> asked = dots;
        path.kernels->exp_run(dots.data(), dots.size(), 1.0F, nullptr, nullptr);
        double worst = 0.0;
        for (std::size_t i = 0; i < dots.size(); ++i) {
            const double t = std::max(static_cast<double>(asked[i] - 1.0F), -126.0);
            worst = std::max(worst, std::abs(dots[i] / std::exp2(t) - 1.0));
        }
        check(worst < 2.5e-7, path.name + " exp2: " + std::to_string(worst * 1e7) + "e-7");
    }
}

void test_every_half() {
    bool good = true;
    for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
        const std::uint32_t exponent = (bits >> 10) & 31U;
        const double mantissa = bits & 0x3ffU;
        const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24)
                                               : std::ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25);
        const double truth = (bits & 0x8000U) != 0 ? -magnitude : magnitude;
        const float got = iosr::half_to_float(static_cast<std::uint16_t>(bits));
        good = good && (exponent == 31 || (got == truth && std::signbit(got) == ((bits & 0x8000U) != 0)));
    }
    check(good, "half to float");
}

void test_a_path_is_chosen_or_refused() {
    check(std::string(iosr::choose_path("scalar").name) == "scalar", "scalar by name");
    check(iosr::choose_path("").supported(), "the best one is supported");
    for (const iosr::ScoringPath& path : iosr::scoring_paths()) {
        bool refused = false;
        try {
            iosr::choose_path(path.name);
        } catch (const std::runtime_error&) {
            refused = true;
        }
        check(refused != path.supported(), std::string(path.name) + " is refused where it can't run");
    }
    try {
        iosr::choose_path("altivec");
        check(false, "an unknown path is refused");
    } catch (const std::runtime_error& error) {
        check(std::string(error.what()).find("scalar") != std::string::npos, "the refusal names the paths");
    }
}

}  // namespace

// Prints a summary that tests/scoring/test_native.py reads.
int main() {
    test_every_half();
    test_exp2();
    test_a_path_is_chosen_or_refused();
    test_affinity_sums();
    test_threads_change_nothing();
    test_products();
    test_threads_may_run_wherever_they_might();
    test_many_callers_at_once();
    test_after_fork();
    std::string names;
    for (const Path& path : paths()) {
        names += " " + path.name;
    }
    std::printf("%d checks, %d failed; paths:%s\n", checks, failures, names.c_str());
    return failures == 0 ? 0 : 1;
}
