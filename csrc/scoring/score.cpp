// The driver of every scoring path: blocks of keys and queries, classes, threads.
//
// Many queries are packed once in panels of P, up to kBlockQueries of them per task. Keys are read in blocks of rows:
// one product, the exponential and the class sums on a (rows, P) tile, which stays in the first-level cache. Narrow
// keys are widened block by block, once for all panels. With few queries each block of keys is read once, at memory
// bandwidth, for all queries.
//
// Threads share the keys in chunks. A chunk writes the classes inside it directly to the logits. A class that crosses a
// border between chunks leaves partial sums; these are added in the order of the chunks, so that the result doesn't
// depend on the number of threads.
#include "scoring/score.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "scoring/buffers.h"
#include "scoring/classes.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr std::size_t kFewQueries = 6;        // multiplied without a panel on any path; see largest_few
constexpr std::size_t kBlockQueries = 256;    // queries per task
constexpr std::size_t kGroupQueries = 2048;   // queries packed at a time, fewer if they are long
constexpr std::size_t kGroupFloats = 3 << 20;  // 12 MB of a term's panels
constexpr std::size_t kBlockRows = 96;        // rows per block, fewer if they are long
constexpr std::size_t kBlockFloats = 49152;   // 192 KB of widened rows: in the second-level cache
constexpr std::size_t kMaxChunks = 256;
constexpr std::size_t kThreadWork = 1 << 18;  // multiply-adds that justify waking a thread
constexpr double kLog2E = 1.4426950408889634;

// The largest batch whose rows are multiplied without a panel, of which a smaller one would fill half or less. Narrow keys
// favour it more, because a panel's keys are first widened in memory.
std::size_t largest_few(const PlanView& plan, const Microkernels& kernels) {
    const bool narrow = plan.keys != nullptr && plan.key_type != ElementType::kFloat32;
    return std::max(kFewQueries, narrow ? 3 * kernels.panel / 4 : kernels.panel / 2);
}

std::size_t element_bytes(ElementType type) {
    return type == ElementType::kFloat32 ? 4 : type == ElementType::kInt8 ? 1 : 2;
}

class Scorer {
  public:
    Scorer(const PlanView& plan, const QueryView& queries, const Microkernels& kernels, std::size_t threads, float* logits)
        : plan_(plan), queries_(queries), kernels_(kernels), classes_(plan.class_offsets, plan.n_classes),
          logits_(logits), width_(plan.width) {
        n_keys_ = plan.keys == nullptr ? 0 : static_cast<std::size_t>(plan.class_offsets[plan.n_classes]);
        few_ = queries.n_queries <= largest_few(plan, kernels);
        panel_ = few_ ? queries.n_queries : kernels.panel;
        block_rows_ = std::clamp<std::size_t>(kBlockFloats / width_ / 6 * 6, 6, kBlockRows);
        chunk_rows_ = std::max(ceil_div(ceil_div(n_keys_, kMaxChunks), block_rows_), std::size_t{1}) * block_rows_;
        n_chunks_ = ceil_div(n_keys_, chunk_rows_);
        const std::size_t fit = std::max(kGroupFloats / width_ / kBlockQueries, std::size_t{1}) * kBlockQueries;
        group_ = std::min({queries.n_queries, kGroupQueries, fit});
        const std::size_t work = group_ * width_ * (n_keys_ + plan.n_classes);
        workers_ = std::clamp<std::size_t>(work / kThreadWork, 1, std::max<std::size_t>(threads, 1));
        const std::size_t padded = ceil_div(group_, panel_) * panel_;
        if (!few_) {
            // Terms that read the same array share its panels.
            plain_ = Panels(plan.text == nullptr ? nullptr : queries.plain, padded * width_, {});
            const bool moved = plan.query_transform != nullptr;
            const Panels* shared = moved ? nullptr : &plain_;
            query_ = Panels(plan.keys == nullptr ? nullptr : queries.query, padded * width_, {shared});
            shared = moved ? nullptr : &query_;
            feature_ = Panels(plan.linear == nullptr ? nullptr : queries.feature, padded * width_, {&plain_, shared});
        }
        edges_ = make_buffer<double>(2 * n_chunks_ * group_);
        few_queries_ = queries.query;
        if (few_ && plan.query_transform != nullptr) {
            moved_ = make_buffer<float>(queries.n_queries * width_);
            few_queries_ = moved_.get();
        }
        scratch_ = std::make_unique<Scratch[]>(workers_);
        for (std::size_t w = 0; w < workers_; ++w) {
            scratch_[w].dots = make_buffer<float>(block_rows_ * std::max(panel_, kernels.panel));
            scratch_[w].carry = make_buffer<double>(kBlockQueries + kMaxPanel);
            scratch_[w].segments = make_buffer<Segment>(block_rows_);
            if (!few_ && plan.query_transform != nullptr) {
                scratch_[w].panel = make_buffer<float>(panel_ * width_);
            }
            if (!few_ && plan.key_type != ElementType::kFloat32) {
                scratch_[w].rows = make_buffer<float>(block_rows_ * width_);
            }
        }
    }

