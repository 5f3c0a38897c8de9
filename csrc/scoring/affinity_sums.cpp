// The driver of the cache term: blocks of keys and queries, classes or values, threads.
//
// Many queries are packed once in panels of P, up to kBlockQueries of them per task. Keys are read in blocks of rows: one
// product, the exponential and the sums by class, or a second product with the keys' values, on a (rows, P) tile, which
// stays in the first-level cache. Narrow keys are widened and values packed block by block, once for all panels. With few
// queries each block of keys and values is read once, at memory bandwidth, for all queries.
//
// Threads share the keys in chunks. With classes, a chunk writes the classes inside it directly to the logits; a class that
// crosses a border between chunks leaves partial sums. With values, each chunk leaves partial sums of all classes. Partial
// sums are added in the order of the chunks. Chunks depend on shapes alone, so the number of threads changes no bit.
#include "scoring/affinity_sums.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "scoring/buffers.h"
#include "scoring/classes.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr std::size_t kFewQueries = 6;         // multiplied without a panel on any path; see largest_few
constexpr std::size_t kBlockQueries = 256;     // queries per task
constexpr std::size_t kGroupQueries = 2048;    // queries packed at a time, fewer if they are long
constexpr std::size_t kGroupFloats = 3 << 20;  // 12 MB of panels
constexpr std::size_t kBlockRows = 96;         // rows per block, fewer if they are long
constexpr std::size_t kBlockFloats = 49152;    // 192 KB of widened rows: in the second-level cache
constexpr std::size_t kMaxChunks = 256;
constexpr std::size_t kValueChunks = 64;
constexpr std::size_t kBlockSums = 1 << 20;  // 4 MB of a task's sums
constexpr std::size_t kGroupSums = 8 << 20;  // 32 MB of all tasks' sums
constexpr std::size_t kReduceRows = 1536;    // rows of C values whose product takes 50 times as long as adding C partial sums
constexpr double kLog2E = 1.4426950408889634;

// The largest batch whose rows are multiplied without a panel, of which a smaller one would fill half or less. Narrow keys
// favour it more, because a panel's keys are first widened in memory.
std::size_t largest_few(const CacheTerm& term, const Microkernels& kernels) {
    const bool narrow = term.key_type != ElementType::kFloat32;
    return std::max(kFewQueries, narrow ? 3 * kernels.panel / 4 : kernels.panel / 2);
}

std::size_t element_bytes(ElementType type) {
    return type == ElementType::kFloat32 ? 4 : type == ElementType::kInt8 ? 1 : 2;
}

