// Which instruction sets were compiled in, and which this processor and operating system can run.
#include <stdexcept>

#include "scoring/paths.h"

#ifdef IOSR_FAST_X86
#include <cpuid.h>
#endif

namespace iosr {
namespace {

#ifdef IOSR_FAST_X86

// What the processor has and the operating system saves.
bool has_avx2() {
    static const bool f16c = [] {  // not known to every compiler's builtin
        unsigned a = 0, b = 0, c = 0, d = 0;
        return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
    }();
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512f"); }

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