    void run() {
        for (first_ = 0; first_ < queries_.n_queries; first_ += group_) {
            count_ = std::min(group_, queries_.n_queries - first_);
            const std::size_t blocks = few_ ? 1 : ceil_div(count_, kBlockQueries);
            const std::size_t row_blocks = ceil_div(plan_.n_classes, block_rows_);
            std::vector<Phase> phases;
            for (const Panels* panels : {&plain_, &query_, &feature_}) {
                if (panels->own != nullptr) {
                    phases.push_back({ceil_div(count_, panel_), [this, panels](std::size_t worker, std::size_t p) {
                                          pack_panel(scratch_[worker], *panels, p * panel_);
                                      }});
                }
            }
            if (moved_ != nullptr) {
                phases.push_back({ceil_div(width_, block_rows_), [this](std::size_t, std::size_t i) {
                                      const std::size_t r = i * block_rows_;
                                      kernels_.dot_rows(plan_.query_transform + r * width_, ElementType::kFloat32,
                                                        std::min(block_rows_, width_ - r), width_, queries_.query, count_,
                                                        moved_.get() + r, width_);
                                  }});
            }
            phases.push_back({blocks * row_blocks, [&](std::size_t worker, std::size_t i) {
                                  linear_block(scratch_[worker], i / row_blocks, i % row_blocks * block_rows_);
                              }});
            phases.push_back({blocks * n_chunks_, [&](std::size_t worker, std::size_t i) {
                                  cache_chunk(scratch_[worker], i / n_chunks_, i % n_chunks_);
                              }});
            run_phases(workers_, phases);
            if (n_keys_ > 0) {
                add_edges();
            }
        }
    }

  private:
    struct Scratch {
        Buffer<float> dots, rows, panel;
        Buffer<double> carry;
        Buffer<Segment> segments;
    };

    // Packs a panel. The product of the transform's rows with a panel is a panel again.
    void pack_panel(Scratch& scratch, const Panels& panels, std::size_t begin) const {
        const bool moved = &panels == &query_ && plan_.query_transform != nullptr;
        float* out = panels.data + begin * width_;
        panels.pack(first_ + begin, std::min(panel_, count_ - begin), width_, panel_, moved ? scratch.panel.get() : out);
        if (moved) {
            kernels_.dot_panel(plan_.query_transform, width_, width_, scratch.panel.get(), out);
        }
    }

    // The logit of the i-th query of the group.
    float* logits_of(std::size_t i) const { return logits_ + (first_ + i) * plan_.n_classes; }

    // logits = bias + tau * plain @ text' + feature @ linear' for the classes of one block of rows.
    void linear_block(Scratch& scratch, std::size_t block, std::size_t c0) const {
        const std::size_t n_rows = std::min(block_rows_, plan_.n_classes - c0);
        const std::size_t begin = block * kBlockQueries;
        const std::size_t end = std::min(count_, begin + kBlockQueries);
        for (std::size_t i = begin; i < end; ++i) {
            for (std::size_t r = 0; r < n_rows; ++r) {
                logits_of(i)[c0 + r] = plan_.bias == nullptr ? 0.0F : plan_.bias[c0 + r];
            }
        }
        if (plan_.text != nullptr) {
            add_rows(scratch, plan_.text + c0 * width_, n_rows, c0, plan_.tau, plain_, queries_.plain, begin, end);
        }
        if (plan_.linear != nullptr) {
            add_rows(scratch, plan_.linear + c0 * width_, n_rows, c0, 1.0F, feature_, queries_.feature, begin, end);
        }
    }

