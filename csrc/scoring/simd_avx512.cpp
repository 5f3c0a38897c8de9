// AVX-512F: Skylake-SP (2017), Zen 4 (2022) and later.
#include "scoring/microkernels.h"

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace iosr {
namespace {

#include "scoring/channels.inl"

struct V {
    static constexpr std::size_t kLanes = 16;
    static constexpr std::size_t kBlockRows = 4;
    __m512 v;

    static V zero() { return {_mm512_setzero_ps()}; }
    static V broadcast(float x) { return {_mm512_set1_ps(x)}; }
    static V load(const float* p) {
        __m512 v = _mm512_loadu_ps(p);
        __asm__("" : "+v"(v));  // GCC would load again for each use; loads across cache lines take twice as long
        return {v};
    }
    static V load(const Half* p) {
        return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
    }
    static V load(const Bfloat* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
    }
    static V load(const std::int8_t* p) {
        const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return {_mm512_cvtepi32_ps(wide)};
    }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
    static V max(V a, V b) { return {_mm512_max_ps(a.v, b.v)}; }
    friend V operator+(V a, V b) { return {_mm512_add_ps(a.v, b.v)}; }
    friend V operator-(V a, V b) { return {_mm512_sub_ps(a.v, b.v)}; }
    friend V operator*(V a, V b) { return {_mm512_mul_ps(a.v, b.v)}; }
    float sum() const { return _mm512_reduce_add_ps(v); }
    static V scale_by_power(V value, V biased) {
        const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(biased.v), 23);
        return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(value.v), power))};
    }
};

#include "scoring/microkernels.inl"

}  // namespace

const Microkernels kAvx512Kernels = kKernels;

}  // namespace iosr
