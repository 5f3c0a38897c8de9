// The inner loops, written once for a vector type V that the including file defines for its instruction set.
//
// V has: kLanes; kBlockRows (see dot_rows_for); zero(); broadcast(float); load(const T*) for float, Half, Bfloat,
// std::int8_t; store(float*); fma(a, b, c) = a * b + c; operators + - *; max(a, b); sum(); scale_by_power(value,
// biased) = value * 2^n, where n is the integer in the low bits of `biased` (see exp2). The including file puts
// channels.inl, V and this file into an unnamed namespace and uses nothing of the standard library but memcpy: an
// inline function of a shared header, compiled here with wider flags, might be the copy that the linker keeps for the
// whole program.

// 2^t for t <= 0 or a little above. t + kRound has the nearest integer n in its low bits, so that no conversion is
// needed; f = t - n is in [-1/2, 1/2], where the polynomial (minimax, relative) has a relative error of 2e-9 before
// rounding.
constexpr float kRound = 12582912.0F;  // 1.5 * 2^23
constexpr float kSmallest = -126.0F;   // below, an affinity is set to 2^-126: no subnormal numbers occur

inline V exp2(V t) {
    t = V::max(t, V::broadcast(kSmallest));
    const V biased = t + V::broadcast(kRound);
    const V f = t - (biased - V::broadcast(kRound));
    V p = V::broadcast(1.535336181e-4F);
    p = V::fma(p, f, V::broadcast(1.339887445e-3F));
    p = V::fma(p, f, V::broadcast(9.618437358e-3F));
    p = V::fma(p, f, V::broadcast(5.550332471e-2F));
    p = V::fma(p, f, V::broadcast(2.402264791e-1F));
    p = V::fma(p, f, V::broadcast(6.931472029e-1F));
    p = V::fma(p, f, V::broadcast(1.0F));
    return V::scale_by_power(p, biased);
}

constexpr std::size_t kPanel = 2 * V::kLanes;
constexpr std::size_t kDepth = 4096 / kPanel;  // channels per pass: 16 KB of a panel, in the first-level cache

inline void prefetch(const char* p) {
#if defined(__GNUC__)
    __builtin_prefetch(p);
#else
    static_cast<void>(p);
#endif
}

// out (6, P) (+)= rows (6, depth) @ panel (depth, P), where element d of row k is rows[k * stride + d], or transposed
// rows[d * stride + k]. Twelve named accumulators, because GCC keeps arrays in memory.
template <bool kTransposed>
inline void tile_6(const float* rows, std::size_t stride, const float* panel, std::size_t depth, float* out, bool add) {
    constexpr std::size_t L = V::kLanes;
    V a0 = V::zero(), a1 = a0, b0 = a0, b1 = a0, c0 = a0, c1 = a0, d0 = a0, d1 = a0, e0 = a0, e1 = a0, f0 = a0, f1 = a0;
    const float* low = rows;  // three rows per base pointer need fewer address registers
    const float* high = kTransposed ? rows + 3 : rows + 3 * stride;
    const std::size_t next = kTransposed ? 1 : stride;
#pragma GCC unroll 4
    for (std::size_t d = 0; d < depth; ++d) {
        const std::size_t i = kTransposed ? d * stride : d;
        const V left = V::load(panel);
        const V right = V::load(panel + L);
        panel += kPanel;
        V x = V::broadcast(low[i]);
        a0 = V::fma(x, left, a0), a1 = V::fma(x, right, a1);
        x = V::broadcast(low[i + next]);
        b0 = V::fma(x, left, b0), b1 = V::fma(x, right, b1);
        x = V::broadcast(low[i + 2 * next]);
        c0 = V::fma(x, left, c0), c1 = V::fma(x, right, c1);
        x = V::broadcast(high[i]);
        d0 = V::fma(x, left, d0), d1 = V::fma(x, right, d1);
        x = V::broadcast(high[i + next]);
        e0 = V::fma(x, left, e0), e1 = V::fma(x, right, e1);
        x = V::broadcast(high[i + 2 * next]);
        f0 = V::fma(x, left, f0), f1 = V::fma(x, right, f1);
    }
    if (add) {
        a0 = a0 + V::load(out), a1 = a1 + V::load(out + L);
        b0 = b0 + V::load(out + 2 * L), b1 = b1 + V::load(out + 3 * L);
        c0 = c0 + V::load(out + 4 * L), c1 = c1 + V::load(out + 5 * L);
        d0 = d0 + V::load(out + 6 * L), d1 = d1 + V::load(out + 7 * L);
        e0 = e0 + V::load(out + 8 * L), e1 = e1 + V::load(out + 9 * L);
        f0 = f0 + V::load(out + 10 * L), f1 = f1 + V::load(out + 11 * L);
    }
    a0.store(out), a1.store(out + L);
    b0.store(out + 2 * L), b1.store(out + 3 * L);
    c0.store(out + 4 * L), c1.store(out + 5 * L);
    d0.store(out + 6 * L), d1.store(out + 7 * L);
    e0.store(out + 8 * L), e1.store(out + 9 * L);
    f0.store(out + 10 * L), f1.store(out + 11 * L);
}

