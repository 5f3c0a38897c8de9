// The machine of multiply.h on a GPU of compute capability 8.0 or newer.
#pragma once

#include <cuda_fp16.h>

#include "block.h"

namespace iosr::cuda {

// D += A B on the tensor cores: A 16 x 16, B 16 x 8, D in float.
template <Keys K>
__device__ __forceinline__ void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
    if constexpr (K == Keys::kBf16) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

template <class R>
class DeviceMachine {
public:
    __device__ explicit DeviceMachine(unsigned char* shared) : shared_(shared) {}

    template <class F>
    __device__ __forceinline__ void each_thread(F&& f) {
        f(static_cast<int>(threadIdx.x), registers_);
    }

    __device__ __forceinline__ void copy(int, int target, const void* source, bool inside) {
        const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_ + target));
        // Missing bytes of the copy, here all or none, are zero.
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
                     "r"(inside ? kCopy : 0)
                     : "memory");
    }
    __device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
    template <int Pending>
    __device__ __forceinline__ void wait() {
        asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
    }

    __device__ __forceinline__ void barrier() { __syncthreads(); }
    __device__ __forceinline__ void warp_barrier() { __syncwarp(); }

    template <class V>
    __device__ __forceinline__ V load(int, int offset) {
        return *reinterpret_cast<const V*>(shared_ + offset);
    }
    template <class V>
    __device__ __forceinline__ void store(int, int offset, const V& value) {
        *reinterpret_cast<V*>(shared_ + offset) = value;
    }

    template <Keys K, class F>
    __device__ __forceinline__ void mma(F&& f) {
        const MmaRegisters r = f(registers_);
        mma_m16n8k16<K>(r.accumulator, r.a, r.b);
    }

    // Two fp16 differences at once, exact if the result is representable.
    __device__ __forceinline__ uint32_t subtract_halves(uint32_t x, uint32_t y) {
        uint32_t out;
        asm("sub.f16x2 %0, %1, %2;" : "=r"(out) : "r"(x), "r"(y));
        return out;
    }

private:
    R registers_;
    unsigned char* shared_;
};

}  // namespace iosr::cuda
