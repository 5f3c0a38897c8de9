// The product of a tile: a pipeline of asynchronous copies, and the tensor cores or fused multiply-adds.
//
// This and block.h are written once for two machines: DeviceMachine (machine.cuh) runs them on a GPU, HostMachine
// (host_machine.h) thread by thread with emulated instructions. A machine offers
//   each_thread(f)     f(thread, registers) for the calling thread; for every thread of the block on the host
//   copy, commit, wait asynchronous 16-byte copies to shared memory, in groups
//   barrier, warp_barrier
//   load, store        shared memory, by byte offset
//   mma                one mma.m16n8k16 of a warp on the registers that f(registers) names
#pragma once

#include <cmath>

#include "plan.h"
#include "tile.h"

#ifdef __CUDACC__
#define IOSR_BLOCK __device__ __forceinline__
#else
#define IOSR_BLOCK inline
#endif

namespace iosr::cuda {

// Four halves of a row: the channels that an mma step wants below its middle, and those above.
struct alignas(8) Words {
    uint32_t low;
    uint32_t high;
};
struct alignas(16) Floats {
    float value[4];
};

// A thread's registers.
template <class T>
struct Registers {
    float accumulator[T::kMI][kBlocksN][4];
    float partial[T::kSplitKeys ? T::kMI : 1][T::kSplitKeys ? kBlocksN : 1][4];
    Words query[T::kMI][2];
    Words key;
    float sum;
};

struct MmaRegisters {
    float* accumulator;
    uint32_t a[4];
    uint32_t b[2];
};

// The rows of a tile. Offsets within a tile fit 32 bits (kMaxRowBytes guarantees it), which saves registers.
struct Matrices {
    const char* queries;
    const char* keys;
    int query_bytes;
    int key_bytes;
    int n_queries;
    int n_keys;
    int parts = 1;  // of each query, or with kSplitKeys of each key
    float part_scale = 1.0F;
};

template <class T>
IOSR_BLOCK Matrices tile_of(const void* queries, const void* keys, int64_t query_bytes, int64_t key_bytes,
                            int64_t first_query, int64_t first_key, int64_t n_queries, int64_t n_keys) {
    const int64_t queries_left = n_queries - first_query;
    const int64_t keys_left = n_keys - first_key;
    return {static_cast<const char*>(queries) + first_query * query_bytes,
            static_cast<const char*>(keys) + first_key * key_bytes,
            static_cast<int>(query_bytes),
            static_cast<int>(key_bytes),
            static_cast<int>(queries_left < T::kQueries ? queries_left : T::kQueries),
            static_cast<int>(keys_left < T::kTileKeys ? keys_left : T::kTileKeys)};
}

// Starts the copies of stage `step` of one matrix; a copy past the end of a row or of the matrix writes zeros.
template <class C, class Machine>
IOSR_BLOCK void start_copies(Machine& machine, int thread, const char* rows, int n_rows, int row_bytes, int begin,
                             int target) {
    IOSR_UNROLL
    for (int round = 0; round < C::kRounds; ++round) {
        const Copy copy = C::of(thread, round);
        const int byte = begin + copy.byte;
        const bool inside = copy.row < n_rows && byte < row_bytes;
        machine.copy(thread, target + copy.target, rows + (inside ? copy.row * row_bytes + byte : 0),
                     inside);
    }
}

template <class T, class Machine>
IOSR_BLOCK void start_stage(Machine& machine, const Matrices& from, int step, int part_steps) {
    using Row = typename T::Row;
    const int base = step % T::kStages * T::kStageBytes;
    // The side that isn't split is read again for every part.
    const int again = step - (step < part_steps ? 0 : step < 2 * part_steps ? part_steps : 2 * part_steps);
    const int query_step = T::kSplitKeys ? again : step;
    const int key_step = T::kSplitKeys ? step : again;
    machine.each_thread([&](int thread, Registers<T>&) {
        start_copies<QueryCopies<T>>(machine, thread, from.queries, from.n_queries, from.query_bytes,
                                     query_step * Row::kQueryBytes, base);
        start_copies<KeyCopies<T>>(machine, thread, from.keys, from.n_keys, from.key_bytes, key_step * Row::kKeyBytes,
                                   base + T::kKeyBase);
    });
    machine.commit();
}

template <class T, class Machine>
IOSR_BLOCK void multiply_mma(Machine& machine, int base) {
    // Not unrolled: the fragments of both steps would be loaded together and not fit the registers.
    IOSR_ROLLED
    for (int step = 0; step < 2; ++step) {
        machine.each_thread([&](int thread, Registers<T>& own) {
            const int lane = thread % kWarp;
            const int row = warp_first_query<T>(thread / kWarp) + group_of(lane);
            IOSR_UNROLL
            for (int i = 0; i < 2 * T::kMI; ++i) {
                const int offset = base + query_fragment<T>(row + 8 * i, step, quad_of(lane));
                own.query[i / 2][i % 2] = machine.template load<Words>(thread, offset);
            }
        });
        IOSR_UNROLL
        for (int j = 0; j < kBlocksN; ++j) {
            machine.each_thread([&](int thread, Registers<T>& own) {
                const int lane = thread % kWarp;
                const int row = warp_first_key<T>(thread / kWarp) + 8 * j + group_of(lane);
                const int offset = base + T::kKeyBase + key_fragment<T>(row, step, quad_of(lane));
                if constexpr (T::kKeys == Keys::kInt8) {
                    const auto bytes = machine.template load<uint32_t>(thread, offset);
                    own.key.low = machine.subtract_halves(biased_halves(bytes, 0), kInt8Bias);
                    own.key.high = machine.subtract_halves(biased_halves(bytes, 1), kInt8Bias);
                } else {
                    own.key = machine.template load<Words>(thread, offset);
                }
            });
            IOSR_UNROLL
            for (int i = 0; i < T::kMI; ++i) {
                machine.template mma<T::kKeys>([&](Registers<T>& own) {
                    const Words* q = own.query[i];
                    float* sums = T::kSplitKeys ? own.partial[T::kSplitKeys ? i : 0][T::kSplitKeys ? j : 0]
                                                : own.accumulator[i][j];
                    return MmaRegisters{sums,
                                        {q[0].low, q[1].low, q[0].high, q[1].high},
                                        {own.key.low, own.key.high}};
                });
            }
        }
    }
}

// The same accumulators by fused multiply-adds in float.
template <class T, class Machine>
IOSR_BLOCK void multiply_float(Machine& machine, int base) {
    machine.each_thread([&](int thread, Registers<T>& own) {
        const int lane = thread % kWarp;
        const int query = warp_first_query<T>(thread / kWarp) + accumulator_row(lane, 0);
        const int key = warp_first_key<T>(thread / kWarp) + accumulator_column(lane, 0);
        IOSR_UNROLL
        for (int part = 0; part < T::Row::kDepth / 4; ++part) {
            Floats q[T::kMI][2];
            IOSR_UNROLL
            for (int i = 0; i < 2 * T::kMI; ++i) {
                q[i / 2][i % 2] = machine.template load<Floats>(thread, base + float_offset(query + 8 * i, part));
            }
            IOSR_UNROLL
            for (int j = 0; j < 2 * kBlocksN; ++j) {
                const int offset = base + T::kKeyBase + float_offset(key + 8 * (j / 2) + j % 2, part);
                const Floats k = machine.template load<Floats>(thread, offset);
                IOSR_UNROLL
                for (int i = 0; i < 2 * T::kMI; ++i) {
                    float& accumulator = own.accumulator[i / 2][j / 2][2 * (i % 2) + j % 2];
                    IOSR_UNROLL
                    for (int d = 0; d < 4; ++d) {
                        accumulator = fmaf(q[i / 2][i % 2].value[d], k.value[d], accumulator);
                    }
                }
            }
        }
    });
}

// accumulator = queries @ keys' of the tile. The copies of kStages - 1 stages are always in flight. Each part of one
// side is multiplied by the other side once, in one pipeline.
template <class T, class Machine>
IOSR_BLOCK void multiply_tile(Machine& machine, const Matrices& from) {
    const int part_steps = T::kSplitKeys ? (from.query_bytes + T::Row::kQueryBytes - 1) / T::Row::kQueryBytes
                                         : (from.key_bytes + T::Row::kKeyBytes - 1) / T::Row::kKeyBytes;
    const int steps = T::kKeys == Keys::kFp32 ? part_steps : part_steps * from.parts;
    machine.each_thread([&](int, Registers<T>& own) {
        IOSR_UNROLL
        for (int i = 0; i < T::kMI * kBlocksN * 4; ++i) {
            own.accumulator[i / (kBlocksN * 4)][i / 4 % kBlocksN][i % 4] = 0.0F;
        }
    });
    for (int step = 0; step < T::kStages - 1; ++step) {
        if (step < steps) {
            start_stage<T>(machine, from, step, part_steps);
        } else {
            machine.commit();  // an empty group keeps the count that wait() relies on
        }
    }
    IOSR_ROLLED
    for (int step = 0; step < steps; ++step) {
        machine.template wait<T::kStages - 2>();
        machine.barrier();  // this step's copies are visible, and no thread reads the buffer that is filled next
        if (step + T::kStages - 1 < steps) {
            start_stage<T>(machine, from, step + T::kStages - 1, part_steps);
        } else {
            machine.commit();
        }
        if constexpr (T::kKeys == Keys::kFp32) {
            multiply_float<T>(machine, step % T::kStages * T::kStageBytes);
        } else {
            if (step == part_steps || step == 2 * part_steps) {
                machine.each_thread([&](int, Registers<T>& own) {
                    IOSR_UNROLL
                    for (int i = 0; i < T::kMI * kBlocksN * 4; ++i) {
                        own.accumulator[i / (kBlocksN * 4)][i / 4 % kBlocksN][i % 4] *= from.part_scale;
                    }
                });
            }
            if constexpr (T::kSplitKeys) {
                // The tensor cores truncate sums instead of rounding them. Over few channels that error is smaller than
                // the rounding of the float additions of these sums.
                machine.each_thread([&](int, Registers<T>& own) {
                    IOSR_UNROLL
                    for (int i = 0; i < T::kMI * kBlocksN * 4; ++i) {
                        own.partial[i / (kBlocksN * 4)][i / 4 % kBlocksN][i % 4] = 0.0F;
                    }
                });
            }
            multiply_mma<T>(machine, step % T::kStages * T::kStageBytes);
            if constexpr (T::kSplitKeys) {
                machine.each_thread([&](int, Registers<T>& own) {
                    IOSR_UNROLL
                    for (int i = 0; i < T::kMI * kBlocksN * 4; ++i) {
                        own.accumulator[i / (kBlocksN * 4)][i / 4 % kBlocksN][i % 4] +=
                            own.partial[i / (kBlocksN * 4)][i / 4 % kBlocksN][i % 4];
                    }
                });
            }
        }
    }
    machine.barrier();  // all copies are complete and read: the shared memory is free
}

}  // namespace iosr::cuda
