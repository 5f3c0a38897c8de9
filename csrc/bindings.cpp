// The CPU module: checks arrays, releases the GIL, calls.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "scoring/affinity_sums.h"
#include "scoring/paths.h"
#include "scoring/product.h"
#include "scoring/threads.h"

namespace py = pybind11;

namespace {

using iosr::ElementType;
using Shape = std::vector<py::ssize_t>;
using OptionalArray = std::optional<py::array>;

std::string shape_text(const py::ssize_t* shape, std::size_t n) {
    std::string text = "(";
    for (std::size_t i = 0; i < n; ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    }
    return text + (n == 1 ? ",)" : ")");
}

// The data of a C-contiguous array of exactly this shape, whose dtype `accept(kind, bytes)` knows; `names` are those
// dtypes.
template <typename F>
const void* checked(const py::array& array, const char* name, const char* names, const Shape& shape, F accept) {
    const py::dtype dtype = array.dtype();
    const auto n_axes = static_cast<std::size_t>(array.ndim());
    // Reading the dtype's name takes as long as scoring a few hundred keys.
    if (!accept(dtype.kind(), dtype.itemsize()) || dtype.byteorder() == '>' ||
        (array.flags() & py::array::c_style) == 0 ||
        !std::equal(shape.begin(), shape.end(), array.shape(), array.shape() + n_axes)) {
        throw py::value_error(std::string("expected ") + name + " C-contiguous, " + names + " of shape " +
                              shape_text(shape.data(), shape.size()) + ", got " + py::str(dtype).cast<std::string>() +
                              " of shape " + shape_text(array.shape(), n_axes));
    }
    return array.data();
}

const float* floats(const py::array& array, const char* name, const Shape& shape) {
    const auto accept = [](char kind, py::ssize_t bytes) { return kind == 'f' && bytes == 4; };
    return static_cast<const float*>(checked(array, name, "float32", shape, accept));
}

const float* floats(const OptionalArray& array, const char* name, const Shape& shape) {
    return array ? floats(*array, name, shape) : nullptr;
}

float* writable(const py::array& logits, const Shape& shape) {
    if (!logits.writeable()) {
        throw py::value_error("expected logits writable, got a read-only array");
    }
    return const_cast<float*>(floats(logits, "logits", shape));
}

// Keys, or values, which are float32 or float16.
const void* elements(const py::array& array, const char* name, const char* names, const Shape& shape, bool keys,
                     ElementType& type) {
    return checked(array, name, names, shape, [&](char kind, py::ssize_t bytes) {
        type = kind == 'f' && bytes == 4 ? ElementType::kFloat32
               : kind == 'f'             ? ElementType::kFloat16
               : kind == 'u'             ? ElementType::kBfloat16
                                         : ElementType::kInt8;
        return (kind == 'f' && (bytes == 4 || bytes == 2)) ||
               (keys && ((kind == 'u' && bytes == 2) || (kind == 'i' && bytes == 1)));
    });
}

const std::int64_t* offsets(const py::array& array, py::ssize_t n_classes, py::ssize_t n_keys) {
    const auto accept = [](char kind, py::ssize_t bytes) { return kind == 'i' && bytes == 8; };
    const void* checked_data = checked(array, "class_offsets", "int64", {n_classes + 1}, accept);
    const auto* data = static_cast<const std::int64_t*>(checked_data);
    if (data[0] != 0 || data[n_classes] != n_keys || !std::is_sorted(data, data + n_classes + 1)) {
        throw py::value_error("expected class_offsets to rise from 0 to the number of keys, " + std::to_string(n_keys));
    }
    return data;
}

void check_matrix(const py::array& array, const char* name) {
    if (array.ndim() != 2 || array.shape(1) < 1) {
        throw py::value_error(std::string("expected ") + name + " with two axes, the second not empty, got shape " +
                              shape_text(array.shape(), static_cast<std::size_t>(array.ndim())));
    }
}

// IOSR_FAST_THREADS, or every thread that this process may use. The caller holds the GIL.
std::size_t default_threads() {
    const char* text = std::getenv("IOSR_FAST_THREADS");
    if (text == nullptr || *text == '\0') {
        return py::module_::import("iosr_fast.utils.machine").attr("usable_threads")().cast<std::size_t>();
    }
    // Not strtol: glibc 2.38 gave it a new name, and a wheel that was compiled there would need that glibc.
    long count = 0;
    const char* const end = text + std::strlen(text);
    if (std::from_chars(text, end, count).ptr != end || count < 1 || count > 4096) {
        throw std::runtime_error("expected IOSR_FAST_THREADS to be a number of threads, 1 to 4096, got '" +
                                 std::string(text) + "'; unset it to use all");
    }
    return static_cast<std::size_t>(count);
}

// The path named by IOSR_FAST_SIMD, or the best one.
const iosr::ScoringPath& requested_path() {
    const char* requested = std::getenv("IOSR_FAST_SIMD");
    return iosr::choose_path(requested == nullptr ? "" : requested);
}

void add_product(const py::array& rows, const py::array& matrix, float factor, const py::array& logits) {
    check_matrix(rows, "rows");
    check_matrix(matrix, "matrix");
    const py::ssize_t n_rows = rows.shape(0);
    const py::ssize_t n_classes = matrix.shape(0);
    const py::ssize_t width = matrix.shape(1);
    const float* left = floats(rows, "rows", {n_rows, width});
    const float* right = floats(matrix, "matrix", {n_classes, width});
    float* out = writable(logits, {n_rows, n_classes});
    const iosr::ScoringPath& path = requested_path();
    const std::size_t threads = default_threads();
    const py::gil_scoped_release release;
    iosr::add_product(left, static_cast<std::size_t>(n_rows), right, static_cast<std::size_t>(n_classes),
                      static_cast<std::size_t>(width), factor, *path.kernels, threads, out);
}

const char* affinity_sums(const py::array& queries, const py::array& keys, const OptionalArray& key_scales,
                          const OptionalArray& weights, const OptionalArray& class_offsets, const OptionalArray& values,
                          float alpha, float beta, const py::array& logits) {
    check_matrix(queries, "queries");
    check_matrix(keys, "keys");
    check_matrix(logits, "logits");
    const py::ssize_t n_queries = queries.shape(0);
    const py::ssize_t n_classes = logits.shape(1);
    const py::ssize_t n_keys = keys.shape(0);
    const py::ssize_t width = keys.shape(1);
    if (n_keys < 1 || class_offsets.has_value() == values.has_value()) {
        throw py::value_error("expected at least one key, and either class_offsets or values");
    }
    iosr::CacheTerm term;
    term.n_keys = static_cast<std::size_t>(n_keys);
    term.n_classes = static_cast<std::size_t>(n_classes);
    term.width = static_cast<std::size_t>(width);
    const char* key_names = "float32, float16, uint16 (bfloat16) or int8";
    term.keys = elements(keys, "keys", key_names, {n_keys, width}, true, term.key_type);
    if ((term.key_type == ElementType::kInt8) != key_scales.has_value()) {
        throw py::value_error("expected key_scales with int8 keys, and with no others");
    }
    term.key_scales = floats(key_scales, "key_scales", {n_keys});
    term.weights = floats(weights, "weights", {n_keys});
    if (values) {
        term.values = elements(*values, "values", "float32 or float16", {n_keys, n_classes}, false, term.value_type);
    } else {
        term.class_offsets = offsets(*class_offsets, n_classes, n_keys);
    }
    term.alpha = alpha;
    term.beta = beta;
    const float* rows = floats(queries, "queries", {n_queries, width});
    float* out = writable(logits, {n_queries, n_classes});
    const iosr::ScoringPath& path = requested_path();
    const std::size_t threads = default_threads();
    const py::gil_scoped_release release;
    iosr::affinity_sums(term, rows, static_cast<std::size_t>(n_queries), *path.kernels, threads, out);
    return path.name;
}

bool unit_rows(const py::array& rows, float tolerance) {
    check_matrix(rows, "rows");
    const float* data = floats(rows, "rows", {rows.shape(0), rows.shape(1)});
    const iosr::ScoringPath& path = requested_path();
    const py::gil_scoped_release release;
    return iosr::unit_rows(data, static_cast<std::size_t>(rows.shape(0)), static_cast<std::size_t>(rows.shape(1)),
                           tolerance, *path.kernels);
}

std::vector<std::pair<std::string, bool>> simd_paths() {
    std::vector<std::pair<std::string, bool>> paths;
    for (const iosr::ScoringPath& path : iosr::scoring_paths()) {
        paths.emplace_back(path.name, path.supported());
    }
    return paths;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() =
        "CPU kernels of iosr_fast. The threads are IOSR_FAST_THREADS or all; no result depends on it. IOSR_FAST_SIMD names\n"
        "an instruction set. All raise ValueError for a wrong dtype, shape or layout, RuntimeError for invalid settings.";
    module.attr("version") = IOSR_FAST_VERSION;
    module.def("simd_paths", &simd_paths,
               "Compiled instruction sets, best first, each with whether this processor can run it.");
    module.def("add_product", &add_product, py::arg("rows"), py::arg("matrix"), py::arg("factor"), py::arg("logits"),
               "logits (B, C) += factor * rows (B, K) @ matrix' (C, K), float32, in place. A row's logits have the same\n"
               "bits in any batch.");
    module.def("affinity_sums", &affinity_sums, py::arg("queries"), py::arg("keys"), py::arg("key_scales"),
               py::arg("weights"), py::arg("class_offsets"), py::arg("values"), py::arg("alpha"), py::arg("beta"),
               py::arg("logits"),
               "logits[b, c] += alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - key_scales[j] *\n"
               "<queries[b], keys[j]>)), in place; with `values` over all keys j, times values[j, c]. queries (B, D) and\n"
               "logits (B, C) float32; keys (N, D) float32, float16, uint16 (bfloat16) or int8, with key_scales (N,)\n"
               "float32; weights (N,) float32 or None; either class_offsets (C + 1,) int64 or values (N, C) float32 or\n"
               "float16. Returns the name of the instruction set.");
    module.def("unit_rows", &unit_rows, py::arg("rows"), py::arg("tolerance"),
               "Whether each of rows (B, K), float32, is finite and its norm differs from 1 by at most `tolerance`.");
}