class Driver {
  public:
    Driver(const CacheTerm& term, const float* queries, std::size_t n_queries, const Microkernels& kernels,
           std::size_t threads, float* logits)
        : term_(term), queries_(queries), n_queries_(n_queries), kernels_(kernels),
          classes_(term.class_offsets, term.n_classes), logits_(logits), width_(term.width) {
        few_ = n_queries <= largest_few(term, kernels);
        panel_ = few_ ? n_queries : kernels.panel;
        std::size_t block_rows = std::clamp<std::size_t>(kBlockFloats / width_ / kTileRows * kTileRows, kTileRows, kBlockRows);
        block_queries_ = few_ ? n_queries : kBlockQueries;
        std::size_t n_chunks = std::min(ceil_div(term.n_keys, block_rows), kMaxChunks);
        std::size_t largest_group = kGroupQueries;
        if (term.values != nullptr) {
            columns_ = ceil_div(term.n_classes, kWholeClasses) * kWholeClasses;
            if (!few_) {
                block_queries_ = std::clamp(kBlockSums / columns_ / panel_ * panel_, panel_, kBlockQueries);
            }
            const std::size_t rows = std::max(kReduceRows * term.n_classes / (width_ + term.n_classes), block_rows);
            std::size_t most = std::min({kValueChunks, kGroupSums / (block_queries_ * columns_), ceil_div(term.n_keys, rows)});
            for (n_chunks = 1; n_chunks < most; n_chunks *= 2) {
            }
            largest_group = kGroupSums / (n_chunks * columns_);
        }
        // Chunks of about the same size, and blocks of about the same size in each.
        const auto whole_tiles = [](std::size_t rows) { return ceil_div(rows, kTileRows) * kTileRows; };
        chunk_rows_ = whole_tiles(ceil_div(term.n_keys, n_chunks));
        block_rows_ = whole_tiles(ceil_div(chunk_rows_, ceil_div(chunk_rows_, block_rows)));
        n_chunks_ = ceil_div(term.n_keys, chunk_rows_);
        const std::size_t fit = std::min({largest_group, kGroupQueries, kGroupFloats / width_});
        group_ = std::min(n_queries, std::max<std::size_t>(fit / block_queries_, 1) * block_queries_);
        padded_ = ceil_div(group_, panel_) * panel_;
        workers_ = useful_workers(group_ * term.n_keys * (width_ + (columns_ > 0 ? term.n_classes : 0)), threads);
        if (!few_) {
            panels_ = make_buffer<float>(padded_ * width_);
        }
        if (term.values != nullptr) {
            sums_ = make_buffer<float>(n_chunks_ * padded_ * columns_);
        } else {
            edges_ = make_buffer<double>(2 * n_chunks_ * group_);
        }
        scratch_ = std::make_unique<Scratch[]>(workers_);
        for (std::size_t w = 0; w < workers_; ++w) {
            Scratch& scratch = scratch_[w];
            scratch.tile = make_buffer<float>(block_rows_ * std::max(panel_, kernels.panel));
            scratch.carry = make_buffer<double>(kBlockQueries + kMaxPanel);
            scratch.segments = make_buffer<Segment>(block_rows_);
            if (!few_ && term.key_type != ElementType::kFloat32) {
                scratch.rows = make_buffer<float>(block_rows_ * width_);
            }
            if (term.values != nullptr) {
                scratch.values = make_buffer<float>(block_rows_ * term.n_classes + kReadAhead);
            }
        }
    }

    void run() {
        for (first_ = 0; first_ < n_queries_; first_ += group_) {
            count_ = std::min(group_, n_queries_ - first_);
            std::vector<Phase> phases;
            if (!few_) {
                phases.push_back({ceil_div(count_, panel_), [this](std::size_t, std::size_t p) { pack(p * panel_); }});
            }
            phases.push_back({ceil_div(count_, block_queries_) * n_chunks_, [this](std::size_t worker, std::size_t i) {
                                  add_chunk(scratch_[worker], i / n_chunks_ * block_queries_, i % n_chunks_);
                              }});
            if (term_.values != nullptr) {
                phases.push_back({ceil_div(count_, panel_), [this](std::size_t, std::size_t p) { add_sums(p * panel_); }});
            }
            run_phases(workers_, phases);
            if (term_.values == nullptr) {
                add_edges();
            }
        }
    }

  private:
    struct Scratch {
        Buffer<float> tile, rows, values;
        Buffer<double> carry;
        Buffer<Segment> segments;
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

    float* logits_of(std::size_t i) const { return logits_ + (first_ + i) * term_.n_classes; }

    // A chunk's sums of values for the panel of the group's i-th query: (columns_, P), or (B, columns_) with few queries.
    float* sums_of(std::size_t chunk, std::size_t i) const { return sums_.get() + (chunk * padded_ + i) * columns_; }

    // The partial sum of a class that crosses a chunk's border: slot 0 if the class begins earlier, 1 if it begins here.
    double* edge(std::size_t chunk, std::size_t slot) const { return edges_.get() + (2 * chunk + slot) * group_; }

