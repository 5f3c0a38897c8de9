// The program of one block of each kernel after its product is in registers (multiply.h): class sums, linear terms,
// merges.
#pragma once

#include <cmath>

#include "multiply.h"

namespace iosr::cuda {

struct MergeRegisters {
    float sum;
};

// One lane adds the keys of one pass for one query and stores a class's sum when the class or the chunk ends.
template <class T, class Machine>
IOSR_BLOCK void sum_classes(Machine& machine, const CacheArgs& args, int thread, int64_t first_query,
                            int64_t first_key, int pass, float& sum) {
    constexpr int kBatch = 8;  // affinities in flight; the sum is a chain of additions
    const int warp = thread / kWarp;
    const int lane = thread % kWarp;
    if (lane >= T::kWarpQueries) {
        return;
    }
    const int64_t query = first_query + warp_first_query<T>(warp) + lane;
    const int chunk_entry = warp_first_key<T>(warp) + 1;
    const int64_t chunk = (first_key + warp_first_key<T>(warp)) / kChunk;
    const auto entry_offset = [](int entry) { return T::kTableBase + entry * static_cast<int>(sizeof(KeyEntry)); };
    const auto entry_class = [&](int entry) {
        return machine.template load<KeyEntry>(thread, entry_offset(entry)).cls;
    };
    const int32_t before = entry_class(chunk_entry - 1);
    const int32_t after = entry_class(chunk_entry + kChunk);
    for (int begin = 0; begin < kPass; begin += kBatch) {
        float affinity[kBatch];
        int32_t cls[kBatch + 1];
        IOSR_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            const KeyEntry entry =
                machine.template load<KeyEntry>(thread, entry_offset(chunk_entry + pass * kPass + begin + i));
            const int offset = warp * T::kPatchBytes + ((begin + i) * T::kPatchStride + lane) * 4;
            const float dot = machine.template load<float>(thread, offset);
            affinity[i] = entry.weight * exp2f(fmaf(dot, entry.multiplier, -args.scale));
            cls[i] = entry.cls;
        }
        cls[kBatch] = entry_class(chunk_entry + pass * kPass + begin + kBatch);
        IOSR_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            if (cls[i] < 0) {
                return;  // past the last key
            }
            sum += affinity[i];
            const bool last = pass * kPass + begin + i == kChunk - 1;
            if (!last && cls[i + 1] == cls[i]) {
                continue;
            }
            const Destination destination = destination_of(cls[i], before, after);
            if (query < args.n_queries) {
                if (destination == Destination::kLogits) {
                    args.logits[query * args.n_classes + cls[i]] = args.alpha * sum;
                } else {
                    args.edges[edge_slot(chunk, destination) * args.n_queries + query] = sum;
                }
            }
            sum = 0.0F;
        }
    }
}

template <class T, class Machine>
IOSR_BLOCK void cache_block(Machine& machine, const CacheArgs& args, int64_t block) {
    // Neighbouring blocks share their keys, which are many; queries are few and stay in the L2 cache.
    const int64_t query_tiles = (args.n_queries + T::kQueries - 1) / T::kQueries;
    const int64_t first_query = block % query_tiles * T::kQueries;
    const int64_t first_key = block / query_tiles * T::kTileKeys;
    machine.each_thread([](int, Registers<T>& own) { own.sum = 0.0F; });
    Matrices from = tile_of<T>(args.queries, args.keys, args.query_bytes, args.key_bytes, first_query, first_key,
                               args.n_queries, args.n_keys);
    from.parts = args.query_parts;
    from.part_scale = args.part_scale;
    multiply_tile<T>(machine, from);
    machine.each_thread([&](int thread, Registers<T>&) {
        for (int entry = thread; entry < T::kTableEntries; entry += T::kThreads) {
            const int64_t key = first_key + entry - 1;
            const bool inside = key >= 0 && key < args.n_keys;
            KeyEntry value;
            value.cls = inside ? args.key_class[key] : -1;
            value.weight = inside && args.weights != nullptr ? args.weights[key] : 1.0F;
            value.multiplier = args.scale * (inside && args.key_scales != nullptr ? args.key_scales[key] : 1.0F);
            machine.store(thread, T::kTableBase + entry * static_cast<int>(sizeof(KeyEntry)), value);
        }
    });
    machine.barrier();
    IOSR_UNROLL
    for (int pass = 0; pass < kChunk / kPass; ++pass) {
        machine.each_thread([&](int thread, Registers<T>& own) {
            const int lane = thread % kWarp;
            IOSR_UNROLL
            for (int i = 0; i < T::kMI; ++i) {
                IOSR_UNROLL
                for (int j = 0; j < kPass / 8; ++j) {
                    IOSR_UNROLL
                    for (int r = 0; r < 4; ++r) {
                        const int key = 8 * j + accumulator_column(lane, r);
                        const int query = 16 * i + accumulator_row(lane, r);
                        const int offset = thread / kWarp * T::kPatchBytes + (key * T::kPatchStride + query) * 4;
                        machine.store(thread, offset, own.accumulator[i][pass * (kPass / 8) + j][r]);
                    }
                }
            }
        });
        machine.warp_barrier();
        machine.each_thread([&](int thread, Registers<T>& own) {
            sum_classes<T>(machine, args, thread, first_query, first_key, pass, own.sum);
        });
        machine.warp_barrier();
    }
}

