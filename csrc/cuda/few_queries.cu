// One kernel. Blocks take tiles of keys: a warp computes the affinities of 4 keys at a time to all queries, which are
// in shared memory; then the block sums them by class, or with the keys' values. Sums that span tiles go to the
// workspace and are added in a fixed order after a barrier of the grid. No tensor cores: time goes by the bytes of keys
// and values, which are read once, 16 bytes a thread.
#include "few_queries.h"

#ifdef IOSR_FAST_HOST
#include "tests/host.h"
#else
#include <cooperative_groups.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

namespace iosr::cuda {

struct Call {
    const float* queries;
    float* logits;
    float* workspace;
    int n_queries;
    int stage;
};

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;           // keys that a warp takes at a time
constexpr int kTile = 64;          // keys of the largest tile
constexpr int kBlocks = 2;         // blocks on a multiprocessor: one loads while the other adds
constexpr int kShared = 99 << 10;  // bytes of shared memory that a block can have on every supported GPU

struct alignas(16) Four {
    float at[4];
};
struct alignas(16) Vector {
    uint32_t word[4];
};
struct alignas(8) FourHalves {
    uint16_t at[4];
};

__device__ float half(uint32_t bits) { return __half2float(__ushort_as_half(static_cast<uint16_t>(bits))); }

// Formats of keys: the channels in a vector of 16 bytes, and the i-th four of them.
struct Fp32 {
    static constexpr int kChannels = 4;
    static __device__ Four four(const Vector& v, int) {
        return {{__uint_as_float(v.word[0]), __uint_as_float(v.word[1]), __uint_as_float(v.word[2]),
                 __uint_as_float(v.word[3])}};
    }
};
struct Fp16 {
    static constexpr int kChannels = 8;
    static __device__ Four four(const Vector& v, int i) {
        const uint32_t low = v.word[2 * i], high = v.word[2 * i + 1];
        return {{half(low), half(low >> 16), half(high), half(high >> 16)}};
    }
};
struct Bf16 {
    static constexpr int kChannels = 8;
    static __device__ Four four(const Vector& v, int i) {
        const uint32_t low = v.word[2 * i], high = v.word[2 * i + 1];
        return {{__uint_as_float(low << 16), __uint_as_float(low & 0xFFFF0000U), __uint_as_float(high << 16),
                 __uint_as_float(high & 0xFFFF0000U)}};
    }
};
struct Int8 {
    static constexpr int kChannels = 16;
    // 0x4B000000 + n are the bits of 2**23 + n, which a permutation of bytes and a subtraction turn into n; GPUs convert
    // few numbers a cycle.
    template <int Byte>
    static __device__ float code(uint32_t raised) {
        return __uint_as_float(__byte_perm(raised, 0x4B000000U, 0x7440U + Byte)) - (8388608.0F + 128.0F);
    }
    static __device__ Four four(const Vector& v, int i) {
        const uint32_t raised = v.word[i] ^ 0x80808080U;  // codes + 128
        return {{code<0>(raised), code<1>(raised), code<2>(raised), code<3>(raised)}};
    }
};

__device__ Four load_four(const float* values) { return *reinterpret_cast<const Four*>(values); }
__device__ Four load_four(const uint16_t* values) {
    const FourHalves bits = *reinterpret_cast<const FourHalves*>(values);
    return {{half(bits.at[0]), half(bits.at[1]), half(bits.at[2]), half(bits.at[3])}};
}

__device__ void add_product(Four& sum, float factor, const Four& other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum.at[i] = fmaf(factor, other.at[i], sum.at[i]);
    }
}

// The sum over groups of 2 * `half` lanes, in each lane.
__device__ float sum_over_lanes(float sum, int half) {
    for (int offset = half; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xFFFFFFFFU, sum, offset);
    }
    return sum;
}

// The sums over a warp of M numbers a lane: lane l gets number l * M / 32, for M = 64 the next one too. Lanes exchange
// the halves that they don't keep, which takes M exchanges at most in place of 5 * M.
template <int Offset = 16, int M>
__device__ void sum_over_warp(float (&sums)[M], int lane) {
    constexpr int kLeft = M * Offset / 32;  // 0: one number is left, which all lanes of a group sum
    const bool upper = (lane & Offset) != 0;
#pragma unroll
    for (int i = 0; i < (kLeft > 0 ? kLeft : 1); ++i) {
        const float given = kLeft == 0 || upper ? sums[i] : sums[i + kLeft];
        const float kept = kLeft == 0 || !upper ? sums[i] : sums[i + kLeft];
        sums[i] = kept + __shfl_xor_sync(0xFFFFFFFFU, given, Offset);
    }
    if constexpr (Offset > 1) {
        sum_over_warp<Offset / 2>(sums, lane);
    }
}

