// AVX2, FMA and F16C: Haswell (2013), Zen (2017) and later.
#include "scoring/microkernels.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace iosr {
namespace {

#include "scoring/channels.inl"

struct V {
    static constexpr std::size_t kLanes = 8;
    static constexpr std::size_t kBlockRows = 2;
    __m256 v;

    static V zero() { return {_mm256_setzero_ps()}; }
    static V broadcast(float x) { return {_mm256_set1_ps(x)}; }
    static V load(const float* p) {
        __m256 v = _mm256_loadu_ps(p);
        __asm__("" : "+x"(v));  // GCC would load again for each use
        return {v};
    }
    static V load(const Half* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
    }
    static V load(const Bfloat* p) {
        const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
    }
    static V load(const std::int8_t* p) {
        const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        return {_mm256_cvtepi32_ps(wide)};
    }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
    static V max(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
    friend V operator+(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
    friend V operator-(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
    friend V operator*(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
    float sum() const {
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static V scale_by_power(V value, V biased) {
        const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(biased.v), 23);
        return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(value.v), power))};
    }
};

#include "scoring/microkernels.inl"

}  // namespace

const Microkernels kAvx2Kernels = kKernels;

}  // namespace iosr
