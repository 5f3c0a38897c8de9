// What the tests of the C++ kernels share. Each test program includes this once.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "scoring/score.h"

namespace iosr {

// The inner loops at the sixteen lanes of AVX-512, in plain C++ (wide_kernels.cpp).
extern const Microkernels kWideKernels;
float half_to_float(std::uint16_t bits);

}  // namespace iosr

namespace {

int failures = 0;
int checks = 0;

void check(bool good, const std::string& what) {
    ++checks;
    if (!good && ++failures <= 20) {
        std::printf("FAILED %s\n", what.c_str());
    }
}

std::mt19937 rng(20240911);  // NOLINT: the same numbers in every run

std::vector<float> unit_rows(std::size_t n, std::size_t width) {
    std::normal_distribution<float> normal;
    std::vector<float> rows(n * width);
    for (std::size_t r = 0; r < n; ++r) {
        double square = 0.0;
        for (std::size_t d = 0; d < width; ++d) {
            rows[r * width + d] = normal(rng);
            square += rows[r * width + d] * rows[r * width + d];
        }
        for (std::size_t d = 0; d < width; ++d) {
            rows[r * width + d] = static_cast<float>(rows[r * width + d] / std::sqrt(square));
        }
    }
    return rows;
}

struct Path {
    std::string name;
    const iosr::Microkernels* kernels;
};

// The wide path, and every path that this processor can run.
std::vector<Path> paths() {
    std::vector<Path> supported = {{"wide", &iosr::kWideKernels}};
    for (const iosr::ScorePath& path : iosr::score_paths()) {
        if (path.supported()) {
            supported.push_back({path.name, path.kernels});
        }
    }
    return supported;
}

// Prints the summary that the callers parse; the exit code of a test program.
int report() {
    std::string names;
    for (const Path& path : paths()) {
        names += " " + path.name;
    }
    std::printf("%d checks, %d failed; paths:%s\n", checks, failures, names.c_str());
    return failures == 0 ? 0 : 1;
}

}  // namespace