// Copies the queries' channels that meet vectors `begin` to `begin + call.stage` of a row of keys, and zeros beyond, to
// staged[query][four of a vector][vector]: lanes with neighbouring vectors read neighbouring memory.
template <class Key, int Q>
__device__ void stage_queries(const Plan& plan, const Call& call, int begin, Four* staged) {
    const int channels = call.stage * Key::kChannels;
    for (int index = threadIdx.x; index < Q * channels; index += kThreads) {
        const int query = index / channels, channel = index % channels;
        const int vector = channel / Key::kChannels, four = channel % Key::kChannels / 4;
        const int source = begin * Key::kChannels + channel;
        const bool inside = query < call.n_queries && source < plan.width;
        staged[(query * (Key::kChannels / 4) + four) * call.stage + vector].at[channel % 4] =
            inside ? call.queries[int64_t{query} * plan.width + source] : 0.0F;
    }
}

// sums[r, b] += <queries[b], rows[r]> over a vector of channels of each row, whose place in `staged` is `query`.
template <class Key, int Q>
__device__ void add_products(const Call& call, const Vector (&rows)[kRows], const Four* query,
                             float (&sums)[kRows * Q]) {
    constexpr int kFours = Key::kChannels / 4;
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
        Four channels[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            channels[r] = Key::four(rows[r], i);
        }
#pragma unroll
        for (int b = 0; b < Q; ++b) {
            if (Q < 16 || b / 4 * 4 < call.n_queries) {
                const Four q = query[(b * kFours + i) * call.stage];
#pragma unroll
                for (int k = 0; k < 4 * kRows; ++k) {
                    float& sum = sums[k / 4 * Q + b];
                    sum = fmaf(q.at[k % 4], channels[k / 4].at[k % 4], sum);
                }
            }
        }
    }
}

// affinities[j, b] of `count` keys from `first` on, for Q queries.
template <class Key, int Q>
__device__ void compute_affinities(const Plan& plan, const Call& call, int64_t first, int count, Four* staged,
                                   float* affinities) {
    constexpr int kSteps = Q < 16 ? 2 : 1;  // vectors of a row that a lane loads before it multiplies
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int row = warp; row - warp < count; row += kWarps * kRows) {  // and each 8th row after it
        const Vector* keys = static_cast<const Vector*>(plan.keys) + (first + row) * plan.key_vectors;
        const int own = row + lane / 8 * kWarps;  // the key whose sums end in this lane
        const float key_scale = own < count && plan.key_scales != nullptr ? plan.key_scales[first + own] : 1.0F;
        const float weight = own < count && plan.weights != nullptr ? plan.weights[first + own] : 1.0F;
        float sums[kRows * Q] = {};
        for (int begin = 0; begin < plan.key_vectors; begin += call.stage) {
            if (call.stage < plan.key_vectors) {  // shared memory is too small for whole queries
                __syncthreads();
                stage_queries<Key, Q>(plan, call, begin, staged);
                __syncthreads();
            }
            const int end = row < count ? min(call.stage, plan.key_vectors - begin) : 0;
            for (int start = lane; start < end; start += 32 * kSteps) {
                Vector loaded[kSteps][kRows] = {};
#pragma unroll
                for (int i = 0; i < kSteps * kRows; ++i) {
                    const int vector = start + i / kRows * 32, r = i % kRows;
                    if (row + r * kWarps < count && vector < end) {
                        loaded[i / kRows][r] = keys[int64_t{r * kWarps} * plan.key_vectors + begin + vector];
                    }
                }
#pragma unroll
                for (int step = 0; step < kSteps; ++step) {
                    const int vector = start + step * 32;
                    if (vector - lane < end) {  // the same in the whole warp; lanes beyond the end have zeros
                        add_products<Key, Q>(call, loaded[step], staged + min(vector, end - 1), sums);
                    }
                }
            }
        }
        sum_over_warp(sums, lane);
#pragma unroll
        for (int i = 0; i < (Q == 16 ? 2 : 1); ++i) {
            if (own < count) {
                const float exponent = fmaf(plan.scale, key_scale * sums[i], -plan.scale);
                affinities[own * Q + lane % 8 * Q / 8 + i] = weight * exp2f(exponent);
            }
        }
    }
}

