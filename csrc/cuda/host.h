// Just enough of CUDA for few_queries.cu to run on a CPU, for tests (IOSR_FAST_HOST). A GPU's threads are fibers, which
// wait for each other at barriers and shuffles; blocks run one after another up to the grid's barrier. Shared memory
// holds NaNs at first. It shows wrong arithmetic, indices and missing numbers, not races or a GPU's memory model.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    explicit dim3(unsigned size = 0) : x(size) {}
    unsigned x;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
using std::max;
using std::min;

inline dim3 gridDim, blockIdx, threadIdx;

template <class To, class From>
To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline _Float16 __ushort_as_half(uint16_t bits) { return bits_as<_Float16>(bits); }
inline float __half2float(_Float16 value) { return static_cast<float>(value); }

namespace host {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr std::size_t kStack = 64 << 10;

struct Barrier {
    int waiting = 0;
    int passed = 0;
};
struct Block {
    ucontext_t threads[kThreads];
    std::unique_ptr<char[]> stacks{new char[kThreads * kStack]};
    Barrier block, warps[kWarps];
    float lanes[kThreads] = {};
    bool at_grid[kThreads] = {}, done[kThreads] = {};
};

inline Block* block;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::vector<char> shared;

inline void pause() { swapcontext(&block->threads[threadIdx.x], &scheduler); }
inline void wait(Barrier& barrier, int size) {
    const int passed = barrier.passed;
    if (++barrier.waiting == size) {
        barrier.waiting = 0;
        ++barrier.passed;
    }
    while (barrier.passed == passed) {
        pause();
    }
}
inline void run_thread() {
    body();
    block->done[threadIdx.x] = true;
    pause();
}
// Runs a block's threads in turn until each has ended, or waits for the grid unless that is `released`.
inline void run_block(Block& running, unsigned index, bool released) {
    block = &running;
    blockIdx.x = index;
    for (bool left = true; left;) {
        left = false;
        for (threadIdx.x = 0; threadIdx.x < kThreads; ++threadIdx.x) {
            if (!running.done[threadIdx.x] && (released || !running.at_grid[threadIdx.x])) {
                swapcontext(&scheduler, &running.threads[threadIdx.x]);
                left = true;
            }
        }
    }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::block->block, host::kThreads); }
inline float __shfl_xor_sync(uint32_t, float value, int offset) {
    host::Barrier& warp = host::block->warps[threadIdx.x / 32];
    host::block->lanes[threadIdx.x] = value;
    host::wait(warp, 32);
    const float other = host::block->lanes[threadIdx.x ^ offset];
    host::wait(warp, 32);
    return other;
}
namespace cooperative_groups {
struct Grid {
    void sync() const {
        host::block->at_grid[threadIdx.x] = true;
        host::pause();
    }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 2;
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
    return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t shared_bytes) {
    *blocks = static_cast<int>((100 << 10) / shared_bytes);
    return cudaSuccess;
}
template <class Plan, class Call, class Stream>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Plan, Call), dim3 grid, dim3, void** arguments,
                                        std::size_t shared_bytes, Stream) {
    host::body = [=] { kernel(*static_cast<Plan*>(arguments[0]), *static_cast<Call*>(arguments[1])); };
    gridDim = grid;
    std::vector<host::Block> blocks(grid.x);
    for (host::Block& block : blocks) {
        for (int thread = 0; thread < host::kThreads; ++thread) {
            ucontext_t& context = block.threads[thread];
            getcontext(&context);
            context.uc_stack.ss_sp = block.stacks.get() + thread * host::kStack;
            context.uc_stack.ss_size = host::kStack;
            makecontext(&context, host::run_thread, 0);
        }
    }
    for (const bool released : {false, true}) {
        for (unsigned index = 0; index < grid.x; ++index) {
            host::shared.assign(shared_bytes, static_cast<char>(0xFF));
            host::run_block(blocks[index], index, released);
        }
    }
    return cudaSuccess;
}