inline void tile_1(const float* row, const float* panel, std::size_t depth, float* dots, bool add) {
    V left = add ? V::load(dots) : V::zero();
    V right = add ? V::load(dots + V::kLanes) : V::zero();
    for (std::size_t i = 0; i < depth; ++i, panel += kPanel) {
        const V x = V::broadcast(row[i]);
        left = V::fma(x, V::load(panel), left);
        right = V::fma(x, V::load(panel + V::kLanes), right);
    }
    left.store(dots);
    right.store(dots + V::kLanes);
}

// Prefetches memory that is needed next, into the second-level cache: a part before each of `parts` steps.
struct Ahead {
    const char* next;
    std::size_t step;
    Ahead(const void* begin, std::size_t bytes, std::size_t parts)
        : next(static_cast<const char*>(begin)), step(bytes == 0 || parts == 0 ? 0 : bytes / parts / 64 * 64 + 64) {}
    void part() {
        for (const char* end = next + step; next < end; next += 64) {
#if defined(__GNUC__)
            __builtin_prefetch(next, 0, 2);
#endif
        }
    }
};

void dot_panel(const float* rows, std::size_t n_rows, std::size_t width, const float* panel, float* dots,
               const void* ahead, std::size_t bytes) {
    Ahead more(ahead, bytes, n_rows / kTileRows * ((width + kDepth - 1) / kDepth));
    for (std::size_t begin = 0; begin < width; begin += kDepth) {
        const std::size_t depth = width - begin < kDepth ? width - begin : kDepth;
        const float* slice = panel + begin * kPanel;
        std::size_t r = 0;
        for (; r + kTileRows <= n_rows; r += kTileRows) {
            more.part();
            tile_6<false>(rows + r * width + begin, width, slice, depth, dots + r * kPanel, begin > 0);
        }
        for (; r < n_rows; ++r) {
            tile_1(rows + r * width + begin, slice, depth, dots + r * kPanel, begin > 0);
        }
    }
}

void exp_tile(float* tile, std::size_t n_rows, float scale, const float* key_scales, const float* weights) {
    const V shift = V::broadcast(-scale);
    for (std::size_t r = 0; r < n_rows; ++r) {
        const V factor = V::broadcast(key_scales == nullptr ? scale : scale * key_scales[r]);
        const V weight = V::broadcast(weights == nullptr ? 1.0F : weights[r]);
        const V first = exp2(V::fma(V::load(tile), factor, shift)) * weight;
        const V second = exp2(V::fma(V::load(tile + V::kLanes), factor, shift)) * weight;
        first.store(tile);
        second.store(tile + V::kLanes);
        tile += kPanel;
    }
}

void sum_panel(const float* values, std::size_t n_keys, std::size_t n_classes, const float* tile, float* sums, bool add,
               const void* ahead, std::size_t bytes) {
    Ahead more(ahead, bytes, (n_classes + kTileRows - 1) / kTileRows);
    for (std::size_t c = 0; c < n_classes; c += kTileRows) {
        more.part();
        for (std::size_t i = 0; add && i < kTileRows * kPanel * sizeof(float); i += 64) {
            prefetch(reinterpret_cast<const char*>(sums + c * kPanel) + i);
        }
        tile_6<true>(values + c, n_classes, tile, n_keys, sums + c * kPanel, add);
    }
}

