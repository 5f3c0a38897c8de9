// The driver of the cache term: blocks of keys and queries, classes or values, threads.
//
// Many queries are packed once in panels of P, up to kBlockQueries of them per task. Keys are read in blocks of rows.
// One product and the exponential make a tile of (rows, P) affinities, which stays in the first-level cache; its rows
// are summed by class, or multiplied with the keys' values. Narrow keys and values are widened block by block, once for
// all panels. With few queries each block is read once, at memory bandwidth, for all queries: the tile is (B, rows).
//
// Threads share the keys in chunks. A chunk leaves partial sums of its classes, or with values of all classes; these
// are added in the order of the chunks. Chunks depend on shapes alone, so the number of threads changes no bit.
#include "scoring/affinity_sums.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "scoring/buffer.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr std::size_t kFewQueries = 6;         // multiplied without a panel on any path; see largest_few
constexpr std::size_t kBlockQueries = 256;     // queries per task
constexpr std::size_t kGroupQueries = 2048;    // queries packed at a time, fewer if they are long
constexpr std::size_t kGroupFloats = 3 << 20;  // 12 MB of panels
constexpr std::size_t kBlockRows = 96;         // rows per block, fewer if they are long
constexpr std::size_t kBlockFloats = 49152;    // 192 KB of widened rows: in the second-level cache
constexpr std::size_t kBlockSums = 1 << 20;    // 4 MB of a task's sums of values
constexpr std::size_t kGroupSums = 8 << 20;    // 32 MB of all tasks' sums
constexpr std::size_t kClassChunks = 256;      // at most
constexpr std::size_t kValueChunks = 64;       // at most
constexpr std::size_t kValueRows = 1536;       // times C / (D + C): rows that take 50 times as long as their sums
constexpr double kLog2E = 1.4426950408889634;

// The largest batch whose rows are multiplied without a panel, of which a smaller one would fill half or less. Narrow
// keys favour it more, because a panel's keys are first widened in memory.
std::size_t largest_few(const CacheTerm& term, const Microkernels& kernels) {
    const bool narrow = term.key_type != ElementType::kFloat32;
    return std::max(kFewQueries, narrow ? 3 * kernels.panel / 4 : kernels.panel / 2);
}

std::size_t element_bytes(ElementType type) {
    return type == ElementType::kFloat32 ? 4 : type == ElementType::kInt8 ? 1 : 2;
}

const char* row(const void* rows, ElementType type, std::size_t i) {
    return static_cast<const char*>(rows) + i * element_bytes(type);
}

class Driver {
  public:
    Driver(const CacheTerm& term, const float* queries, std::size_t n_queries, const Microkernels& kernels,
           std::size_t threads, float* logits)
        : term_(term), queries_(queries), n_queries_(n_queries), kernels_(kernels), logits_(logits), width_(term.width),
          n_classes_(term.n_classes), few_(n_queries <= largest_few(term, kernels)), valued_(term.values != nullptr),
          panel_(few_ ? n_queries : kernels.panel), block_queries_(few_ ? n_queries : kBlockQueries) {
        const auto whole_tiles = [](std::size_t rows) { return ceil_div(rows, kTileRows) * kTileRows; };
        const std::size_t rows = std::clamp(kBlockFloats / width_ / kTileRows * kTileRows, kTileRows, kBlockRows);
        std::size_t n_chunks = std::min(ceil_div(term.n_keys, rows), kClassChunks);
        columns_ = ceil_div(n_classes_, kWholeClasses) * kWholeClasses;
        if (valued_) {
            if (!few_) {
                block_queries_ = std::clamp(kBlockSums / columns_ / panel_ * panel_, panel_, kBlockQueries);
            }
            const std::size_t most = std::min({kValueChunks, kGroupSums / (block_queries_ * columns_),
                                               term.n_keys * (width_ + n_classes_) / (kValueRows * n_classes_),
                                               n_chunks});
            for (n_chunks = 1; n_chunks < most; n_chunks *= 2) {  // two, four or eight threads get the same number
            }
        }
        // Chunks of about the same size, and blocks of about the same size in each.
        chunk_rows_ = whole_tiles(ceil_div(term.n_keys, n_chunks));
        block_rows_ = whole_tiles(ceil_div(chunk_rows_, ceil_div(chunk_rows_, rows)));
        n_chunks_ = ceil_div(term.n_keys, chunk_rows_);
        stride_ = ceil_div(block_rows_, kVector) * kVector;
        step_ = valued_ ? columns_ : 1;
        slots_ = valued_ ? n_chunks_ * columns_ : n_chunks_ + n_classes_;
        const std::size_t fit = std::min({kGroupQueries, kGroupFloats / width_, kGroupSums / slots_});
        group_ = std::min(n_queries, std::max<std::size_t>(fit / block_queries_, 1) * block_queries_);
        const std::size_t padded = ceil_div(group_, panel_) * panel_;
        panels_ = make_buffer(few_ ? 0 : padded * width_);
        sums_ = make_buffer(padded * slots_);
        workers_ = useful_workers(group_ * term.n_keys * (width_ + (valued_ ? n_classes_ : 0)), threads);
        scratch_ = std::make_unique<Scratch[]>(workers_);
        for (std::size_t w = 0; w < workers_; ++w) {
            scratch_[w].tile = make_buffer(stride_ * panel_);
            scratch_[w].rows = make_buffer(few_ || term.key_type == ElementType::kFloat32 ? 0 : block_rows_ * width_);
            scratch_[w].values = make_buffer(valued_ ? block_rows_ * n_classes_ + kReadAhead : 0);
        }
    }

