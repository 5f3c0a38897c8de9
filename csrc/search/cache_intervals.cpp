// Queries are packed in panels of P lanes, a few panels per task. Keys are read in blocks of rows: one product for all
// betas, whose (rows, P) tile stays in the first-level cache while exponentials and class sums are computed for every
// beta. Sums of a block are in float, as in scoring, those across blocks in double. After all keys, the (K, C, P) sums
// of a panel are its slopes, which are combined with every gamma. If the sums of all betas would take too much memory,
// groups of betas are processed one after another, each with its own products.
#include "search/cache_intervals.h"

#include <algorithm>
#include <memory>

#include "scoring/buffers.h"
#include "scoring/classes.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr std::size_t kSumBytes = 8 << 20;     // of a thread's sums
constexpr std::size_t kPanelFloats = 1 << 18;  // 1 MB of a thread's packed queries
constexpr std::size_t kMaxPanels = 16;         // per task: with more, reading keys costs little beside their products
constexpr std::size_t kBlockRows = 96;         // rows per block, fewer if they are long
constexpr std::size_t kBlockFloats = 49152;    // 192 KB of rows: in the second-level cache
constexpr std::size_t kThreadWork = 1 << 18;  // multiply-adds that justify waking a thread
constexpr double kLog2E = 1.4426950408889634;

static_assert(kMaxPanel % kLaneGroup == 0, "a panel is made of groups of lanes");

class CacheSearch {
  public:
    CacheSearch(const CacheView& cache, const Microkernels& kernels, std::size_t threads, const IntervalRows& out)
        : cache_(cache), kernels_(kernels), classes_(cache.class_offsets, cache.n_classes), out_(out),
          panel_(kernels.panel) {
        packer_.source = cache.query;
        n_keys_ = static_cast<std::size_t>(cache.class_offsets[cache.n_classes]);
        n_panels_ = ceil_div(cache.n_samples, panel_);
        block_rows_ = std::clamp<std::size_t>(kBlockFloats / cache.width / 6 * 6, 6, kBlockRows);
        const std::size_t per_sample =
            n_keys_ * (cache.width + 8 * cache.n_betas) + cache.n_classes * cache.n_betas * cache.n_gammas;
        const std::size_t workers = cache.n_samples * per_sample / kThreadWork;
        workers_ = std::clamp<std::size_t>(std::min(workers, n_panels_), 1, std::max<std::size_t>(threads, 1));
        const std::size_t setting_bytes = cache.n_classes * panel_ * sizeof(double);
        group_ = std::clamp<std::size_t>(kSumBytes / setting_bytes, 1, cache.n_betas);
        // Small tasks, so that threads end together. Lanes are independent: the number of panels changes no result.
        const std::size_t fit = std::min(kSumBytes / (group_ * setting_bytes), kPanelFloats / (cache.width * panel_));
        task_ = std::clamp<std::size_t>(std::min(fit, n_panels_ / (4 * workers_)), 1, kMaxPanels);
        scratch_ = std::make_unique<Scratch[]>(workers_);
        for (std::size_t w = 0; w < workers_; ++w) {
            scratch_[w].queries = make_buffer<float>(task_ * panel_ * cache.width);
            scratch_[w].dots = make_buffer<float>(block_rows_ * panel_);
            scratch_[w].segments = make_buffer<Segment>(block_rows_);
            scratch_[w].e = make_buffer<double>(cache.n_classes * panel_);
            // Classes without keys are never written and stay 0.
            const std::size_t n_sums = task_ * group_ * cache.n_classes * panel_;
            scratch_[w].sums = make_buffer<double>(n_sums);
            std::fill_n(scratch_[w].sums.get(), n_sums, 0.0);
        }
    }

    void run() {
        run_phases(workers_, {{ceil_div(n_panels_, task_), [this](std::size_t worker, std::size_t i) {
                                   search(scratch_[worker], i * task_, std::min(task_, n_panels_ - i * task_));
                               }}});
    }

  private:
    struct Scratch {
        Buffer<float> queries, dots;
        Buffer<Segment> segments;
        Buffer<double> e, sums;
    };

    // The samples of the p-th panel are [p * P, p * P + lanes(p)).
    std::size_t lanes(std::size_t p) const { return std::min(panel_, cache_.n_samples - p * panel_); }

