// The arithmetic of a tile without CUDA: the elements of a thread, the position of a row in shared memory, the
// destination of a class sum. It compiles as plain C++, so that host_test.cpp executes the same functions as the
// kernels.
//
// A block scores a tile of queries and a tile of keys; a warp has kMI * 16 queries and one *chunk* of kChunk keys.
// A class within a chunk is summed there and stored once. At most one class enters a chunk from an earlier one and at
// most one continues in the next, so two edge slots per chunk and query hold the sums that remain to be merged.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define IOSR_HD __host__ __device__ __forceinline__
#define IOSR_UNROLL _Pragma("unroll")
#define IOSR_ROLLED _Pragma("unroll 1")
#else
#define IOSR_HD inline
#define IOSR_UNROLL
#define IOSR_ROLLED
#endif

namespace iosr::cuda {

constexpr int kWarp = 32;
constexpr int kChunk = 64;  // keys of a warp, the unit of class bookkeeping
constexpr int kCopy = 16;   // bytes of one asynchronous copy; every row's length is a multiple of it
constexpr int kPass = 32;   // keys of a chunk in shared memory at a time while classes are summed
constexpr int kBlocksN = kChunk / 8;

enum class Keys { kFp32, kFp16, kBf16, kInt8 };

// One stage of the pipeline holds kDepth channels of each row. Lanes read rows of floats at one channel each, so the
// distance of these rows is 16 bytes more than their length. Half and int8 rows are swizzled instead:
// row_offset exchanges the halves of the rows in every second 128 bytes, so that the lanes of one load (four rows at a
// time with 8 bytes a lane, eight with 4) read each bank once.
template <Keys K>
struct Stage {
    static constexpr int kDepth = K == Keys::kFp32 ? 16 : 32;
    static constexpr int kQueryBytes = 64;
    static constexpr int kKeyBytes = K == Keys::kInt8 ? 32 : 64;
    static constexpr int kPadding = K == Keys::kFp32 ? kCopy : 0;
    static constexpr int kQueryStride = kQueryBytes + kPadding;
    static constexpr int kKeyStride = kKeyBytes + kPadding;
};

// The offset of byte `byte` of a row with RowBytes bytes in the stage, from the beginning of its matrix.
template <Keys K, int RowBytes>
IOSR_HD constexpr int row_offset(int row, int byte) {
    if (K == Keys::kFp32) {
        return row * (RowBytes + kCopy) + byte;
    }
    return row * RowBytes + (byte ^ (row * RowBytes / 128 % 2 * (RowBytes / 2)));
}

// A key in a thread's table: affinity = weight * exp2(multiplier * dot - scale).
struct KeyEntry {
    float multiplier;
    float weight;
    int32_t cls;  // -1 for no key
};

template <Keys K, int WarpsM, int WarpsN, int MI, int Stages, bool SplitKeys = false>
struct Tile {
    static constexpr Keys kKeys = K;
    static constexpr bool kSplitKeys = SplitKeys;  // keys, not queries, come in parts; each stage is summed by itself
    using Row = Stage<K>;
    static constexpr int kWarpsN = WarpsN;
    static constexpr int kMI = MI;  // blocks of 16 queries in a warp
    static constexpr int kStages = Stages;
    static constexpr int kWarpQueries = MI * 16;
    static constexpr int kQueries = WarpsM * kWarpQueries;
    static constexpr int kTileKeys = WarpsN * kChunk;
    static constexpr int kThreads = WarpsM * WarpsN * kWarp;
    static constexpr int kMinBlocks = MI == 2 ? 2 : 1;  // per multiprocessor; the compiler fits registers to it
    static constexpr int kKeyBase = kQueries * Row::kQueryStride;
    static constexpr int kStageBytes = kKeyBase + kTileKeys * Row::kKeyStride;
    // A patch is a warp's [key][query] matrix of dot products. Two rows are 8 banks apart (modulo 32), which spreads
    // the 4 x 8 elements that a warp stores at a time over all banks.
    static constexpr int kPatchStride = kWarpQueries + 4;
    static constexpr int kPatchBytes = kPass * kPatchStride * 4;
    // The key table has one entry before the tile's first key and one after its last.
    static constexpr int kTableEntries = kTileKeys + 2;
    static constexpr int kTableBase = WarpsM * WarpsN * kPatchBytes;
    static constexpr int kEpilogueBytes = kTableBase + kTableEntries * static_cast<int>(sizeof(KeyEntry));
    static constexpr int kPipelineBytes = Stages * kStageBytes;
    static constexpr int kSharedBytes = kPipelineBytes > kEpilogueBytes ? kPipelineBytes : kEpilogueBytes;
    static_assert((2 * kPatchStride) % 32 == 8, "the stores to a patch would collide in a bank");
    static_assert(kSharedBytes <= 48 * 1024, "more shared memory than a kernel may declare statically");
};

// Two blocks of the large tiles fit a multiprocessor with 100 KB of shared memory and 64 K registers. The float tile
// has half the threads, since its loop wants more registers than 128.
template <Keys K>
using LargeTile = Tile<K, K == Keys::kFp32 ? 2 : 4, 2, 2, K == Keys::kInt8 ? 4 : 3>;
// Few queries: one warp per block, so that even a small cache occupies every multiprocessor, and a deep pipeline,
// because waiting for keys takes most of the time.
template <Keys K>
using SmallTile = Tile<K, 1, 1, 1, K == Keys::kFp32 ? 5 : 6>;
// The linear terms have as many rows as classes, far fewer than keys, so a smaller tile gives more blocks. Rows are
// float32. For half queries they are the sum of two fp16 matrices, on the tensor cores.
template <Keys K>
using LinearTile = Tile<K, 4, 1, 1, K == Keys::kFp32 ? 3 : 4, K != Keys::kFp32>;
template <Keys K>
using LinearSmallTile = Tile<K, 1, 1, 1, K == Keys::kFp32 ? 5 : 6, K != Keys::kFp32>;

// ---- fragments of mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16"), lane = 4 * group + quad ----

IOSR_HD constexpr int group_of(int lane) { return lane >> 2; }
IOSR_HD constexpr int quad_of(int lane) { return lane & 3; }

// Accumulator element r of a lane: row (query) and column (key) within the 16 x 8 block.
IOSR_HD constexpr int accumulator_row(int lane, int r) { return group_of(lane) + 8 * (r >> 1); }
IOSR_HD constexpr int accumulator_column(int lane, int r) { return 2 * quad_of(lane) + (r & 1); }

// A dot product doesn't depend on the order of its channels, so in step s of the two in a stage, lane `quad` takes the
// four consecutive channels from 16 * s + 4 * quad on. The first two take the place of the instruction's channels
// 2 * quad and 2 * quad + 1, the others of 2 * quad + 8 and 2 * quad + 9, for queries and keys alike. So a plain 8-byte
// load (4 bytes of int8) fills both words of a row's fragment.
template <class T>
IOSR_HD constexpr int query_fragment(int row, int step, int quad) {
    return row_offset<T::kKeys, T::Row::kQueryBytes>(row, 32 * step + 8 * quad);
}
template <class T>
IOSR_HD constexpr int key_fragment(int row, int step, int quad) {
    constexpr int kBytes = T::Row::kKeyBytes;
    return row_offset<T::kKeys, kBytes>(row, kBytes / 2 * step + kBytes / 8 * quad);
}
// Four floats of a row, channels [4 * part, 4 * part + 4).
IOSR_HD constexpr int float_offset(int row, int part) { return row_offset<Keys::kFp32, 64>(row, 16 * part); }

template <class T>
IOSR_HD constexpr int warp_first_query(int warp) {
    return (warp / T::kWarpsN) * T::kWarpQueries;
}
template <class T>
IOSR_HD constexpr int warp_first_key(int warp) {
    return (warp % T::kWarpsN) * kChunk;
}

// ---- copies ----

// A stage of one matrix is copied in rounds; in each, the block's threads take consecutive 16-byte pieces.
struct Copy {
    int row;     // of the tile
    int byte;    // of the stage's part of that row
    int target;  // from the beginning of the matrix in the stage
};

template <class T, int RowBytes, int Rows>
struct Copies {
    static constexpr int kPerRow = RowBytes / kCopy;
    static constexpr int kRounds = Rows * kPerRow / T::kThreads;
    static_assert(kRounds * T::kThreads == Rows * kPerRow && T::kThreads % kPerRow == 0, "threads without a copy");