template <typename T>
void widen_as(const T* channels, std::size_t n, float* out) {
    std::size_t i = 0;
    for (; i + V::kLanes <= n; i += V::kLanes) {
        V::load(channels + i).store(out + i);
    }
    for (; i < n; ++i) {
        out[i] = to_float(channels[i]);
    }
}

// Bytes from a row that is multiplied to one that is prefetched. The hardware's prefetcher can't follow several
// streams, except one query's eight streams of float32. Prefetching past the end is harmless.
constexpr std::size_t kAhead = 8192;

// The first n elements, and zeros.
template <typename T>
inline V load_first(const T* elements, std::size_t n) {
    if (n >= V::kLanes) {
        return V::load(elements);
    }
    T copy[V::kLanes] = {};
    std::memcpy(copy, elements, n * sizeof(T));
    return V::load(copy);
}

// R rows times Q queries: R * Q independent sums, at least 8 of them to hide the latency of a multiply-add, and as many
// as the registers hold, so that each row and each query that is loaded takes part in several.
template <std::size_t R, std::size_t Q, typename T>
void dot_block(const T* rows, std::size_t width, const float* queries, float* dots, std::size_t stride) {
    V sums[R][Q];
#pragma GCC unroll 8
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
            sums[r][q] = V::zero();
        }
    }
    const auto add = [&](std::size_t d, auto load) {
        V x[Q];
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
            x[q] = load(queries + q * width + d);
        }
#pragma GCC unroll 8
        for (std::size_t r = 0; r < R; ++r) {
            const V row = load(rows + r * width + d);
#pragma GCC unroll 8
            for (std::size_t q = 0; q < Q; ++q) {
                sums[r][q] = V::fma(x[q], row, sums[r][q]);
            }
        }
    };
    std::size_t d = 0;
    const char* ahead = reinterpret_cast<const char*>(rows) + kAhead;
    constexpr std::size_t kStep = R * V::kLanes * sizeof(T);  // bytes that a step of the loop reads
    for (; d + V::kLanes <= width; d += V::kLanes, ahead += kStep) {
        for (std::size_t line = 0; (Q > 1 || sizeof(T) < sizeof(float)) && line < kStep; line += 64) {
            prefetch(ahead + line);
        }
        add(d, [](const auto* elements) { return V::load(elements); });
    }
    if (d < width) {
        add(d, [n = width - d](const auto* elements) { return load_first(elements, n); });
    }
#pragma GCC unroll 8
    for (std::size_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (std::size_t q = 0; q < Q; ++q) {
            dots[q * stride + r] = sums[r][q].sum();
        }
    }
}

template <std::size_t Q, typename T>
void dot_rows_for(const T* rows, std::size_t n_rows, std::size_t width, const float* queries, float* dots,
                  std::size_t stride) {
    constexpr std::size_t R = Q == 1 ? 8 : Q <= 3 ? 4 : V::kBlockRows;
    std::size_t r = 0;
    for (; r + R <= n_rows; r += R) {
        dot_block<R, Q>(rows + r * width, width, queries, dots + r, stride);
    }
    for (; r < n_rows; ++r) {
        dot_block<1, Q>(rows + r * width, width, queries, dots + r, stride);
    }
}

template <typename T>
void dot_few(const T* rows, std::size_t n_rows, std::size_t width, const float* queries, std::size_t n_queries,
             float* dots, std::size_t stride) {
    switch (n_queries) {
        case 1: dot_rows_for<1>(rows, n_rows, width, queries, dots, stride); break;
        case 2: dot_rows_for<2>(rows, n_rows, width, queries, dots, stride); break;
        case 3: dot_rows_for<3>(rows, n_rows, width, queries, dots, stride); break;
        default: dot_rows_for<4>(rows, n_rows, width, queries, dots, stride); break;
    }
}

template <typename T>
void dot_rows_as(const T* rows, std::size_t n_rows, std::size_t width, const float* queries, std::size_t n_queries,
                 float* dots, std::size_t stride) {
    constexpr std::size_t kMost = 4;  // queries in a block
    constexpr std::size_t kTileBytes = 16384;
    const std::size_t n_blocks = (n_queries + kMost - 1) / kMost;
    if (n_blocks <= 1) {
        return dot_few(rows, n_rows, width, queries, n_queries, dots, stride);
    }
    // A few rows at a time, which are still in the first-level cache for the next block of queries.
    const std::size_t fit = kTileBytes / (width * sizeof(T)) / 8 * 8;
    const std::size_t step = fit < 8 ? 8 : fit;
    for (std::size_t r = 0; r < n_rows; r += step) {
        const std::size_t count = n_rows - r < step ? n_rows - r : step;
        for (std::size_t b = 0, left = n_blocks; left > 0; --left) {
            const std::size_t n = (n_queries - b + left - 1) / left;  // blocks of about equal size
            dot_few(rows + r * width, count, width, queries + b * width, n, dots + b * stride + r, stride);
            b += n;
        }
    }
}