    void add_chunk(Scratch& scratch, std::size_t first_query, std::size_t chunk) const {
        const std::size_t end_query = std::min(count_, first_query + block_queries_);
        const std::size_t chunk_begin = chunk * chunk_rows_;
        const std::size_t chunk_end = std::min(term_.n_keys, chunk_begin + chunk_rows_);
        const float scale = static_cast<float>(term_.beta * kLog2E);
        float* tile = scratch.tile.get();
        std::size_t c = columns_ > 0 ? 0 : classes_.of(chunk_begin);
        if (few_ && columns_ > 0) {
            std::fill_n(sums_of(chunk, 0), n_queries_ * columns_, 0.0F);
        }
        for (std::size_t begin = chunk_begin; begin < chunk_end; begin += block_rows_) {
            const std::size_t n_rows = std::min(block_rows_, chunk_end - begin);
            const void* keys = static_cast<const char*>(term_.keys) + begin * width_ * element_bytes(term_.key_type);
            const float* scales = term_.key_scales == nullptr ? nullptr : term_.key_scales + begin;
            const float* weights = term_.weights == nullptr ? nullptr : term_.weights + begin;
            const float* rows = static_cast<const float*>(keys);
            if (few_) {
                kernels_.dot_rows(keys, term_.key_type, n_rows, width_, queries_, n_queries_, tile, block_rows_);
                for (std::size_t i = 0; i < n_queries_; ++i) {
                    kernels_.exp_run(tile + i * block_rows_, n_rows, scale, scales, weights);
                }
            } else if (term_.key_type != ElementType::kFloat32) {
                kernels_.widen(keys, term_.key_type, n_rows * width_, scratch.rows.get());
                rows = scratch.rows.get();
            }
            if (columns_ > 0) {
                add_values(scratch, chunk, begin, n_rows, first_query, end_query, rows, scale, scales, weights);
                continue;
            }
            const std::size_t n_segments = classes_.cut(begin, begin + n_rows, chunk_begin, chunk_end, c, scratch.segments.get());
            for (std::size_t i = first_query; i < end_query; i += panel_) {
                float sums[kMaxPanel];
                if (!few_) {
                    kernels_.dot_panel(rows, n_rows, width_, panels_.get() + i * width_, tile);
                }
                for (std::size_t s = 0; s < n_segments; ++s) {
                    const Segment& segment = scratch.segments[s];
                    if (few_) {
                        add_runs(tile, segment, sums);
                    } else {
                        kernels_.exp_tile(tile + segment.begin * panel_, segment.end - segment.begin, scale,
                                          scales == nullptr ? nullptr : scales + segment.begin,
                                          weights == nullptr ? nullptr : weights + segment.begin, sums);
                    }
                    finish(scratch, segment, chunk, first_query, i, std::min(panel_, end_query - i), sums);
                }
            }
        }
    }

    void add_values(Scratch& scratch, std::size_t chunk, std::size_t begin, std::size_t n_rows, std::size_t first_query,
                    std::size_t end_query, const float* rows, float scale, const float* scales, const float* weights) const {
        const std::size_t n_classes = term_.n_classes;
        const void* values = static_cast<const char*>(term_.values) + begin * n_classes * element_bytes(term_.value_type);
        ElementType type = term_.value_type;
        // The last block is copied, because more is read than it has.
        if ((!few_ && type != ElementType::kFloat32) || (term_.n_keys - begin - n_rows) * n_classes < kReadAhead) {
            kernels_.widen(values, type, n_rows * n_classes, scratch.values.get());
            values = scratch.values.get();
            type = ElementType::kFloat32;
        }
        float* tile = scratch.tile.get();
        if (few_) {
            kernels_.sum_rows(values, type, n_rows, n_classes, tile, n_queries_, block_rows_, sums_of(chunk, 0), columns_);
            return;
        }
        for (std::size_t i = first_query; i < end_query; i += panel_) {
            float sums[kMaxPanel];
            kernels_.dot_panel(rows, n_rows, width_, panels_.get() + i * width_, tile);
            kernels_.exp_tile(tile, n_rows, scale, scales, weights, sums);
            kernels_.sum_panel(static_cast<const float*>(values), n_rows, n_classes, tile, sums_of(chunk, i),
                               begin > chunk * chunk_rows_);
        }
    }

    void add_runs(const float* tile, const Segment& segment, float* sums) const {
        for (std::size_t i = 0; i < count_; ++i) {
            const float* run = tile + i * block_rows_;
            float parts[4] = {};  // independent chains of additions
            std::size_t r = segment.begin;
            for (; r + 4 <= segment.end; r += 4) {
                for (std::size_t k = 0; k < 4; ++k) {
                    parts[k] += run[r + k];
                }
            }
            for (; r < segment.end; ++r) {
                parts[0] += run[r];
            }
            sums[i] = (parts[0] + parts[1]) + (parts[2] + parts[3]);
        }
    }