    void add_rows(Scratch& scratch, const float* rows, std::size_t n_rows, std::size_t c0, float factor,
                  const Panels& panels, const float* source, std::size_t begin, std::size_t end) const {
        float* dots = scratch.dots.get();
        if (few_) {
            kernels_.dot_rows(rows, ElementType::kFloat32, n_rows, width_, source, count_, dots, block_rows_);
        }
        for (std::size_t i = begin; i < end; i += panel_) {
            if (!few_) {
                kernels_.dot_panel(rows, n_rows, width_, panels.data + i * width_, dots);
            }
            const std::size_t lanes = std::min(panel_, end - i);
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                float* out = logits_of(i + lane) + c0;
                for (std::size_t r = 0; r < n_rows; ++r) {
                    out[r] += factor * (few_ ? dots[lane * block_rows_ + r] : dots[r * panel_ + lane]);
                }
            }
        }
    }

    const void* key_rows(std::size_t row) const {
        return static_cast<const char*>(plan_.keys) + row * width_ * element_bytes(plan_.key_type);
    }

    // The partial sum of a class that crosses a chunk's border: slot 0 if the class begins earlier, 1 if it begins
    // here.
    double* edge(std::size_t chunk, std::size_t slot) const { return edges_.get() + (2 * chunk + slot) * group_; }

    void cache_chunk(Scratch& scratch, std::size_t block, std::size_t chunk) const {
        const std::size_t first_query = block * kBlockQueries;
        const std::size_t end_query = std::min(count_, first_query + kBlockQueries);
        const std::size_t chunk_begin = chunk * chunk_rows_;
        const std::size_t chunk_end = std::min(n_keys_, chunk_begin + chunk_rows_);
        const float scale = static_cast<float>(plan_.beta * kLog2E);
        std::size_t c = classes_.of(chunk_begin);
        for (std::size_t begin = chunk_begin; begin < chunk_end; begin += block_rows_) {
            const std::size_t end = std::min(begin + block_rows_, chunk_end);
            const std::size_t n = classes_.cut(begin, end, chunk_begin, chunk_end, c, scratch.segments.get());
            const float* scales = plan_.key_scales == nullptr ? nullptr : plan_.key_scales + begin;
            const float* weights = plan_.weights == nullptr ? nullptr : plan_.weights + begin;
            float* dots = scratch.dots.get();
            if (few_) {
                kernels_.dot_rows(key_rows(begin), plan_.key_type, end - begin, width_, few_queries_, count_, dots,
                                  block_rows_);
                for (std::size_t i = 0; i < count_; ++i) {
                    kernels_.exp_run(dots + i * block_rows_, end - begin, scale, scales, weights);
                }
            }
            const float* rows = few_ ? nullptr : widened(scratch, begin, end);
            for (std::size_t i = first_query; i < end_query; i += panel_) {
                const std::size_t lanes = std::min(panel_, end_query - i);
                if (!few_) {
                    kernels_.dot_panel(rows, end - begin, width_, query_.data + i * width_, dots);
                }
                for (std::size_t s = 0; s < n; ++s) {
                    const Segment& segment = scratch.segments[s];
                    float sums[kMaxPanel];
                    if (few_) {
                        add_runs(dots, segment, sums);
                    } else {
                        kernels_.exp_tile(dots + segment.begin * panel_, segment.end - segment.begin, scale,
                                         scales == nullptr ? nullptr : scales + segment.begin,
                                         weights == nullptr ? nullptr : weights + segment.begin, sums);
                    }
                    finish(scratch, segment, chunk, chunk_begin, chunk_end, first_query, i, lanes, sums);
                }
            }
        }
    }

    const float* widened(Scratch& scratch, std::size_t begin, std::size_t end) const {
        if (plan_.key_type == ElementType::kFloat32) {
            return static_cast<const float*>(key_rows(begin));
        }
        kernels_.widen(key_rows(begin), plan_.key_type, (end - begin) * width_, scratch.rows.get());
        return scratch.rows.get();
    }

    void add_runs(const float* dots, const Segment& segment, float* sums) const {
        for (std::size_t i = 0; i < count_; ++i) {
            const float* run = dots + i * block_rows_;
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
    void finish(Scratch& scratch, const Segment& segment, std::size_t chunk, std::size_t chunk_begin,
                std::size_t chunk_end, std::size_t first_query, std::size_t i, std::size_t lanes,
                const float* sums) const {
        const bool early = classes_.begin(segment.c) < chunk_begin;
        const bool inside = !early && classes_.end(segment.c) <= chunk_end;
        double* carry = scratch.carry.get() + (i - first_query);
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            const double sum = segment.opens ? sums[lane] : carry[lane] + sums[lane];
            if (!segment.closes) {
                carry[lane] = sum;
            } else if (inside) {
                logits_of(i + lane)[segment.c] += static_cast<float>(plan_.alpha * sum);
            } else {
                edge(chunk, early ? 0 : 1)[i + lane] = sum;
            }
        }
    }

    // Adds the partial sums of classes that cross chunks, in the order of the chunks.
    void add_edges() const {
        double* total = edges_.get();  // slot 0 of the first chunk is free: no class begins before it
        std::size_t open = plan_.n_classes;
        const auto close = [&] {
            for (std::size_t i = 0; open < plan_.n_classes && i < count_; ++i) {
                logits_of(i)[open] += static_cast<float>(plan_.alpha * total[i]);
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
            const std::size_t end = std::min(n_keys_, begin + chunk_rows_);
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

    const PlanView& plan_;
    const QueryView& queries_;
    const Microkernels& kernels_;
    const Classes classes_;
    float* logits_;
    std::size_t width_, n_keys_, panel_, block_rows_, chunk_rows_, n_chunks_, group_, workers_;
    std::size_t first_ = 0;  // the group of queries being scored
    std::size_t count_ = 0;
    bool few_;
    Panels plain_, query_, feature_;
    Buffer<float> moved_;  // few queries, transformed
    const float* few_queries_;
    Buffer<double> edges_;
    std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace

void score(const PlanView& plan, const QueryView& queries, const Microkernels& kernels, std::size_t threads,
           float* logits) {
    if (queries.n_queries > 0) {
        Scorer(plan, queries, kernels, threads, logits).run();
    }
}

}  // namespace iosr