template <class T, class Machine>
IOSR_BLOCK void linear_block(Machine& machine, const LinearArgs& args, int64_t block) {
    const int64_t query_tiles = (args.n_queries + T::kQueries - 1) / T::kQueries;
    const int64_t first_query = block % query_tiles * T::kQueries;
    const int64_t first_row = block / query_tiles * T::kTileKeys;
    // Each operand is summed by itself and added once, so a large term doesn't coarsen the sum of a small one. Without
    // an operand one round writes the start alone.
    for (int index = 0; index == 0 || index < args.n_operands; ++index) {
        const bool empty = args.n_operands == 0;
        const Operand operand = args.operands[index];
        if (!empty) {
            Matrices from = tile_of<T>(operand.queries, operand.rows, operand.query_bytes, operand.row_bytes,
                                       first_query, first_row, args.n_queries, args.n_classes);
            from.parts = args.row_parts;
            from.part_scale = args.part_scale;
            multiply_tile<T>(machine, from);
        }
        machine.each_thread([&](int thread, Registers<T>& own) {
            const int lane = thread % kWarp;
            const int64_t query0 = first_query + warp_first_query<T>(thread / kWarp);
            const int64_t row0 = first_row + warp_first_key<T>(thread / kWarp);
            IOSR_UNROLL
            for (int j = 0; j < 2 * kBlocksN; ++j) {
                const int64_t c = row0 + 8 * (j / 2) + accumulator_column(lane, j % 2);
                if (c >= args.n_classes) {
                    continue;
                }
                const bool cached =
                    index > 0 || (args.class_offsets != nullptr && args.class_offsets[c] < args.class_offsets[c + 1]);
                const float bias = index == 0 && args.bias != nullptr ? args.bias[c] : 0.0F;
                IOSR_UNROLL
                for (int i = 0; i < 2 * T::kMI; ++i) {
                    const int64_t query = query0 + 16 * (i / 2) + accumulator_row(lane, 2 * (i % 2));
                    if (query < args.n_queries) {
                        float* logit = args.logits + query * args.n_classes + c;
                        const float start = (cached ? *logit : 0.0F) + bias;
                        const float sum = own.accumulator[i / 2][j / 2][2 * (i % 2) + j % 2];
                        *logit = empty ? start : fmaf(operand.factor, sum, start);
                    }
                }
            }
        });
    }
}

// Adds the partial sums of the class that begins in one chunk and continues in the next, if there is one.
template <class Machine>
IOSR_BLOCK void merge_block(Machine& machine, const MergeArgs& args, int64_t block) {
    const int64_t query_tiles = (args.n_queries + kMergeThreads - 1) / kMergeThreads;
    const int64_t first = block / query_tiles;
    const int64_t first_query = block % query_tiles * kMergeThreads;
    const int64_t boundary = (first + 1) * kChunk;
    const int32_t cls = args.key_class[boundary];
    const int64_t begin = args.class_offsets[cls];
    if (begin >= boundary || begin < boundary - kChunk) {
        return;
    }
    const int64_t partials = (args.class_offsets[cls + 1] - 1) / kChunk - first + 1;
    // Few partials are added by one thread a query; many by kMergeSlices, for fewer queries at a time.
    const int slices = partials <= kMergeSlices ? 1 : kMergeSlices;
    const int queries = kMergeThreads / slices;
    for (int pass = 0; pass < slices; ++pass) {
        machine.each_thread([&](int thread, MergeRegisters& own) {
            const int64_t query = first_query + pass * queries + thread % queries;
            own.sum = 0.0F;
            if (query < args.n_queries) {
                for (int64_t i = thread / queries; i < partials; i += slices) {
                    own.sum += args.edges[partial_slot(first, i) * args.n_queries + query];
                }
            }
            machine.store(thread, thread * 4, own.sum);
        });
        machine.barrier();
        machine.each_thread([&](int thread, MergeRegisters&) {
            const int64_t query = first_query + pass * queries + thread;
            if (thread < queries && query < args.n_queries) {
                float total = 0.0F;
                for (int slice = 0; slice < slices; ++slice) {
                    total += machine.template load<float>(thread, (slice * queries + thread) * 4);
                }
                args.logits[query * args.n_classes + cls] = args.alpha * total;
            }
        });
        machine.barrier();
    }
}

}  // namespace iosr::cuda
