// The kernels: a block program of block.h for each tile, and their launches.
#include <cuda_runtime.h>

#include <stdexcept>

#include "machine.cuh"
#include "score.h"

namespace iosr::cuda {
namespace {

void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(what + ": " + cudaGetErrorString(error));
    }
}

dim3 grid_of(int64_t blocks, const char* what) {
    if (blocks > INT32_MAX) {
        throw std::runtime_error(std::string(what) + ": expected at most 2^31 - 1 blocks, got " +
                                 std::to_string(blocks) + "; score fewer queries at a time");
    }
    return dim3(static_cast<unsigned>(blocks));
}

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

// Kernels have plain names, which a profiler and tools/cuda_aot.py show. The second bound asks for two blocks of 256
// threads on a multiprocessor, that is for at most 128 registers.
#define IOSR_KERNEL(name, Tile, Args, program)                                                              \
    extern "C" __global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)            \
        name(const __grid_constant__ Args args) {                                                          \
        __shared__ alignas(128) unsigned char shared[Tile::kSharedBytes];                                    \
        DeviceMachine<Registers<Tile>> machine(shared);                                                    \
        program<Tile>(machine, args, blockIdx.x);                                                          \
    }

IOSR_KERNEL(iosr_cache_fp32, LargeTile<Keys::kFp32>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_fp32_small, SmallTile<Keys::kFp32>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_fp16_mma, LargeTile<Keys::kFp16>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_fp16_mma_small, SmallTile<Keys::kFp16>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_bf16_mma, LargeTile<Keys::kBf16>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_bf16_mma_small, SmallTile<Keys::kBf16>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_int8_mma, LargeTile<Keys::kInt8>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_cache_int8_mma_small, SmallTile<Keys::kInt8>, CacheArgs, cache_block)
IOSR_KERNEL(iosr_linear_fp32, LinearTile<Keys::kFp32>, LinearArgs, linear_block)
IOSR_KERNEL(iosr_linear_fp32_small, LinearSmallTile<Keys::kFp32>, LinearArgs, linear_block)
IOSR_KERNEL(iosr_linear_fp16_mma, LinearTile<Keys::kFp16>, LinearArgs, linear_block)
IOSR_KERNEL(iosr_linear_fp16_mma_small, LinearSmallTile<Keys::kFp16>, LinearArgs, linear_block)

extern "C" __global__ void __launch_bounds__(kMergeThreads) iosr_merge(const __grid_constant__ MergeArgs args) {
    __shared__ alignas(16) unsigned char shared[kMergeThreads * sizeof(float)];
    DeviceMachine<MergeRegisters> machine(shared);
    merge_block(machine, args, blockIdx.x);
}

DeviceGuard::DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "CUDA can't be used");
    if (previous_ != device_) {
        check(cudaSetDevice(device_), "CUDA device " + std::to_string(device_) + " can't be used");
    }
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), "compute capability");
    if (major < 8) {
        restore();
        throw std::runtime_error("expected a device of compute capability 8.0 or newer, got " + std::to_string(major) +
                                 ".x for CUDA device " + std::to_string(device_));
    }
}

DeviceGuard::~DeviceGuard() { restore(); }

void DeviceGuard::restore() const {
    if (previous_ != device_) {
        cudaSetDevice(previous_);
    }
}

namespace {

template <class T>
void launch_cache_tile(void (*kernel)(CacheArgs), const CacheArgs& args, cudaStream_t stream) {
    const dim3 grid = grid_of(tiles(args.n_queries, T::kQueries) * tiles(args.n_keys, T::kTileKeys), "cache term");
    kernel<<<grid, T::kThreads, 0, stream>>>(args);
    check(cudaGetLastError(), "launch of the cache term");
}

template <Keys K>
void launch_cache_keys(void (*large)(CacheArgs), void (*small)(CacheArgs), const CacheArgs& args, cudaStream_t stream) {
    if (args.n_queries <= kSmallBatch) {
        launch_cache_tile<SmallTile<K>>(small, args, stream);
    } else {
        launch_cache_tile<LargeTile<K>>(large, args, stream);
    }
}

template <class T>
void launch_linear_tile(void (*kernel)(LinearArgs), const LinearArgs& args, cudaStream_t stream) {
    const dim3 grid = grid_of(tiles(args.n_queries, T::kQueries) * tiles(args.n_classes, T::kTileKeys), "linear terms");
    kernel<<<grid, T::kThreads, 0, stream>>>(args);
    check(cudaGetLastError(), "launch of the linear terms");
}

}  // namespace

void launch_cache(const CacheArgs& args, Keys keys, CUstream_st* stream) {
    switch (keys) {
        case Keys::kFp32:
            return launch_cache_keys<Keys::kFp32>(iosr_cache_fp32, iosr_cache_fp32_small, args, stream);
        case Keys::kFp16:
            return launch_cache_keys<Keys::kFp16>(iosr_cache_fp16_mma, iosr_cache_fp16_mma_small, args, stream);
        case Keys::kBf16:
            return launch_cache_keys<Keys::kBf16>(iosr_cache_bf16_mma, iosr_cache_bf16_mma_small, args, stream);
        case Keys::kInt8:
            return launch_cache_keys<Keys::kInt8>(iosr_cache_int8_mma, iosr_cache_int8_mma_small, args, stream);
    }
}

void launch_merge(const MergeArgs& args, CUstream_st* stream) {
    const int64_t boundaries = tiles(args.n_keys, kChunk) - 1;
    const dim3 grid = grid_of(boundaries * tiles(args.n_queries, kMergeThreads), "merge of spanning classes");
    iosr_merge<<<grid, kMergeThreads, 0, stream>>>(args);
    check(cudaGetLastError(), "launch of the merge");
}

void launch_linear(const LinearArgs& args, Keys format, CUstream_st* stream) {
    const bool small = args.n_queries <= kSmallBatch;
    if (format == Keys::kFp16 && small) {
        launch_linear_tile<LinearSmallTile<Keys::kFp16>>(iosr_linear_fp16_mma_small, args, stream);
    } else if (format == Keys::kFp16) {
        launch_linear_tile<LinearTile<Keys::kFp16>>(iosr_linear_fp16_mma, args, stream);
    } else if (small) {
        launch_linear_tile<LinearSmallTile<Keys::kFp32>>(iosr_linear_fp32_small, args, stream);
    } else {
        launch_linear_tile<LinearTile<Keys::kFp32>>(iosr_linear_fp32, args, stream);
    }
}

}  // namespace iosr::cuda
