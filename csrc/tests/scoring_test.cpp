// Tests of the CPU kernels that need no Python, so that they run under the sanitizers (make sanitize).
//
// Every path that this processor can run, and the wide one in plain C++, beside the portable path, which
// tests/scoring/test_cpp.py compares with the formulas.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <random>
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

std::vector<float> uniform(std::size_t n, float low, float high) {
    std::uniform_real_distribution<float> draw(low, high);
    std::vector<float> numbers(n);
    std::generate(numbers.begin(), numbers.end(), [&] { return draw(rng); });
    return numbers;
}

// Random elements: of either sign and from 1/4 to 1/2, or of int8 from 0 to 127. Arrays are exactly as long as they must
// be, so that a sanitizer sees a read past their end.
struct Elements {
    ElementType type;
    std::vector<std::uint8_t> bytes;

    Elements(std::size_t n, ElementType type_) : type(type_) {
        std::size_t size = 2;
        std::uint32_t random = 0x807fU, fixed = 0x3e80U;  // bits of bfloat16
        if (type == ElementType::kFloat32) {
            size = 4, random = 0x807fffffU, fixed = 0x3e800000U;
        } else if (type == ElementType::kFloat16) {
            random = 0x83ffU, fixed = 0x3400U;
        } else if (type == ElementType::kInt8) {
            size = 1, random = 0x7fU, fixed = 0U;
        }
        bytes.resize(n * size);
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint32_t word = (static_cast<std::uint32_t>(rng()) & random) | fixed;
            std::memcpy(&bytes[i * size], &word, size);  // little-endian
        }
    }
};

// A plan of a linear and a cache term; with `values`, keys have values of this type in place of classes.
struct Problem {
    std::size_t width, batch, n_keys, n_classes;
    std::vector<std::int64_t> offsets;
    std::vector<float> queries, linear, weights, scales;
    Elements keys, values;
    bool has_values;

    Problem(std::vector<std::int64_t> offsets_, std::size_t width_, std::size_t batch_, ElementType type,
            bool has_values_ = false, ElementType value_type = ElementType::kFloat32)
        : width(width_), batch(batch_), n_keys(static_cast<std::size_t>(offsets_.back())),
          n_classes(offsets_.size() - 1),
          offsets(std::move(offsets_)), queries(uniform(batch * width, -1.0F, 1.0F)),
          linear(uniform(n_classes * width, -1.0F, 1.0F)), weights(uniform(n_keys, 0.1F, 3.0F)),
          scales(n_keys, 1.0F / 127.0F),
          keys(n_keys * width, type), values(n_keys * n_classes, value_type), has_values(has_values_) {
        for (float& x : queries) {
            x /= std::sqrt(static_cast<float>(width));
        }
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
        std::vector<float> logits(batch * n_classes, 1.0F);
        iosr::add_product(queries.data(), batch, linear.data(), n_classes, width, 3.0F, kernels, threads,
                          logits.data());
        iosr::affinity_sums(term, queries.data(), batch, kernels, threads, logits.data());
        return logits;
    }
};

// The largest difference as a share of the largest logit.
double largest_error(const std::vector<float>& found, const std::vector<float>& expected) {
    double error = 0.0;
    double largest = 1.0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
        const double off = std::abs(static_cast<double>(found[i]) - expected[i]);
        error = off <= error ? error : off;  // NaN counts
        largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
    }
    return error / largest;
}

void test_paths_agree() {
    const std::vector<std::vector<std::int64_t>> layouts = {
        {0, 3, 4, 8, 9, 14}, {0, 0, 0, 2, 2, 9, 9}, {0, 1}, {0, 97}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 150, 150, 377}};
    const std::vector<std::pair<bool, ElementType>> targets = {
        {false, ElementType::kFloat32}, {true, ElementType::kFloat32}, {true, ElementType::kFloat16}};
    for (const auto type : {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBfloat16, ElementType::kInt8}) {
        for (const auto& [has_values, value_type] : targets) {
            for (const std::size_t width : {1, 3, 8, 15, 17, 33, 300}) {
                for (const std::size_t batch : {1, 2, 3, 4, 5, 6, 9, 12, 17, 24, 33}) {
                    const Problem problem(layouts[(width + batch) % layouts.size()], width, batch, type, has_values,
                                          value_type);
                    const std::vector<float> expected = problem.run(iosr::kScalarKernels, 1);
                    for (const Path& path : paths()) {
                        const double error = largest_error(problem.run(*path.kernels, 1), expected);
                        check(error <= 1e-5, path.name + ", type " + std::to_string(static_cast<int>(type)) +
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
        const std::vector<float> expected = problem.run(iosr::kScalarKernels, 1);
        for (const Path& path : paths()) {
            const std::vector<float> alone = problem.run(*path.kernels, 1);
            check(largest_error(alone, expected) <= 1e-5, path.name + " in chunks");
            for (const std::size_t threads : {2, 3, 7}) {
                check(problem.run(*path.kernels, threads) == alone, path.name + " with threads");
            }
        }
    }
}

const iosr::Microkernels& best() { return *iosr::choose_path("").kernels; }

// A thread that leaves the core of its caller is forbidden it for a moment, and for no longer.
void test_threads_may_run_wherever_they_might(const Problem& problem, const std::vector<float>& alone) {
#if defined(__linux__)
    cpu_set_t expected;
    check(sched_getaffinity(0, sizeof(expected), &expected) == 0, "the affinity can be asked for");
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(3));  // longer than threads of the pool stay awake
        check(problem.run(best(), 3) == alone, "threads that slept change nothing");
    }
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
        cpu_set_t found = expected;
        for (int i = 0; i < 1000 && (i == 0 || !CPU_EQUAL(&found, &expected)); ++i) {  // it may be leaving just now
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            sched_getaffinity(std::stoi(task.path().filename()), sizeof(found), &found);
        }
        check(CPU_EQUAL(&found, &expected), "affinity is kept");
    }
#endif
}

void test_many_callers_at_once(const Problem& problem, const std::vector<float>& alone) {
    std::vector<std::thread> callers;
    std::atomic<int> good{0};
    for (std::size_t t = 0; t < 6; ++t) {
        callers.emplace_back([&, t] {
            for (int i = 0; i < 20; ++i) {
                good += problem.run(best(), 1 + t % 3) == alone ? 1 : 0;
            }
        });
    }
    for (std::thread& caller : callers) {
        caller.join();
    }
    check(good == 6 * 20, "many callers at once");
}

void test_after_fork(const Problem& problem, const std::vector<float>& alone) {
#if defined(__unix__) && !defined(__SANITIZE_THREAD__)
    check(problem.run(best(), 3) == alone, "before fork()");
    const pid_t child = fork();
    if (child == 0) {
        _exit(problem.run(best(), 3) == alone ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    check(status == 0, "a child of fork() scores");
#endif
}

}  // namespace

// Prints a summary that tests/scoring/test_native.py reads.
int main() {
    test_paths_agree();
    test_threads_change_nothing();
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32, true);
    const std::vector<float> alone = problem.run(best(), 1);
    test_threads_may_run_wherever_they_might(problem, alone);
    test_many_callers_at_once(problem, alone);
    test_after_fork(problem, alone);
    std::string names;
    for (const Path& path : paths()) {
        names += " " + path.name;
    }
    std::printf("%d checks, %d failed; paths:%s\n", checks, failures, names.c_str());
    return failures == 0 ? 0 : 1;
}
