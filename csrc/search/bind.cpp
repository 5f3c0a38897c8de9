// The search for Python: checks arrays, releases the GIL, calls.
#include <pybind11/stl.h>

#include "arrays.h"
#include "search/cache_intervals.h"
#include "search/intervals.h"
#include "search/sweep.h"

namespace iosr {
namespace {

using Array = std::optional<py::array>;

// Fresh arrays of intervals.
struct Intervals {
    py::array_t<double> lower, upper;
    py::array_t<std::uint8_t> flags;

    explicit Intervals(const std::vector<py::ssize_t>& shape) : lower(shape), upper(shape), flags(shape) {}
    IntervalRows rows() { return {lower.mutable_data(), upper.mutable_data(), flags.mutable_data()}; }
};

template <typename T>
const T* needed(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
    return checked<T>(Array(array), name, shape);
}

// labels (V,) in [0, C).
const std::int64_t* checked_labels(const py::array& array, py::ssize_t n_samples, py::ssize_t n_classes) {
    const std::int64_t* labels = needed<std::int64_t>(array, "labels", {n_samples});
    for (py::ssize_t v = 0; v < n_samples; ++v) {
        if (labels[v] < 0 || labels[v] >= n_classes) {
            throw py::value_error("expected labels from 0 to " + std::to_string(n_classes - 1) + ", got " +
                                  std::to_string(labels[v]));
        }
    }
    return labels;
}

void check_matrix(const py::array& array, const char* name, py::ssize_t least_columns) {
    if (array.ndim() != 2 || array.shape(1) < least_columns) {
        throw py::value_error(std::string("expected ") + name + " with two axes, the second of at least " +
                              std::to_string(least_columns) + ", got shape " +
                              shape_text({array.shape(), array.shape() + array.ndim()}));
    }
}

py::tuple py_intervals(const py::array& base, const py::array& slope, const py::array& labels, py::ssize_t threads) {
    check_matrix(base, "base", 1);
    const py::ssize_t n_samples = base.shape(0);
    const py::ssize_t n_classes = base.shape(1);
    const float* z = needed<float>(base, "base", {n_samples, n_classes});
    const float* s = needed<float>(slope, "slope", {n_samples, n_classes});
    const std::int64_t* y = checked_labels(labels, n_samples, n_classes);
    const std::size_t n_threads = checked_threads(threads);
    Intervals found({n_samples});
    const IntervalRows rows = found.rows();
    {
        py::gil_scoped_release release;
        find_intervals(z, s, y, static_cast<std::size_t>(n_samples), static_cast<std::size_t>(n_classes), n_threads,
                       rows);
    }
    return py::make_tuple(found.lower, found.upper, found.flags);
}

py::tuple py_cache_intervals(const py::array& base, const py::array& query, const py::array& keys,
                             const py::array& class_offsets, const py::array& labels, const py::array& betas,
                             const Array& weights, const Array& extra, const Array& gammas, py::ssize_t threads) {
    check_matrix(base, "base", 1);
    check_matrix(keys, "keys", 1);
    if (betas.ndim() != 1 || betas.shape(0) < 1 || (gammas && gammas->ndim() != 1) ||
        gammas.has_value() != extra.has_value()) {
        throw py::value_error(
            "expected betas of shape (K,) with K >= 1, and gammas of shape (G,) with extra and only there");
    }
    const py::ssize_t n_samples = base.shape(0);
    const py::ssize_t n_classes = base.shape(1);
    const py::ssize_t n_keys = keys.shape(0);
    const py::ssize_t width = keys.shape(1);
    const py::ssize_t n_betas = betas.shape(0);
    const py::ssize_t n_gammas = gammas ? gammas->shape(0) : 1;

    CacheView cache;
    cache.n_samples = static_cast<std::size_t>(n_samples);
    cache.n_classes = static_cast<std::size_t>(n_classes);
    cache.width = static_cast<std::size_t>(width);
    cache.n_betas = static_cast<std::size_t>(n_betas);
    cache.n_gammas = static_cast<std::size_t>(n_gammas);
    cache.base = needed<float>(base, "base", {n_samples, n_classes});
    cache.extra = checked<float>(extra, "extra", {n_samples, n_classes});
    cache.gammas = checked<double>(gammas, "gammas", {n_gammas});
    cache.query = needed<float>(query, "query", {n_samples, width});
    cache.keys = needed<float>(keys, "keys", {n_keys, width});
    cache.class_offsets = needed<std::int64_t>(class_offsets, "class_offsets", {n_classes + 1});
    cache.betas = needed<double>(betas, "betas", {n_betas});
    cache.weights = checked<float>(weights, "weights", {n_betas, n_keys});
    cache.labels = checked_labels(labels, n_samples, n_classes);
    check_offsets(cache.class_offsets, n_classes, n_keys);

    const ScorePath& path = requested_path();
    const std::size_t n_threads = checked_threads(threads);
    Intervals found({n_betas * n_gammas, n_samples});
    const IntervalRows rows = found.rows();
    {
        py::gil_scoped_release release;
        cache_intervals(cache, *path.kernels, n_threads, rows);
    }
    return py::make_tuple(found.lower, found.upper, found.flags, path.name);
}

py::tuple py_sweep(const py::array& lower, const py::array& upper, const py::array& flags, py::ssize_t threads) {
    check_matrix(lower, "lower", 0);
    const py::ssize_t n_settings = lower.shape(0);
    const std::vector<py::ssize_t> shape = {n_settings, lower.shape(1)};
    const double* low = needed<double>(lower, "lower", shape);
    const double* high = needed<double>(upper, "upper", shape);
    const std::uint8_t* ends = needed<std::uint8_t>(flags, "flags", shape);
    const std::size_t n_threads = checked_threads(threads);
    py::array_t<double> alpha(n_settings), best_low(n_settings), best_high(n_settings);
    py::array_t<std::uint8_t> best_ends(n_settings);
    py::array_t<std::int64_t> right(n_settings);
    const BestRows rows = {alpha.mutable_data(), best_low.mutable_data(), best_high.mutable_data(),
                           best_ends.mutable_data(), right.mutable_data()};
    {
        py::gil_scoped_release release;
        sweep(low, high, ends, static_cast<std::size_t>(n_settings), static_cast<std::size_t>(shape[1]),
              n_threads, rows);
    }
    return py::make_tuple(alpha, best_low, best_high, best_ends, right);
}

}  // namespace

void bind_search(py::module_& module) {
    module.def("intervals", &py_intervals, py::kw_only(), py::arg("base"), py::arg("slope"), py::arg("labels"),
               py::arg("threads") = 0,
               "The alphas at which each sample is right: lower (V,) and upper (V,) float64, flags (V,) uint8 (1\n"
               "lower open, 2 upper open, 4 empty). base, slope (V, C) float32, labels (V,) int64. Raises as score does.");
    module.def("cache_intervals", &py_cache_intervals, py::kw_only(), py::arg("base"), py::arg("query"),
               py::arg("keys"), py::arg("class_offsets"), py::arg("labels"), py::arg("betas"),
               py::arg("weights") = py::none(), py::arg("extra") = py::none(), py::arg("gammas") = py::none(),
               py::arg("threads") = 0,
               "intervals for a cache at K betas and G gammas: lower, upper, flags (K * G, V) and the name of the\n"
               "path that ran. betas (K,) and gammas (G,) float64, weights (K, N), else as iosr_fast.methods.tuning.search says.");
    module.def("sweep", &py_sweep, py::kw_only(), py::arg("lower"), py::arg("upper"), py::arg("flags"),
               py::arg("threads") = 0,
               "For each setting of intervals (S, V) the best alpha, the low and high end of its plateau, flags of\n"
               "these (1 low open, 2 high open) and the number of right samples, (S,) each.");
}

}  // namespace iosr
