// Launches of the scoring kernels on a stream of the current device. They neither synchronise nor allocate, so they can
// be captured into a CUDA graph. A failed launch throws std::runtime_error with CUDA's message.
#pragma once

#include <string>

#include "plan.h"
#include "tile.h"

struct CUstream_st;

namespace iosr::cuda {

// The largest batch for the tile with 16 queries.
constexpr int64_t kSmallBatch = 16;

// Makes `device` current for its lifetime. cudaSetDevice creates a context, so it is not called if the device is
// current already, as it is for score_cuda. Throws if there is no such device or driver, or the device is older than
// compute capability 8.0.
class DeviceGuard {
public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    void restore() const;

    int device_;
    int previous_ = 0;
};

void launch_cache(const CacheArgs& args, Keys keys, CUstream_st* stream);
void launch_merge(const MergeArgs& args, CUstream_st* stream);
// `format` is fp32 or fp16.
void launch_linear(const LinearArgs& args, Keys format, CUstream_st* stream);

}  // namespace iosr::cuda