// Adds the classes whose keys are all in the tile to the logits, 8 lanes each. The sums of others go to the workspace,
// as [tile][0: the class began in an earlier tile, 1: it begins here and goes on][query].
template <int Q>
__device__ void add_classes(const Plan& plan, const Call& call, int tile, int first, int count,
                            const float* affinities) {
    const int first_class = plan.tile_classes[tile], member = threadIdx.x % 8;
    const int pairs = (plan.tile_classes[tile + 1] - first_class + 1) * call.n_queries;
    for (int start = 0; start < pairs; start += kThreads / 8) {
        const int pair = start + static_cast<int>(threadIdx.x) / 8;
        const int c = first_class + pair / call.n_queries, query = pair % call.n_queries;
        const int from = pair < pairs ? plan.class_offsets[c] : 0, to = pair < pairs ? plan.class_offsets[c + 1] : 0;
        const int begin = max(from, first), end = min(to, first + count);
        float sum = 0.0F;
        for (int key = begin + member; key < end; key += 8) {
            sum += affinities[(key - first) * Q + query];
        }
        sum = sum_over_lanes(sum, 4);
        if (member == 0 && begin < end) {
            if (begin == from && end == to) {
                call.logits[int64_t{query} * plan.n_classes + c] += plan.alpha * sum;
            } else {
                call.workspace[(2 * int64_t{tile} + (begin == from)) * call.n_queries + query] = sum;
            }
        }
    }
}

// Adds the classes of several tiles to the logits, a warp each.
__device__ void merge_classes(const Plan& plan, const Call& call, int warp, int warps, int lane) {
    for (int pair = warp; pair < plan.n_classes * call.n_queries; pair += warps) {
        const int c = pair / call.n_queries, query = pair % call.n_queries;
        const int from = plan.class_offsets[c], to = plan.class_offsets[c + 1];
        const int first = from / plan.tile_keys, last = (to - 1) / plan.tile_keys;
        if (from < to && first < last) {
            float sum = 0.0F;
#pragma unroll 4
            for (int tile = first + lane; tile <= last; tile += 32) {
                sum += call.workspace[(2 * int64_t{tile} + (tile == first)) * call.n_queries + query];
            }
            sum = sum_over_lanes(sum, 16);
            if (lane == 0) {
                call.logits[int64_t{query} * plan.n_classes + c] += plan.alpha * sum;
            }
        }
    }
}

// Adds affinities' @ values of a tile to the block's part of the workspace, (n_queries, value_stride), four classes a
// thread.
template <class Value, int Q>
__device__ void add_values(const Plan& plan, const Call& call, int64_t first, int count, const float* affinities,
                           Four* part, bool is_first_tile) {
    constexpr int kAhead = Q == 16 ? 4 : 8;  // rows that a thread loads before it multiplies
    const Value* values = static_cast<const Value*>(plan.values) + first * plan.value_stride;
    const int fours = plan.value_stride / 4;
    for (int four = threadIdx.x; four < fours; four += kThreads) {
        Four sums[Q] = {};
        for (int start = 0; start < count; start += kAhead) {
            Four rows[kAhead] = {};
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (start + i < count) {
                    rows[i] = load_four(values + int64_t{start + i} * plan.value_stride + 4 * four);
                }
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const float* factors = affinities + min(start + i, count - 1) * Q;
#pragma unroll
                for (int b = 0; b < Q; ++b) {
                    if (Q < 16 || b / 4 * 4 < call.n_queries) {
                        add_product(sums[b], factors[b], rows[i]);
                    }
                }
            }
        }
#pragma unroll
        for (int b = 0; b < Q; ++b) {
            if (b < call.n_queries) {
                Four& sum = part[b * fours + four];
                if (!is_first_tile) {
                    add_product(sums[b], 1.0F, sum);
                }
                sum = sums[b];
            }
        }
    }
}

