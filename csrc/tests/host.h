// Just enough of CUDA to run few_queries.cu on a CPU, for tests (IOSR_FAST_HOST). A GPU's threads are fibers that wait
// for one another at barriers and shuffles. A warp runs as far as it gets before the next one, and blocks one after
// another up to the grid's barrier; shared memory holds NaNs at first. So wrong arithmetic and indices, numbers that no
// thread wrote and most missing barriers of a block give wrong logits. A function's launches may have as much shared
// memory as was last set for it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
    explicit dim3(unsigned size = 0) : x(size) {}
    unsigned x;
};
inline dim3 gridDim, blockIdx, threadIdx;

namespace host {

constexpr int kThreads = 256;
constexpr std::size_t kStack = 64 << 10;

struct Block {
    ucontext_t threads[kThreads];
    std::unique_ptr<char[]> stacks{new char[kThreads * kStack]};
    bool stopped[kThreads];
    float lanes[kThreads];  // what a thread gives to a shuffle
    int arrived = 0, arrived_in_warp[kThreads / 32] = {};
};

inline Block* block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::vector<char> shared;
inline std::map<void*, std::size_t> shared_limits;  // bytes by function
inline bool moved;  // whether a thread has got further

inline void pause() { swapcontext(&block->threads[threadIdx.x], &scheduler); }
inline void stop() {  // at the grid's barrier, or at the end
    block->stopped[threadIdx.x] = moved = true;
    pause();
}
inline void run_thread() {
    kernel();
    stop();
}
inline void wait(int& arrived, int size) {
    const int all = (arrived++ / size + 1) * size;
    moved = true;
    while (arrived < all) {
        pause();
    }
}
// Runs the block's warps in turn until all threads have stopped.
inline void run_block() {
    for (unsigned first = 0; std::count(block->stopped, block->stopped + kThreads, true) < kThreads;) {
        moved = false;
        for (threadIdx.x = first; threadIdx.x < first + 32; ++threadIdx.x) {
            if (!block->stopped[threadIdx.x]) {
                swapcontext(&scheduler, &block->threads[threadIdx.x]);
            }
        }
        first = moved ? first : (first + 32) % kThreads;
    }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block->arrived, host::kThreads); }
inline float __shfl_xor_sync(uint32_t, float value, int offset) {
    int& arrived = host::block->arrived_in_warp[threadIdx.x / 32];
    host::block->lanes[threadIdx.x] = value;
    host::wait(arrived, 32);
    const float other = host::block->lanes[threadIdx.x ^ offset];
    host::wait(arrived, 32);
    return other;
}
namespace cooperative_groups {
struct Grid {
    void sync() const { host::stop(); }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = uint64_t{high} << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    }
    return result;
}
inline float __uint_as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline _Float16 __ushort_as_half(uint16_t bits) { return __builtin_bit_cast(_Float16, bits); }
inline float __half2float(_Float16 value) { return static_cast<float>(value); }

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaErrorInvalidValue = 1;
constexpr int cudaDevAttrMultiProcessorCount = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline const char* cudaGetErrorString(int) { return "invalid argument"; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }
template <class Function>
int cudaFuncSetAttribute(Function* function, int, int bytes) {
    return host::shared_limits[reinterpret_cast<void*>(function)] = bytes, cudaSuccess;
}
template <class... Others>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Others...) {
    return *blocks = 2, cudaSuccess;
}
template <class Plan, class Call, class Stream>
int cudaLaunchCooperativeKernel(void (*kernel)(Plan, Call), dim3 grid, dim3, void** arguments, std::size_t shared_bytes,
                                Stream) {
    if (shared_bytes > host::shared_limits[reinterpret_cast<void*>(kernel)]) {
        return cudaErrorInvalidValue;
    }
    host::kernel = [=] { kernel(*static_cast<Plan*>(arguments[0]), *static_cast<Call*>(arguments[1])); };
    gridDim = grid;
    std::vector<host::Block> blocks(grid.x);
    for (const bool first : {true, false}) {  // up to the grid's barrier, and from there on
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            host::block = &blocks[blockIdx.x];
            host::shared.assign(shared_bytes, static_cast<char>(0xFF));
            std::fill_n(host::block->stopped, host::kThreads, false);
            for (int thread = 0; first && thread < host::kThreads; ++thread) {
                ucontext_t& context = host::block->threads[thread];
                getcontext(&context);
                context.uc_stack.ss_sp = host::block->stacks.get() + thread * host::kStack;
                context.uc_stack.ss_size = host::kStack;
                makecontext(&context, host::run_thread, 0);
            }
            host::run_block();
        }
    }
    return cudaSuccess;
}