    IOSR_HD static constexpr Copy of(int thread, int round) {
        const int row = thread / kPerRow + round * (T::kThreads / kPerRow);
        const int byte = thread % kPerRow * kCopy;
        return {row, byte, row_offset<T::kKeys, RowBytes>(row, byte)};
    }
};

template <class T>
using QueryCopies = Copies<T, T::Row::kQueryBytes, T::kQueries>;
template <class T>
using KeyCopies = Copies<T, T::Row::kKeyBytes, T::kTileKeys>;

// ---- classes ----

// The destination of a class's sum over one chunk.
enum class Destination { kLogits, kHeadEdge, kTailEdge };

// `before` and `after` are the classes of the keys on either side of the chunk, -1 for none. Keys are sorted by class,
// so a class extends beyond the chunk exactly if it is one of them.
IOSR_HD constexpr Destination destination_of(int32_t cls, int32_t before, int32_t after) {
    return cls == before ? Destination::kHeadEdge : cls == after ? Destination::kTailEdge : Destination::kLogits;
}

// Edge partials form a matrix (2 * chunks, queries): a chunk's head edge, then its tail edge.
IOSR_HD constexpr int64_t edge_slot(int64_t chunk, Destination destination) {
    return 2 * chunk + (destination == Destination::kTailEdge ? 1 : 0);
}

// Slot of partial i of a class that begins in chunk `first`: the tail edge of its first chunk and the head edge of
// every other one (also of those that it spans entirely).
IOSR_HD constexpr int64_t partial_slot(int64_t first, int64_t i) {
    return edge_slot(first + i, i == 0 ? Destination::kTailEdge : Destination::kHeadEdge);
}

constexpr int kMergeThreads = 256;
constexpr int kMergeSlices = 8;  // slice s adds partials s, s + 8, ... of a class; the slices are then added in order

// ---- int8 ----

// Bytes of `low` (0 to 3) and `high` (4 to 7) picked by the nibbles of `selector`, the lowest first: PTX prmt.
IOSR_HD uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
#ifdef __CUDA_ARCH__
    return __byte_perm(low, high, selector);
#else
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        out |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
    }
    return out;
#endif
}

// Two of four int8 (pair 0: the lower two) as two fp16 that are too large by kInt8Bias: 0x6400 is 1024, where one unit
// in the last place is 1, so flipping the sign bit and setting the high byte to 0x64 gives 1024 + 128 + value exactly.
constexpr uint32_t kInt8Bias = 0x64806480;
IOSR_HD uint32_t biased_halves(uint32_t bytes, int pair) {
    return permute_bytes(bytes ^ 0x80808080U, 0x64646464U, pair == 0 ? 0x4140U : 0x4342U);
}

}  // namespace iosr::cuda