// Adds the blocks' parts to the logits, four classes a warp.
__device__ void merge_values(const Plan& plan, const Call& call, int warp, int warps, int lane) {
    const int fours = plan.value_stride / 4, part = call.n_queries * fours;
    for (int item = warp; item < part; item += warps) {
        const Four* parts = reinterpret_cast<const Four*>(call.workspace) + item;
        Four sum = {};
#pragma unroll 4
        for (int block = lane; block < static_cast<int>(gridDim.x); block += 32) {
            add_product(sum, 1.0F, parts[int64_t{block} * part]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float total = sum_over_lanes(sum.at[i], 16);
            const int c = item % fours * 4 + i;
            if (lane == 0 && c < plan.n_classes) {
                call.logits[int64_t{item / fours} * plan.n_classes + c] += plan.alpha * total;
            }
        }
    }
}

// Q: the queries that the code is unrolled for, 1, 4 or 16.
template <class Key, int Q>
__global__ void __launch_bounds__(kThreads, kBlocks)
    few_queries(const __grid_constant__ Plan plan, const __grid_constant__ Call call) {
#ifdef IOSR_FAST_HOST
    Four* const shared = reinterpret_cast<Four*>(host::shared.data());
#else
    extern __shared__ Four shared[];
#endif
    float* affinities = reinterpret_cast<float*>(shared + Q * call.stage * (Key::kChannels / 4));
    const int block = blockIdx.x, blocks = gridDim.x, tiles = (plan.n_keys - 1) / plan.tile_keys + 1;
    Four* part = reinterpret_cast<Four*>(call.workspace) + int64_t{block} * call.n_queries * (plan.value_stride / 4);
    if (call.stage == plan.key_vectors) {
        stage_queries<Key, Q>(plan, call, 0, shared);
        __syncthreads();
    }
    // Of two buffers one is read while warps that are ahead fill the other; the barrier holds them there.
    for (int tile = block, turn = 0; tile < tiles; tile += blocks, ++turn) {
        float* tile_affinities = affinities + turn % 2 * kTile * Q;
        const int first = tile * plan.tile_keys, count = min(plan.tile_keys, plan.n_keys - first);
        compute_affinities<Key, Q>(plan, call, first, count, shared, tile_affinities);
        __syncthreads();
        if (plan.values == nullptr) {
            add_classes<Q>(plan, call, tile, first, count, tile_affinities);
        } else if (plan.half_values) {
            add_values<uint16_t, Q>(plan, call, first, count, tile_affinities, part, turn == 0);
        } else {
            add_values<float, Q>(plan, call, first, count, tile_affinities, part, turn == 0);
        }
    }
    cooperative_groups::this_grid().sync();
    const int warp = block * kWarps + threadIdx.x / 32, warps = blocks * kWarps, lane = threadIdx.x % 32;
    if (plan.values == nullptr) {
        merge_classes(plan, call, warp, warps, lane);
    } else {
        merge_values(plan, call, warp, warps, lane);
    }
}

struct Kernels {
    void (*of[3])(Plan, Call);
    int channels;
};
template <class Key>
Kernels kernels() {
    return {{few_queries<Key, 1>, few_queries<Key, 4>, few_queries<Key, 16>}, Key::kChannels};
}

void check(cudaError_t error, const std::string& what) {
    if (error != cudaSuccess) {
        throw std::runtime_error(what + ": " + cudaGetErrorString(error));
    }
}

int multiprocessors(int device) {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
          "CUDA device " + std::to_string(device));
    return count;
}

int64_t quotient(int64_t n, int64_t size) { return (n + size - 1) / size; }

}  // namespace

int tile_keys(int device, int64_t n_keys) {
    const int64_t blocks = int64_t{multiprocessors(device)} * kBlocks;
    return static_cast<int>(quotient(n_keys, blocks * quotient(n_keys, blocks * kTile)));
}

BoundPlan::BoundPlan(int device, Format format, const Plan& plan) : device_(device), plan_(plan) {
    check(cudaSetDevice(device), "CUDA device " + std::to_string(device));
    const Kernels formats[] = {kernels<Fp32>(), kernels<Fp16>(), kernels<Bf16>(), kernels<Int8>()};
    const Kernels& chosen = formats[static_cast<int>(format)];
    for (int i = 0; i < 3; ++i) {
        const int queries = 1 << 2 * i, buffers = 2 * kTile * queries * 4, vector = queries * chosen.channels * 4;
        Launch& launch = launches_[i];
        launch.kernel = chosen.of[i];
        launch.stage = std::min(plan.key_vectors, (kShared - buffers) / vector);
        launch.shared_bytes = launch.stage * vector + buffers;
        int resident = 0;
        // The limit belongs to the function, whose other plans may need more.
        check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
              "shared memory of few_queries");
        check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, launch.kernel, kThreads, launch.shared_bytes),
              "blocks of few_queries");
        const int64_t limit = int64_t{multiprocessors(device)} * std::min(resident, kBlocks);
        launch.blocks = static_cast<int>(std::min(limit, quotient(plan.n_keys, plan.tile_keys)));
    }
}

int64_t BoundPlan::workspace_size(int n_queries) const {
    return n_queries * (plan_.values == nullptr ? 2 * quotient(plan_.n_keys, plan_.tile_keys)
                                                : int64_t{launch_of(n_queries).blocks} * plan_.value_stride);
}

void BoundPlan::add_affinity_sums(const float* queries, int n_queries, float* logits, float* workspace,
                                  CUstream_st* stream) const {
    check(cudaSetDevice(device_), "CUDA device " + std::to_string(device_));
    const Launch& launch = launch_of(n_queries);
    Plan plan = plan_;
    Call call{queries, logits, workspace, n_queries, launch.stage};
    void* arguments[] = {&plan, &call};
    // Cooperative: the barrier of the grid needs all blocks to run at once.
    check(cudaLaunchCooperativeKernel(launch.kernel, dim3(launch.blocks), dim3(kThreads), arguments,
                                      launch.shared_bytes, stream),
          "launch of few_queries");
}

}  // namespace iosr::cuda
