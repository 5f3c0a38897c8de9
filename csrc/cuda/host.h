// Just enough of CUDA to run few_queries.cu on a CPU, for tests (IOSR_FAST_HOST). A GPU's threads are fibers that wait
// for one another at barriers and shuffles; blocks run one after another up to the grid's barrier. Shared memory holds
// NaNs at first. This finds wrong arithmetic, wrong indices and numbers that no thread wrote, but no races.
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

struct Barrier {
    int waiting = 0, passed = 0;
};
struct Block {
    ucontext_t threads[kThreads];
    std::unique_ptr<char[]> stacks{new char[kThreads * kStack]};
    Barrier barrier, warps[kThreads / 32];
    float lanes[kThreads];  // what a thread gives to a shuffle
    bool stopped[kThreads];
};

inline Block* block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline std::vector<char> shared;

inline void pause() { swapcontext(&block->threads[threadIdx.x], &scheduler); }
inline void stop() {  // at the grid's barrier, or at the end
    block->stopped[threadIdx.x] = true;
    pause();
}
inline void run_thread() {
    kernel();
    stop();
}
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

}  // namespace host

inline void __syncthreads() { host::wait(host::block->barrier, host::kThreads); }
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
    void sync() const { host::stop(); }
};
inline Grid this_grid() { return {}; }
}  // namespace cooperative_groups

template <class To, class From>
To bits_as(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(uint32_t bits) { return bits_as<float>(bits); }
inline _Float16 __ushort_as_half(uint16_t bits) { return bits_as<_Float16>(bits); }
inline float __half2float(_Float16 value) { return static_cast<float>(value); }

using cudaError_t = int;
constexpr int cudaSuccess = 0, cudaDevAttrMultiProcessorCount = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 0;
inline const char* cudaGetErrorString(int) { return ""; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, int, int) { return *value = 2, cudaSuccess; }
template <class Kernel>
int cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
template <class Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
    return *blocks = 2, cudaSuccess;
}
template <class Plan, class Call, class Stream>
int cudaLaunchCooperativeKernel(void (*kernel)(Plan, Call), dim3 grid, dim3, void** arguments, std::size_t shared_bytes,
                                Stream) {
    host::kernel = [=] { kernel(*static_cast<Plan*>(arguments[0]), *static_cast<Call*>(arguments[1])); };
    gridDim = grid;
    std::vector<host::Block> blocks(grid.x);
    for (int part = 0; part < 2; ++part) {  // before the grid's barrier and after it
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            host::block = &blocks[blockIdx.x];
            host::shared.assign(shared_bytes, static_cast<char>(0xFF));
            for (int thread = 0; thread < host::kThreads; ++thread) {
                ucontext_t& context = host::block->threads[thread];
                host::block->stopped[thread] = false;
                if (part == 0) {
                    getcontext(&context);
                    context.uc_stack.ss_sp = host::block->stacks.get() + thread * host::kStack;
                    context.uc_stack.ss_size = host::kStack;
                    makecontext(&context, host::run_thread, 0);
                }
            }
            for (bool running = true; running;) {
                running = false;
                for (threadIdx.x = 0; threadIdx.x < host::kThreads; ++threadIdx.x) {
                    if (!host::block->stopped[threadIdx.x]) {
                        swapcontext(&host::scheduler, &host::block->threads[threadIdx.x]);
                        running = true;
                    }
                }
            }
        }
    }
    return cudaSuccess;
}
