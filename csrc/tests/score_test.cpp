// Tests of the scoring kernels that need no Python, so that they run under the sanitizers (make sanitize).
//
// Every path that this processor can run, and the wide one in plain C++, against the formula in double.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
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

#include "tests/support.h"

namespace {

using iosr::ElementType;

// A plan that owns its arrays. Arrays are exactly as long as they must be, so that a sanitizer sees a read past their end.
struct Problem {
    std::size_t width, batch;
    std::vector<std::int64_t> offsets;
    std::vector<float> text, linear, bias, weights, scales, plain, query, feature, exact_keys, transform;
    std::vector<float> moved;  // transform @ query, where there is one, or query
    std::vector<std::uint8_t> keys;
    ElementType type;
    float tau = 100.0F, alpha = 1.7F, beta = 5.5F;

    Problem(std::vector<std::int64_t> offsets_, std::size_t width_, std::size_t batch_, ElementType type_,
            bool transformed = false)
        : width(width_), batch(batch_), offsets(std::move(offsets_)), type(type_) {
        const std::size_t n = n_keys();
        const std::size_t n_classes = offsets.size() - 1;
        text = unit_rows(n_classes, width);
        linear = unit_rows(n_classes, width);
        bias = unit_rows(1, n_classes);
        plain = unit_rows(batch, width);
        query = unit_rows(batch, width);
        feature = unit_rows(batch, width);
        moved = query;
        if (transformed) {
            transform = unit_rows(width, width);
            for (std::size_t b = 0; b < batch; ++b) {
                for (std::size_t d = 0; d < width; ++d) {
                    moved[b * width + d] = static_cast<float>(dot(transform, d, query, b));
                }
            }
        }
        weights.resize(n);
        std::uniform_real_distribution<float> uniform(0.1F, 3.0F);
        std::generate(weights.begin(), weights.end(), [&] { return uniform(rng); });
        encode(unit_rows(n, width));
    }

    std::size_t n_keys() const { return static_cast<std::size_t>(offsets.back()); }

    void encode(const std::vector<float>& rows) {
        exact_keys.resize(rows.size());
        keys.resize(rows.size() * (type == ElementType::kFloat32 ? 4 : type == ElementType::kInt8 ? 1 : 2));
        scales.assign(type == ElementType::kInt8 ? n_keys() : 0, 1.0F / 127.0F);
        for (std::size_t i = 0; i < rows.size(); ++i) {
            if (type == ElementType::kFloat32) {
                reinterpret_cast<float*>(keys.data())[i] = exact_keys[i] = rows[i];
            } else if (type == ElementType::kInt8) {
                const auto code = static_cast<std::int8_t>(std::lrint(rows[i] * 127.0F));
                reinterpret_cast<std::int8_t*>(keys.data())[i] = code;
                exact_keys[i] = static_cast<float>(code) / 127.0F;
            } else {
                std::uint32_t bits = 0;
                std::copy_n(reinterpret_cast<const char*>(&rows[i]), 4, reinterpret_cast<char*>(&bits));
                // Half by cutting the mantissa; values too small for a normal one become zero.
                const std::uint32_t exponent = (bits >> 23) & 0xffU;
                const std::uint32_t half = exponent < 113 ? 0 : ((exponent - 112) << 10) | ((bits >> 13) & 0x3ffU);
                const std::uint32_t narrow = type == ElementType::kBfloat16 ? bits >> 16 : ((bits >> 16) & 0x8000U) | half;
                reinterpret_cast<std::uint16_t*>(keys.data())[i] = static_cast<std::uint16_t>(narrow);
                if (type == ElementType::kFloat16) {
                    exact_keys[i] = iosr::half_to_float(static_cast<std::uint16_t>(narrow));
                } else {
                    const std::uint32_t back = narrow << 16;
                    std::copy_n(reinterpret_cast<const char*>(&back), 4, reinterpret_cast<char*>(&exact_keys[i]));
                }
            }
        }
    }

    std::vector<float> run(const iosr::Microkernels& kernels, std::size_t threads) const {
        iosr::PlanView plan;
        plan.n_classes = offsets.size() - 1;
        plan.width = width;
        plan.text = text.data();
        plan.keys = keys.data();
        plan.key_type = type;
        plan.key_scales = scales.empty() ? nullptr : scales.data();
        plan.class_offsets = offsets.data();
        plan.weights = weights.data();
        plan.linear = linear.data();
        plan.query_transform = transform.empty() ? nullptr : transform.data();
        plan.bias = bias.data();
        plan.tau = tau;
        plan.alpha = alpha;
        plan.beta = beta;
        std::vector<float> logits(batch * plan.n_classes, std::nanf(""));
        iosr::score(plan, {batch, plain.data(), query.data(), feature.data()}, kernels, threads, logits.data());
        return logits;
    }