template <typename F>
void with_type(const void* data, ElementType type, F run) {
    switch (type) {
        case ElementType::kFloat32: run(static_cast<const float*>(data)); break;
        case ElementType::kFloat16: run(static_cast<const Half*>(data)); break;
        case ElementType::kBfloat16: run(static_cast<const Bfloat*>(data)); break;
        case ElementType::kInt8: run(static_cast<const std::int8_t*>(data)); break;
    }
}

void widen(const void* channels, ElementType type, std::size_t n, float* out) {
    with_type(channels, type, [&](const auto* typed) { widen_as(typed, n, out); });
}

void dot_rows(const void* rows, ElementType type, std::size_t n_rows, std::size_t width, const float* queries,
              std::size_t n_queries, float* dots, std::size_t stride) {
    with_type(rows, type, [&](const auto* typed) {
        dot_rows_as(typed, n_rows, width, queries, n_queries, dots, stride);
    });
}

void exp_run(float* dots, std::size_t n, float scale, const float* key_scales, const float* weights) {
    const V shift = V::broadcast(-scale);
    for (std::size_t i = 0; i < n; i += V::kLanes) {
        V factor = V::broadcast(scale);
        factor = key_scales == nullptr ? factor : factor * load_first(key_scales + i, n - i);
        const V value = exp2(V::fma(V::load(dots + i), factor, shift));
        (weights == nullptr ? value : value * load_first(weights + i, n - i)).store(dots + i);
    }
}

// K keys' values are loaded once for all queries; several keys at a time, so that sums are seldom loaded and stored.
template <std::size_t K, typename T>
inline void sum_keys(const T* values, std::size_t n_classes, const float* affinities, std::size_t n_queries,
                     std::size_t stride, float* sums, std::size_t sums_stride, bool add) {
    V first[K];  // the first query's affinities, which stay in registers if it is the only one
#pragma GCC unroll 8
    for (std::size_t k = 0; k < K; ++k) {
        first[k] = V::broadcast(affinities[k]);
    }
    for (std::size_t c = 0; c < n_classes; c += V::kLanes) {
        V v[K];
        V sum = add ? V::load(sums + c) : V::zero();
#pragma GCC unroll 8
        for (std::size_t k = 0; k < K; ++k) {
            v[k] = V::load(values + k * n_classes + c);
            sum = V::fma(v[k], first[k], sum);
        }
        sum.store(sums + c);
        for (std::size_t b = 1; b < n_queries; ++b) {
            const float* a = affinities + b * stride;
            float* out = sums + b * sums_stride + c;
            sum = add ? V::load(out) : V::zero();
#pragma GCC unroll 8
            for (std::size_t k = 0; k < K; ++k) {
                sum = V::fma(v[k], V::broadcast(a[k]), sum);
            }
            sum.store(out);
        }
    }
}

void sum_rows(const void* values, ElementType type, std::size_t n_keys, std::size_t n_classes, const float* affinities,
              std::size_t n_queries, std::size_t stride, float* sums, std::size_t sums_stride, bool add) {
    constexpr std::size_t kMost = 8;
    with_type(values, type, [&](const auto* rows) {
        std::size_t r = 0;
        for (; r + kMost <= n_keys; r += kMost) {
            sum_keys<kMost>(rows + r * n_classes, n_classes, affinities + r, n_queries, stride, sums, sums_stride,
                            add || r > 0);
        }
        for (; r < n_keys; ++r) {
            sum_keys<1>(rows + r * n_classes, n_classes, affinities + r, n_queries, stride, sums, sums_stride,
                        add || r > 0);
        }
    });
}

constexpr Microkernels kKernels = {kPanel, dot_panel, exp_tile, sum_panel, widen, dot_rows, exp_run, sum_rows};
