// Which instruction sets were compiled in, and which this processor and operating system can run.
#include <stdexcept>

#include "scoring/paths.h"

#ifdef IOSR_FAST_X86
#include <cpuid.h>
#endif

namespace iosr {
namespace {

#ifdef IOSR_FAST_X86

struct Cpuid {
    unsigned a = 0, b = 0, c = 0, d = 0;
    explicit Cpuid(unsigned leaf) { __get_cpuid_count(leaf, 0, &a, &b, &c, &d); }
};

// The register states that the operating system saves and restores (XCR0), or 0 if it saves none of the wide ones.
unsigned long long saved_states() {
    constexpr unsigned kOsxsave = 1U << 27;
    if ((Cpuid(1).c & kOsxsave) == 0) {
        return 0;
    }
    unsigned low = 0;
    unsigned high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

bool find_avx2() {
    constexpr unsigned kFma = 1U << 12;
    constexpr unsigned kF16c = 1U << 29;
    constexpr unsigned kAvx2 = 1U << 5;
    constexpr unsigned long long kYmm = 0x6;  // SSE and AVX state
    return (saved_states() & kYmm) == kYmm && (Cpuid(1).c & (kFma | kF16c)) == (kFma | kF16c) &&
           (Cpuid(7).b & kAvx2) != 0;
}

bool find_avx512() {
    constexpr unsigned kAvx512F = 1U << 16;
    constexpr unsigned long long kZmm = 0xe6;  // and the opmask and both halves of the ZMM state
    return find_avx2() && (saved_states() & kZmm) == kZmm && (Cpuid(7).b & kAvx512F) != 0;
}

// Cached, because CPUID takes tens of microseconds under a hypervisor.
bool has_avx2() {
    static const bool found = find_avx2();
    return found;
}

bool has_avx512() {
    static const bool found = find_avx512();
    return found;
}

#endif

bool always() { return true; }

}  // namespace

const std::vector<ScoringPath>& scoring_paths() {
    static const std::vector<ScoringPath> paths = {
#ifdef IOSR_FAST_X86
        {"avx512", &kAvx512Kernels, has_avx512},
        {"avx2", &kAvx2Kernels, has_avx2},
#endif
#ifdef IOSR_FAST_NEON
        {"neon", &kNeonKernels, always},
#endif
        {"scalar", &kScalarKernels, always},
    };
    return paths;
}

const ScoringPath& choose_path(const std::string& requested) {
    std::string names;
    for (const ScoringPath& path : scoring_paths()) {
        if (requested.empty() ? path.supported() : requested == path.name) {
            if (path.supported()) {
                return path;
            }
            throw std::runtime_error("IOSR_FAST_SIMD=" + requested + " is compiled, but this processor can't run it");
        }
        names += std::string(names.empty() ? "" : ", ") + path.name;
    }
    throw std::runtime_error("expected IOSR_FAST_SIMD to name a compiled path (" + names + "), got '" + requested +
                             "'; unset it to take the best one");
}

}  // namespace iosr