    double dot(const std::vector<float>& a, std::size_t i, const std::vector<float>& b, std::size_t j) const {
        double sum = 0.0;
        for (std::size_t d = 0; d < width; ++d) {
            sum += static_cast<double>(a[i * width + d]) * b[j * width + d];
        }
        return sum;
    }

    // The formula of plan.h, literally.
    double truth(std::size_t b, std::size_t c) const {
        double sum = 0.0;
        for (auto j = static_cast<std::size_t>(offsets[c]); j < static_cast<std::size_t>(offsets[c + 1]); ++j) {
            sum += weights[j] * std::exp(-static_cast<double>(beta) * (1.0 - dot(moved, b, exact_keys, j)));
        }
        return tau * dot(plain, b, text, c) + alpha * sum + dot(feature, b, linear, c) + bias[c];
    }
};

void test_against_the_formula() {
    const std::vector<std::vector<std::int64_t>> layouts = {
        {0, 3, 4, 8, 9, 14}, {0, 0, 0, 2, 2, 9, 9}, {0, 1}, {0, 97}, {0, 1, 2, 3, 4, 5, 6, 7, 8}, {0, 150, 150, 377}};
    for (const ElementType type : {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBfloat16, ElementType::kInt8}) {
        for (const std::size_t width : {1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 123, 300}) {
            for (const std::size_t batch : {1, 2, 3, 4, 5, 6, 7, 9, 12, 16, 17, 24, 33}) {
                const bool transformed = (width + batch / 2) % 2 == 1;
                const Problem problem(layouts[(width + batch) % layouts.size()], width, batch, type, transformed);
                const std::size_t n_classes = problem.offsets.size() - 1;
                std::vector<double> truth;
                double scale = problem.tau;
                for (std::size_t i = 0; i < batch * n_classes; ++i) {
                    truth.push_back(problem.truth(i / n_classes, i % n_classes));
                    scale = std::max(scale, std::abs(truth.back()));
                }
                for (const Path& path : paths()) {
                    const std::vector<float> logits = problem.run(*path.kernels, 1);
                    double error = 0.0;
                    for (std::size_t i = 0; i < truth.size(); ++i) {
                        const double off = std::abs(logits[i] - truth[i]);
                        error = off <= error ? error : off;  // NaN counts
                    }
                    check(error <= 4e-6 * scale, path.name + ", type " + std::to_string(static_cast<int>(type)) + ", D " +
                                                     std::to_string(width) + ", B " + std::to_string(batch) +
                                                     ": error " + std::to_string(error));
                }
            }
        }
    }
}

void test_threads_change_nothing() {
    // A class of one key, one that spans many chunks, then ragged ones: sums cross the borders of chunks.
    const std::vector<std::int64_t> offsets = {0, 1, 9000, 9000, 9100, 9301, 12000};
    for (const std::size_t batch : {1, 6, 16, 40, 300}) {
        const Problem problem(offsets, 8, batch, ElementType::kInt8, batch % 4 == 0);
        for (const Path& path : paths()) {
            const std::vector<float> alone = problem.run(*path.kernels, 1);
            check(std::abs(alone[1] - problem.truth(0, 1)) <= 4e-6 * std::abs(problem.truth(0, 1)), path.name + " edges");
            for (const std::size_t threads : {2, 3, 7}) {
                check(problem.run(*path.kernels, threads) == alone, path.name + " with threads");
            }
        }
    }
}

// A thread that leaves the core of its caller is forbidden it for a moment, and for no longer.
void test_threads_may_run_wherever_they_might() {
#if defined(__linux__)
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32);
    const iosr::Microkernels& kernels = *iosr::choose_score_path("").kernels;
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
    const Problem problem({0, 700, 1400, 3000}, 64, 40, ElementType::kFloat32);
    const iosr::Microkernels& kernels = *iosr::choose_score_path("").kernels;
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
    const iosr::Microkernels& kernels = *iosr::choose_score_path("").kernels;
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
    check(std::string(iosr::choose_score_path("scalar").name) == "scalar", "scalar by name");
    check(iosr::choose_score_path("").supported(), "the best one is supported");
    for (const iosr::ScorePath& path : iosr::score_paths()) {
        bool refused = false;
        try {
            iosr::choose_score_path(path.name);
        } catch (const std::runtime_error&) {
            refused = true;
        }
        check(refused != path.supported(), std::string(path.name) + " is refused where it can't run");
    }
    try {
        iosr::choose_score_path("altivec");
        check(false, "an unknown path is refused");
    } catch (const std::runtime_error& error) {
        check(std::string(error.what()).find("scalar") != std::string::npos, "the refusal names the paths");
    }
}

}  // namespace

int main() {
    test_every_half();
    test_exp2();
    test_a_path_is_chosen_or_refused();
    test_against_the_formula();
    test_threads_change_nothing();
    test_threads_may_run_wherever_they_might();
    test_many_callers_at_once();
    test_after_fork();
    return report();
}
