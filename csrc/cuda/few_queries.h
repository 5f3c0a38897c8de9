// The cache term for 1 to 16 queries, in one launch; for batches kernels/affinity_sums.py has it:
//   logits[b, c] += alpha * sum over keys j: weights[j] * exp(-beta * (1 - <queries[b], key[j]>)) * values[j, c]
// where without `values` a key has 1 at its class and 0 elsewhere, and key[j] = key_scales[j] * keys[j] for int8 keys.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace iosr::cuda {

enum class Format { kFp32, kFp16, kBf16, kInt8 };  // of keys

// Device addresses, which the caller keeps alive, and constants. Rows of keys and values begin at multiples of 16
// bytes, and zeros fill them up to one.
struct Plan {
    const void* keys;              // (N, key_vectors * 16 bytes), sorted by class if there are classes
    const float* key_scales;       // (N,), or null for ones
    const float* weights;          // (N,), or null for ones
    const int32_t* class_offsets;  // (C + 1,), or null with values
    const int32_t* tile_classes;   // (tiles + 1,): the class of each tile's first key, and of the last key
    const void* values;            // (N, value_stride) float32 or fp16, or null with classes
    bool half_values;
    int32_t n_keys;
    int32_t n_classes;
    int32_t width;         // channels of a query
    int32_t key_vectors;   // vectors of 16 bytes in a row of keys
    int32_t value_stride;  // elements in a row of values
    int32_t tile_keys;     // tile_keys(device, n_keys)
    float scale;           // beta * log2(e)
    float alpha;
};

struct Call;  // what a launch reads beside the plan

// Keys that a block takes at a time, at most 64: as many tiles as blocks that the device runs at once, or a multiple.
int tile_keys(int device, int64_t n_keys);

// A plan with its launches, for a device that the caller makes current around each call. Calls neither allocate nor
// wait, so CUDA graphs can record them; they may run on several streams at once, because all that they write lies in
// their own workspace. Equal calls give equal bits. Errors of CUDA are std::runtime_error with its message.
class BoundPlan {
public:
    BoundPlan(int device, Format format, const Plan& plan);

    // float32 elements that a call with so many queries needs.
    int64_t workspace_size(int n_queries) const;

    // Device addresses: queries (n_queries, D), logits (n_queries, C), and a workspace that is 16-byte aligned.
    void add_affinity_sums(const float* queries, int n_queries, float* logits, float* workspace,
                           CUstream_st* stream) const;

private:
    struct Launch {
        void (*kernel)(Plan, Call);
        int stage;  // vectors of a row of keys for which queries are in shared memory at a time
        int shared_bytes;
        int blocks;
    };
    const Launch& launch_of(int n_queries) const { return launches_[n_queries == 1 ? 0 : n_queries <= 4 ? 1 : 2]; }

    int device_;
    Plan plan_;
    Launch launches_[3];
};

}  // namespace iosr::cuda