    // A panel's sums at a beta of the group, (C, P).
    double* sums_of(const Scratch& scratch, std::size_t i, std::size_t k) const {
        return scratch.sums.get() + (i * group_ + k) * cache_.n_classes * panel_;
    }

    // Panels [first, first + n).
    void search(Scratch& scratch, std::size_t first, std::size_t n) const {
        for (std::size_t i = 0; i < n; ++i) {
            packer_.pack((first + i) * panel_, lanes(first + i), cache_.width, panel_,
                         scratch.queries.get() + i * panel_ * cache_.width);
        }
        for (std::size_t k = 0; k < cache_.n_betas; k += group_) {
            const std::size_t n_betas = std::min(group_, cache_.n_betas - k);
            std::size_t c = 0;
            for (std::size_t begin = 0; begin < n_keys_; begin += block_rows_) {
                const std::size_t end = std::min(begin + block_rows_, n_keys_);
                const std::size_t n_segments = classes_.cut(begin, end, 0, n_keys_, c, scratch.segments.get());
                for (std::size_t i = 0; i < n; ++i) {
                    kernels_.dot_panel(cache_.keys + begin * cache_.width, end - begin, cache_.width,
                                       scratch.queries.get() + i * panel_ * cache_.width, scratch.dots.get());
                    add_block(scratch, begin, n_segments, k, n_betas, i);
                }
            }
            for (std::size_t i = 0; i < n; ++i) {
                find(scratch, first + i, k, n_betas, i);
            }
        }
    }

    // Adds the block of keys from `begin`, whose dots are in scratch, to the sums of the task's panel i.
    void add_block(const Scratch& scratch, std::size_t begin, std::size_t n_segments, std::size_t first_beta,
                   std::size_t n_betas, std::size_t i) const {
        const float* dots = scratch.dots.get();
        for (std::size_t k = 0; k < n_betas; ++k) {
            const float scale = scale_of(first_beta + k);
            const float* weights =
                cache_.weights == nullptr ? nullptr : cache_.weights + (first_beta + k) * n_keys_ + begin;
            double* sums = sums_of(scratch, i, k);
            for (std::size_t s = 0; s < n_segments; ++s) {
                const Segment& segment = scratch.segments[s];
                const float* key_weights = weights == nullptr ? nullptr : weights + segment.begin;
                float block[kMaxPanel];
                const std::size_t n_rows = segment.end - segment.begin;
                kernels_.exp_sum(dots + segment.begin * panel_, n_rows, scale, nullptr, key_weights, block);
                double* sum = sums + segment.c * panel_;
                for (std::size_t lane = 0; lane < panel_; ++lane) {
                    sum[lane] = segment.opens ? block[lane] : sum[lane] + block[lane];
                }
            }
        }
    }

    float scale_of(std::size_t k) const { return static_cast<float>(static_cast<float>(cache_.betas[k]) * kLog2E); }

    // The intervals of panel p at the betas of the group and at every gamma.
    void find(const Scratch& scratch, std::size_t p, std::size_t first_beta, std::size_t n_betas, std::size_t i) const {
        const std::size_t v = p * panel_;
        for (std::size_t g = 0; g < cache_.n_gammas; ++g) {
            pack_differences(cache_.base, cache_.extra, cache_.gammas == nullptr ? 0.0 : cache_.gammas[g],
                             cache_.labels, v, lanes(p), cache_.n_classes, panel_, scratch.e.get());
            for (std::size_t k = 0; k < n_betas; ++k) {
                const std::size_t setting = (first_beta + k) * cache_.n_gammas + g;
                panel_intervals(scratch.e.get(), sums_of(scratch, i, k), panel_, cache_.n_classes, cache_.labels + v,
                                lanes(p), out_.from(setting * cache_.n_samples + v));
            }
        }
    }

    const CacheView& cache_;
    const Microkernels& kernels_;
    const Classes classes_;
    const IntervalRows out_;
    Panels packer_;
    std::size_t panel_, n_keys_, n_panels_, block_rows_, workers_, group_, task_;
    std::unique_ptr<Scratch[]> scratch_;
};

}  // namespace

void cache_intervals(const CacheView& cache, const Microkernels& kernels, std::size_t threads,
                     const IntervalRows& out) {
    if (cache.n_samples > 0) {
        CacheSearch(cache, kernels, threads, out).run();
    }
}

}  // namespace iosr