    // Adds a block's sums to those of the class, and writes them when the class (or its part in this chunk) ends.
    void finish(Scratch& scratch, const Segment& segment, std::size_t chunk, std::size_t first_query, std::size_t i,
                std::size_t lanes, const float* sums) const {
        const bool early = classes_.begin(segment.c) < chunk * chunk_rows_;
        const bool inside = !early && classes_.end(segment.c) <= (chunk + 1) * chunk_rows_;
        double* carry = scratch.carry.get() + (i - first_query);
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            const double sum = segment.opens ? sums[lane] : carry[lane] + sums[lane];
            if (!segment.closes) {
                carry[lane] = sum;
            } else if (inside) {
                logits_of(i + lane)[segment.c] += static_cast<float>(term_.alpha * sum);
            } else {
                edge(chunk, early ? 0 : 1)[i + lane] = sum;
            }
        }
    }

    // Adds the partial sums of classes that cross chunks, in the order of the chunks.
    void add_edges() const {
        double* total = edges_.get();  // slot 0 of the first chunk is free: no class begins before it
        std::size_t open = term_.n_classes;
        const auto close = [&] {
            for (std::size_t i = 0; open < term_.n_classes && i < count_; ++i) {
                logits_of(i)[open] += static_cast<float>(term_.alpha * total[i]);
            }
        };
        const auto take = [&](std::size_t c, const double* sums) {
            if (c != open) {
                close();
                open = c;
                std::fill_n(total, count_, 0.0);
            }
            for (std::size_t i = 0; i < count_; ++i) {
                total[i] += sums[i];
            }
        };
        for (std::size_t chunk = 0; chunk < n_chunks_; ++chunk) {
            const std::size_t begin = chunk * chunk_rows_;
            const std::size_t end = std::min(term_.n_keys, begin + chunk_rows_);
            const std::size_t first = classes_.of(begin);
            const std::size_t last = classes_.of(end - 1);
            if (classes_.begin(first) < begin) {
                take(first, edge(chunk, 0));
            }
            if (classes_.begin(last) >= begin && classes_.end(last) > end) {
                take(last, edge(chunk, 1));
            }
        }
        close();
    }

    // Adds the sums of values for the panel from the group's i-th query on, in the order of the chunks: some classes at a
    // time, whose sums lie side by side for a panel, and for each of few queries.
    void add_sums(std::size_t i) const {
        constexpr std::size_t kStep = 16;  // classes
        const std::size_t lanes = std::min(panel_, count_ - i);
        for (std::size_t c0 = 0; c0 < term_.n_classes; c0 += kStep) {
            const std::size_t n = std::min(kStep, term_.n_classes - c0);
            const std::size_t length = few_ ? n : n * panel_;
            for (std::size_t run = 0; run < (few_ ? lanes : 1); ++run) {
                float total[kStep * kMaxPanel] = {};
                for (std::size_t chunk = 0; chunk < n_chunks_; ++chunk) {
                    const float* sums = sums_of(chunk, i) + (few_ ? run * columns_ + c0 : c0 * panel_);
                    for (std::size_t k = 0; k < length; ++k) {
                        total[k] += sums[k];
                    }
                }
                for (std::size_t lane = few_ ? run : 0; lane < (few_ ? run + 1 : lanes); ++lane) {
                    float* logits = logits_of(i + lane) + c0;
                    for (std::size_t k = 0; k < n; ++k) {
                        logits[k] += term_.alpha * total[few_ ? k : k * panel_ + lane];
                    }
                }
            }
        }
    }

    const CacheTerm& term_;
    const float* queries_;
    const std::size_t n_queries_;
    const Microkernels& kernels_;
    const Classes classes_;
    float* logits_;
    std::size_t width_, panel_, block_rows_, block_queries_, chunk_rows_, n_chunks_, group_, padded_, workers_;
    std::size_t columns_ = 0;  // of partial sums of values; 0 with classes
    std::size_t first_ = 0;    // the group of queries being scored
    std::size_t count_ = 0;
    bool few_;
    Buffer<float> panels_, sums_;
    Buffer<double> edges_;
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
