// The launches of score.h on the CPU: with bindings.cpp this makes a _C_cuda for tests, which takes addresses of host
// memory and runs each block of the kernels on a HostMachine.
#include "score.h"

#include "host_machine.h"

namespace iosr::cuda {
namespace {

int64_t tiles(int64_t n, int64_t size) { return (n + size - 1) / size; }

template <class T>
void run_cache(const CacheArgs& args) {
    const int64_t blocks = tiles(args.n_queries, T::kQueries) * tiles(args.n_keys, T::kTileKeys);
    for (int64_t block = 0; block < blocks; ++block) {
        HostMachine<Registers<T>> machine(T::kThreads, T::kSharedBytes);
        cache_block<T>(machine, args, block);
    }
}

template <Keys K>
void run_cache_keys(const CacheArgs& args) {
    args.n_queries <= kSmallBatch ? run_cache<SmallTile<K>>(args) : run_cache<LargeTile<K>>(args);
}

template <class T>
void run_linear(const LinearArgs& args) {
    const int64_t blocks = tiles(args.n_queries, T::kQueries) * tiles(args.n_classes, T::kTileKeys);
    for (int64_t block = 0; block < blocks; ++block) {
        HostMachine<Registers<T>> machine(T::kThreads, T::kSharedBytes);
        linear_block<T>(machine, args, block);
    }
}

template <Keys K>
void run_linear_rows(const LinearArgs& args) {
    args.n_queries <= kSmallBatch ? run_linear<LinearSmallTile<K>>(args) : run_linear<LinearTile<K>>(args);
}

}  // namespace

DeviceGuard::DeviceGuard(int device) : device_(device) {}
DeviceGuard::~DeviceGuard() = default;

void launch_cache(const CacheArgs& args, Keys keys, CUstream_st*) {
    switch (keys) {
        case Keys::kFp32:
            return run_cache_keys<Keys::kFp32>(args);
        case Keys::kFp16:
            return run_cache_keys<Keys::kFp16>(args);
        case Keys::kBf16:
            return run_cache_keys<Keys::kBf16>(args);
        case Keys::kInt8:
            return run_cache_keys<Keys::kInt8>(args);
    }
}

void launch_merge(const MergeArgs& args, CUstream_st*) {
    const int64_t blocks = (tiles(args.n_keys, kChunk) - 1) * tiles(args.n_queries, kMergeThreads);
    for (int64_t block = 0; block < blocks; ++block) {
        HostMachine<MergeRegisters> machine(kMergeThreads, kMergeThreads * 4);
        merge_block(machine, args, block);
    }
}

void launch_linear(const LinearArgs& args, Keys format, CUstream_st*) {
    format == Keys::kFp16 ? run_linear_rows<Keys::kFp16>(args) : run_linear_rows<Keys::kFp32>(args);
}

}  // namespace iosr::cuda
