// NEON: every 64-bit Arm processor.
#include "scoring/microkernels.h"

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace iosr {
namespace {

#include "scoring/channels.inl"

struct V {
    static constexpr std::size_t kLanes = 4;
    static constexpr std::size_t kBlockRows = 4;
    float32x4_t v;

    static V zero() { return {vdupq_n_f32(0.0F)}; }
    static V broadcast(float x) { return {vdupq_n_f32(x)}; }
    static V load(const float* p) { return {vld1q_f32(p)}; }
    static V load(const Half* p) {
        return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p))))};
    }
    static V load(const Bfloat* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(p)), 16))};
    }
    static V load(const std::int8_t* p) {
        std::uint32_t four = 0;  // vld1_s8 would read eight
        std::memcpy(&four, p, sizeof(four));
        const int16x8_t wide = vmovl_s8(vcreate_s8(four));
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)))};
    }
    void store(float* p) const { vst1q_f32(p, v); }
    static V fma(V a, V b, V c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
    static V max(V a, V b) { return {vmaxq_f32(a.v, b.v)}; }
    friend V operator+(V a, V b) { return {vaddq_f32(a.v, b.v)}; }
    friend V operator-(V a, V b) { return {vsubq_f32(a.v, b.v)}; }
    friend V operator*(V a, V b) { return {vmulq_f32(a.v, b.v)}; }
    float sum() const { return vaddvq_f32(v); }
    static V scale_by_power(V value, V biased) {
        const int32x4_t power = vshlq_n_s32(vreinterpretq_s32_f32(biased.v), 23);
        return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(value.v), power))};
    }
};

#include "scoring/microkernels.inl"

}  // namespace

const Microkernels kNeonKernels = kKernels;

}  // namespace iosr