    void run() {
        for (first_ = 0; first_ < n_queries_; first_ += group_) {
            count_ = std::min(group_, n_queries_ - first_);
            const std::size_t n_panels = ceil_div(count_, panel_);
            std::vector<Phase> phases;
            if (!few_) {
                phases.push_back({n_panels, [this](std::size_t, std::size_t p) { pack(p * panel_); }});
            }
            phases.push_back({ceil_div(count_, block_queries_) * n_chunks_, [this](std::size_t worker, std::size_t i) {
                                  add_chunk(scratch_[worker], i / n_chunks_ * block_queries_, i % n_chunks_);
                              }});
            phases.push_back({n_panels, [this](std::size_t, std::size_t p) { add_sums(p * panel_); }});
            run_phases(workers_, std::move(phases));
        }
    }

  private:
    struct Scratch {
        Buffer tile, rows, values;
    };

    // Packs the group's queries from i on as a panel.
    void pack(std::size_t i) const {
        float* out = panels_.get() + i * width_;
        const float* from = queries_ + (first_ + i) * width_;
        const std::size_t n = std::min(panel_, count_ - i);
        for (std::size_t d = 0; d < width_; ++d, out += panel_) {
            for (std::size_t lane = 0; lane < panel_; ++lane) {
                out[lane] = lane < n ? from[lane * width_ + d] : 0.0F;
            }
        }
    }

    // A chunk's partial sums of class c for the panel from the group's i-th query on: (P,) each, one class after
    // another. Those of values for few queries are (B, columns_).
    float* sums_of(std::size_t i, std::size_t chunk, std::size_t c) const {
        return sums_.get() + i * slots_ + (chunk * step_ + c) * panel_;
    }

    std::size_t class_begin(std::size_t c) const { return static_cast<std::size_t>(term_.class_offsets[c]); }
    std::size_t class_end(std::size_t c) const { return static_cast<std::size_t>(term_.class_offsets[c + 1]); }

    void add_chunk(Scratch& scratch, std::size_t first_query, std::size_t chunk) const {
        const std::size_t end_query = std::min(count_, first_query + block_queries_);
        const std::size_t chunk_begin = chunk * chunk_rows_;
        const std::size_t chunk_end = std::min(term_.n_keys, chunk_begin + chunk_rows_);
        const float scale = static_cast<float>(term_.beta * kLog2E);
        std::size_t first_class = 0;
        for (std::size_t begin = chunk_begin; begin < chunk_end; begin += block_rows_) {
            const std::size_t n_rows = std::min(block_rows_, chunk_end - begin);
            const void* keys = row(term_.keys, term_.key_type, begin * width_);
            if (!few_ && term_.key_type != ElementType::kFloat32) {
                kernels_.widen(keys, term_.key_type, n_rows * width_, scratch.rows.get());
                keys = scratch.rows.get();
            }
            const void* values = nullptr;
            ElementType value_type = term_.value_type;
            if (valued_) {
                values = row(term_.values, value_type, begin * n_classes_);
                // The last block is copied, because more is read than it has.
                if ((!few_ && value_type != ElementType::kFloat32) ||
                    (term_.n_keys - begin - n_rows) * n_classes_ < kReadAhead) {
                    kernels_.widen(values, value_type, n_rows * n_classes_, scratch.values.get());
                    values = scratch.values.get();
                    value_type = ElementType::kFloat32;
                }
            } else {
                while (class_end(first_class) <= begin) {
                    ++first_class;
                }
            }
            const float* scales = term_.key_scales == nullptr ? nullptr : term_.key_scales + begin;
            const float* weights = term_.weights == nullptr ? nullptr : term_.weights + begin;
            float* tile = scratch.tile.get();
            // The next block is prefetched, a part of it with each panel.
            const std::size_t next_rows = std::min(block_rows_, chunk_end - begin - n_rows);
            const std::size_t n_panels = ceil_div(end_query - first_query, panel_);
            const std::size_t keys_share = next_rows * width_ * element_bytes(term_.key_type) / n_panels;
            const std::size_t values_share = next_rows * n_classes_ * element_bytes(term_.value_type) / n_panels;
            for (std::size_t i = first_query; i < end_query; i += panel_) {
                const std::size_t part = (i - first_query) / panel_;
                if (few_) {
                    kernels_.dot_rows(keys, term_.key_type, n_rows, width_, queries_, n_queries_, tile, stride_);
                    for (std::size_t b = 0; b < n_queries_; ++b) {
                        kernels_.exp_run(tile + b * stride_, n_rows, scale, scales, weights);
                    }
                } else {
                    const float* panel = panels_.get() + i * width_;
                    const char* next = row(term_.keys, term_.key_type, (begin + n_rows) * width_) + part * keys_share;
                    kernels_.dot_panel(static_cast<const float*>(keys), n_rows, width_, panel, tile, next, keys_share);
                    kernels_.exp_tile(tile, n_rows, scale, scales, weights);
                }
                float* sums = sums_of(i, chunk, 0);
                const bool add = begin > chunk_begin;
                if (!valued_) {
                    add_classes(tile, begin, begin + n_rows, chunk_begin, first_class, sums);
                } else if (few_) {
                    kernels_.sum_rows(values, value_type, n_rows, n_classes_, tile, n_queries_, stride_, sums,
                                      columns_, add);
                } else {
                    const char* next = row(term_.values, term_.value_type, (begin + n_rows) * n_classes_);
                    kernels_.sum_panel(static_cast<const float*>(values), n_rows, n_classes_, tile, sums, add,
                                       next + part * values_share, values_share);
                }
            }
        }
    }

