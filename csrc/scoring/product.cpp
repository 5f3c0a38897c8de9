#include "scoring/product.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "scoring/buffer.h"
#include "scoring/threads.h"

namespace iosr {
namespace {

constexpr std::size_t kBlockQueries = 48;  // rows of the left matrix per task
constexpr std::size_t kBlockRows = 96;     // rows of the right matrix per task

}  // namespace

// Every batch goes through dot_rows, whose sums are those of one row and one query, so that a batch of one gives the
// bits of a larger one. Panels are faster by about a third, and these products are a small part of scoring.
void add_product(const float* rows, std::size_t n_rows, const float* matrix, std::size_t n_classes, std::size_t width,
                 float factor, const Microkernels& kernels, std::size_t threads, float* logits) {
    const std::size_t blocks = ceil_div(n_classes, kBlockRows);
    const std::size_t workers = useful_workers(n_rows * n_classes * width, threads);
    const auto scratch = std::make_unique<Buffer[]>(workers);
    for (std::size_t w = 0; w < workers; ++w) {
        scratch[w] = make_buffer(kBlockQueries * kBlockRows);
    }
    run_phases(workers, {{ceil_div(n_rows, kBlockQueries) * blocks, [&](std::size_t worker, std::size_t i) {
                              const std::size_t b = i / blocks * kBlockQueries;
                              const std::size_t c = i % blocks * kBlockRows;
                              const std::size_t n_queries = std::min(kBlockQueries, n_rows - b);
                              const std::size_t n = std::min(kBlockRows, n_classes - c);
                              float* dots = scratch[worker].get();
                              kernels.dot_rows(matrix + c * width, ElementType::kFloat32, n, width, rows + b * width,
                                               n_queries, dots, kBlockRows);
                              for (std::size_t q = 0; q < n_queries; ++q, dots += kBlockRows) {
                                  float* out = logits + (b + q) * n_classes + c;
                                  for (std::size_t r = 0; r < n; ++r) {
                                      out[r] += factor * dots[r];
                                  }
                              }
                          }}});
}

// NaN compares false and so counts as wrong.
bool unit_rows(const float* rows, std::size_t n_rows, std::size_t width, float tolerance, const Microkernels& kernels) {
    for (std::size_t r = 0; r < n_rows; ++r, rows += width) {
        float square = 0.0F;
        kernels.dot_rows(rows, ElementType::kFloat32, 1, width, rows, 1, &square, 1);
        if (!(std::abs(std::sqrt(square) - 1.0F) <= tolerance)) {
            return false;
        }
    }
    return true;
}

}  // namespace iosr
