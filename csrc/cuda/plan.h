// Arguments of the kernels: device pointers that they don't own, checked by the caller. Rows of queries and keys are
// contiguous, 16-byte aligned and zero-padded to a multiple of 16 bytes.
#pragma once

#include <cstdint>

namespace iosr::cuda {

constexpr int kMaxParts = 3;
constexpr int64_t kMaxRowBytes = 1 << 22;  // so that offsets within a tile of 128 rows fit 32 bits

// logits[b, c] = alpha * sum over keys j of class c: weights[j] * exp2(scale * <query[b], key[j]> - scale)
// where key[j] = key_scales[j] * keys[j] for int8. Queries of more bits than half keys come in up to kMaxParts parts
// side by side, the least significant first, each padded with zeros to a multiple of 64 bytes:
// <query, key> = <part 2, key> + part_scale * (<part 1, key> + part_scale * <part 0, key>).
// Writes the classes within a chunk of kChunk keys; the sums of others in each chunk go to `edges`.
struct CacheArgs {
    const void* queries = nullptr;  // (B, query_bytes)
    const void* keys = nullptr;     // (N, key_bytes), sorted by class
    int64_t n_queries = 0;          // B
    int64_t n_keys = 0;             // N
    int64_t n_classes = 0;          // C
    int64_t query_bytes = 0;
    int64_t key_bytes = 0;
    int query_parts = 1;
    float part_scale = 1.0F;
    const int32_t* key_class = nullptr;  // (N,): the class of each key, rising
    const float* weights = nullptr;      // (N,), or null for ones
    const float* key_scales = nullptr;   // (N,), or null for ones
    float scale = 0.0F;                  // beta * log2(e)
    float alpha = 0.0F;
    float* edges = nullptr;   // (2 * chunks, B)
    float* logits = nullptr;  // (B, C)
};

// Sums the edges of the classes that span chunks into the logits.
struct MergeArgs {
    const int32_t* class_offsets = nullptr;  // (C + 1,)
    const int32_t* key_class = nullptr;      // (N,)
    int64_t n_queries = 0;
    int64_t n_keys = 0;
    int64_t n_classes = 0;
    const float* edges = nullptr;
    float alpha = 0.0F;
    float* logits = nullptr;
};

// logits[b, c] = start[b, c] + sum over operands: factor * <queries[b], row[c]>, with start[b, c] = bias[c], plus
// logits[b, c] if class c has keys (class_offsets). Queries and rows are float32; or both are fp16, and rows come in
// row_parts parts with part_scale between two, as the queries of CacheArgs do.
struct Operand {
    const void* queries = nullptr;  // (B, query_bytes)
    const void* rows = nullptr;     // (C, row_bytes)
    int64_t query_bytes = 0;
    int64_t row_bytes = 0;
    float factor = 1.0F;
};

struct LinearArgs {
    Operand operands[2];
    int n_operands = 0;
    int row_parts = 1;
    float part_scale = 1.0F;
    int64_t n_queries = 0;
    int64_t n_classes = 0;
    const float* bias = nullptr;             // (C,), or null
    const int32_t* class_offsets = nullptr;  // (C + 1,), or null without a cache term
    float* logits = nullptr;
};

}  // namespace iosr::cuda