    // Adds the affinities of keys [begin, end) to the sums of their classes, the first of which is c.
    void add_classes(const float* tile, std::size_t begin, std::size_t end, std::size_t chunk_begin, std::size_t c,
                     float* sums) const {
        for (std::size_t key = begin; key < end; ++c) {
            const std::size_t stop = std::min(class_end(c), end);
            if (stop == key) {
                continue;  // a class without keys
            }
            float* out = sums + c * panel_;
            if (key == std::max(class_begin(c), chunk_begin)) {
                std::fill_n(out, panel_, 0.0F);
            }
            few_ ? add_runs(tile, key - begin, stop - begin, out) : add_rows(tile, key - begin, stop - begin, out);
            key = stop;
        }
    }

    void add_rows(const float* tile, std::size_t begin, std::size_t end, float* out) const {
        float sums[kMaxPanel] = {};
        for (std::size_t r = begin; r < end; ++r) {
            for (std::size_t lane = 0; lane < panel_; ++lane) {
                sums[lane] += tile[r * panel_ + lane];
            }
        }
        for (std::size_t lane = 0; lane < panel_; ++lane) {
            out[lane] += sums[lane];
        }
    }

    void add_runs(const float* tile, std::size_t begin, std::size_t end, float* out) const {
        for (std::size_t b = 0; b < n_queries_; ++b, tile += stride_) {
            float parts[4] = {};  // independent chains of additions
            std::size_t r = begin;
            for (; r + 4 <= end; r += 4) {
                for (std::size_t k = 0; k < 4; ++k) {
                    parts[k] += tile[r + k];
                }
            }
            for (; r < end; ++r) {
                parts[0] += tile[r];
            }
            out[b] += (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
    }

    // Adds the partial sums of the panel from the group's i-th query on to the logits, a few classes at a time: sums
    // lie query by query, logits class by class.
    void add_sums(std::size_t i) const {
        constexpr std::size_t kClasses = 16;
        const std::size_t lanes = std::min(panel_, count_ - i);
        const std::size_t class_step = few_ && valued_ ? 1 : panel_;
        const std::size_t lane_step = few_ && valued_ ? columns_ : 1;
        for (std::size_t c0 = 0; c0 < n_classes_; c0 += kClasses) {
            const std::size_t n = std::min(kClasses, n_classes_ - c0);
            double totals[kClasses][kMaxPanel] = {};
            for (std::size_t c = c0; c < c0 + n; ++c) {
                std::size_t chunk = 0;
                std::size_t end = n_chunks_;
                if (!valued_) {  // those that have keys of the class
                    chunk = class_begin(c) / chunk_rows_;
                    end = class_begin(c) == class_end(c) ? chunk : ceil_div(class_end(c), chunk_rows_);
                }
                for (; chunk < end; ++chunk) {
                    const float* sums = sums_of(i, chunk, 0) + c * class_step;
                    for (std::size_t lane = 0; lane < lanes; ++lane) {
                        totals[c - c0][lane] += sums[lane * lane_step];
                    }
                }
            }
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                float* logits = logits_ + (first_ + i + lane) * n_classes_ + c0;
                for (std::size_t c = 0; c < n; ++c) {
                    logits[c] += static_cast<float>(term_.alpha * totals[c][lane]);
                }
            }
        }
    }

    const CacheTerm& term_;
    const float* queries_;
    const std::size_t n_queries_;
    const Microkernels& kernels_;
    float* logits_;
    const std::size_t width_, n_classes_;
    const bool few_, valued_;
    std::size_t panel_, block_queries_, block_rows_, stride_, chunk_rows_, n_chunks_, group_, workers_;
    std::size_t columns_, step_, slots_;  // of partial sums: C rounded up, from chunk to chunk, of all chunks
    std::size_t first_ = 0;               // the group of queries being scored
    std::size_t count_ = 0;
    Buffer panels_, sums_;
    std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace

void affinity_sums(const CacheTerm& term, const float* queries, std::size_t n_queries, const Microkernels& kernels,
                   std::size_t threads, float* logits) {
    if (n_queries > 0) {
        Driver(term, queries, n_queries, kernels, threads, logits).run();
    }
}

}  // namespace iosr
