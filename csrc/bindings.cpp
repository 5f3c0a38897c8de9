// The CPU module: checks arrays, releases the GIL, calls.
#include <pybind11/stl.h>

#include <cmath>

#include "arrays.h"
#include "scoring/affinity_sums.h"
#include "scoring/product.h"
#include "scoring/score.h"

namespace {

using iosr::checked;
using iosr::shape_text;

// Keys of float32, float16, bfloat16 (its bits as uint16) or int8; the dtype decides.
const void* checked_keys(const py::array& keys, const std::vector<py::ssize_t>& shape, iosr::ElementType& type) {
    const std::vector<py::ssize_t> got(keys.shape(), keys.shape() + keys.ndim());
    const char kind = keys.dtype().kind();  // reading its name takes as long as scoring a few hundred keys
    const py::ssize_t bytes = keys.dtype().itemsize();
    const bool native = keys.dtype().byteorder() == '=' || bytes == 1;
    type = kind == 'f' && bytes == 2   ? iosr::ElementType::kFloat16
           : kind == 'u' && bytes == 2 ? iosr::ElementType::kBfloat16
           : kind == 'i' && bytes == 1 ? iosr::ElementType::kInt8
                                       : iosr::ElementType::kFloat32;
    const bool known = type != iosr::ElementType::kFloat32 || (kind == 'f' && bytes == 4);
    if (!known || !native || (keys.flags() & py::array::c_style) == 0 || got != shape) {
        throw py::value_error("expected keys C-contiguous, float32, float16, uint16 (bfloat16) or int8 of shape " +
                              shape_text(shape) + ", got " + py::str(keys.dtype()).cast<std::string>() + " of shape " +
                              shape_text(got));
    }
    return keys.data();
}

// A plan's arrays, checked once and kept alive. A call checks and scores one batch.
class BoundPlan {
  public:
    BoundPlan(py::ssize_t n_classes, py::ssize_t width, const std::optional<py::array>& text, float tau,
              const std::optional<py::array>& keys, const std::optional<py::array>& class_offsets,
              const std::optional<py::array>& weights, float alpha, float beta, const std::optional<py::array>& linear,
              const std::optional<py::array>& bias, const std::optional<py::array>& key_scales,
              const std::optional<py::array>& query_transform, bool adapted_query, bool adapted_feature,
              float tolerance)
        : adapted_query_(adapted_query), adapted_feature_(adapted_feature), tolerance_(tolerance) {
        if (n_classes < 1 || width < 1) {
            throw py::value_error("expected n_classes >= 1 and a width of at least 1");
        }
        if (keys.has_value() != class_offsets.has_value() || (keys && keys->ndim() != 2)) {
            throw py::value_error("expected keys of shape (N, D) together with class_offsets");
        }
        const py::ssize_t n_keys = keys ? keys->shape(0) : 0;
        plan_.n_classes = static_cast<std::size_t>(n_classes);
        plan_.width = static_cast<std::size_t>(width);
        plan_.text = checked<float>(text, "text", {n_classes, width});
        if (keys) {
            plan_.keys = checked_keys(*keys, {n_keys, width}, plan_.key_type);
        }
        plan_.key_scales = checked<float>(key_scales, "key_scales", {n_keys});
        plan_.query_transform = checked<float>(query_transform, "query_transform", {width, width});
        plan_.class_offsets = checked<std::int64_t>(class_offsets, "class_offsets", {n_classes + 1});
        plan_.weights = checked<float>(weights, "weights", {n_keys});
        plan_.linear = checked<float>(linear, "linear", {n_classes, width});
        plan_.bias = checked<float>(bias, "bias", {n_classes});
        plan_.tau = tau;
        plan_.alpha = alpha;
        plan_.beta = beta;
        if ((plan_.key_type == iosr::ElementType::kInt8) != (plan_.key_scales != nullptr)) {
            throw py::value_error("expected key_scales with int8 keys, and with no others");
        }
        if (plan_.keys != nullptr) {
            iosr::check_offsets(plan_.class_offsets, n_classes, n_keys);
        }
        for (const auto* array : {&text, &keys, &class_offsets, &weights, &linear, &bias, &key_scales, &query_transform}) {
            if (*array) {
                arrays_.push_back(**array);
            }
        }
    }

    // (logits, path); None if an embedding isn't a C-contiguous float32 array (B, D), if a term lacks what it reads, or
    // if a row of plain or adapted isn't of unit norm. `query` and `feature` replace what the plan's terms read.
    py::object operator()(const py::object& plain, const py::object& adapted, bool check, const py::object& query,
                          const py::object& feature) const {
        iosr::QueryView queries;
        const float* second = nullptr;
        if (py::isinstance<py::array>(plain) && py::reinterpret_borrow<py::array>(plain).ndim() == 2) {
            queries.n_queries = static_cast<std::size_t>(py::reinterpret_borrow<py::array>(plain).shape(0));
        }
        const auto rows = [&](const py::object& object, const float*& data) {
            if (object.is_none()) {
                return true;
            }
            if (!py::isinstance<py::array_t<float, py::array::c_style>>(object)) {
                return false;
            }
            const auto array = py::reinterpret_borrow<py::array>(object);
            data = static_cast<const float*>(array.data());
            return array.ndim() == 2 && static_cast<std::size_t>(array.shape(0)) == queries.n_queries &&
                   static_cast<std::size_t>(array.shape(1)) == plan_.width;
        };
        if (!rows(plain, queries.plain) || queries.plain == nullptr || !rows(adapted, second) ||
            !rows(query, queries.query) || !rows(feature, queries.feature)) {
            return py::none();
        }
        queries.query = queries.query != nullptr ? queries.query : adapted_query_ ? second : queries.plain;
        queries.feature = queries.feature != nullptr ? queries.feature : adapted_feature_ ? second : queries.plain;
        if ((plan_.keys != nullptr && queries.query == nullptr) || (plan_.linear != nullptr && queries.feature == nullptr)) {
            return py::none();
        }
        const iosr::ScorePath& path = iosr::requested_path();
        const std::size_t threads = iosr::default_threads();
        py::array_t<float> logits({queries.n_queries, plan_.n_classes});
        float* out = logits.mutable_data();
        bool good = true;
        {
            py::gil_scoped_release release;
            if (check) {
                good = unit_rows(*path.kernels, queries.plain, queries.n_queries) &&
                       (second == nullptr || unit_rows(*path.kernels, second, queries.n_queries));
            }
            if (good) {
                iosr::score(plan_, queries, *path.kernels, threads, out);
            }
        }
        return good ? py::object(py::make_tuple(std::move(logits), path.name)) : py::none();
    }

  private:
    // NaN compares false and so counts as wrong.
    bool unit_rows(const iosr::Microkernels& kernels, const float* rows, std::size_t n_rows) const {
        for (std::size_t r = 0; r < n_rows; ++r, rows += plan_.width) {
            float square = 0.0F;
            kernels.dot_rows(rows, iosr::ElementType::kFloat32, 1, plan_.width, rows, 1, &square, 1);
            if (!(std::abs(std::sqrt(square) - 1.0F) <= tolerance_)) {
                return false;
            }
        }
        return true;
    }

    iosr::PlanView plan_;
    std::vector<py::array> arrays_;
    bool adapted_query_, adapted_feature_;
    float tolerance_;
};

using iosr::ElementType;
using OptionalArray = std::optional<py::array>;

// A C-contiguous array of this shape and of one of the dtypes that `names` lists, whose element type `accepts`.
ElementType checked_elements(const py::array& array, const char* name, const char* names,
                             const std::vector<py::ssize_t>& shape, const std::vector<ElementType>& accepted) {
    const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
    const char kind = array.dtype().kind();  // reading its name takes as long as scoring a few hundred keys
    const py::ssize_t bytes = array.dtype().itemsize();
    const bool native = array.dtype().byteorder() == '=' || bytes == 1;
    for (const ElementType type : accepted) {
        const char kinds[] = {'f', 'f', 'u', 'i'};
        const py::ssize_t sizes[] = {4, 2, 2, 1};
        const auto i = static_cast<std::size_t>(type);
        if (kind == kinds[i] && bytes == sizes[i] && native && (array.flags() & py::array::c_style) != 0 && got == shape) {
            return type;
        }
    }
    throw py::value_error(std::string("expected ") + name + " C-contiguous, " + names + " of shape " + shape_text(shape) +
                          ", got " + py::str(array.dtype()).cast<std::string>() + " of shape " + shape_text(got));
}

py::ssize_t rows_of(const py::array& array, const char* name) {
    if (array.ndim() != 2 || array.shape(1) < 1) {
        throw py::value_error(std::string("expected ") + name + " with 2 axes, the second of at least 1, got " +
                              std::to_string(array.ndim()) + " axes");
    }
    return array.shape(0);
}

const float* checked_floats(const py::array& array, const char* name, const std::vector<py::ssize_t>& shape) {
    checked_elements(array, name, "float32", shape, {ElementType::kFloat32});
    return static_cast<const float*>(array.data());
}

float* checked_logits(const py::array& array, const std::vector<py::ssize_t>& shape) {
    checked_floats(array, "logits", shape);
    if (!array.writeable()) {
        throw py::value_error("expected logits writable, got a read-only array");
    }
    return static_cast<float*>(const_cast<void*>(array.data()));
}

void add_product(const py::array& rows, const py::array& matrix, float factor, const py::array& logits) {
    const py::ssize_t n_rows = rows_of(rows, "rows");
    const py::ssize_t n_classes = rows_of(matrix, "matrix");
    const py::ssize_t width = matrix.shape(1);
    const float* left = checked_floats(rows, "rows", {n_rows, width});
    const float* right = checked_floats(matrix, "matrix", {n_classes, width});
    float* out = checked_logits(logits, {n_rows, n_classes});
    const iosr::ScorePath& path = iosr::requested_path();
    const std::size_t threads = iosr::default_threads();
    const py::gil_scoped_release release;
    iosr::add_product(left, static_cast<std::size_t>(n_rows), right, static_cast<std::size_t>(n_classes),
                      static_cast<std::size_t>(width), factor, *path.kernels, threads, out);
}

const char* affinity_sums(const py::array& queries, const py::array& keys, const OptionalArray& key_scales,
                          const OptionalArray& weights, const OptionalArray& class_offsets, const OptionalArray& values,
                          float alpha, float beta, const py::array& logits) {
    const py::ssize_t n_queries = rows_of(queries, "queries");
    const py::ssize_t n_keys = rows_of(keys, "keys");
    const py::ssize_t n_classes = logits.ndim() == 2 ? logits.shape(1) : 0;
    if (n_keys < 1 || n_classes < 1 || class_offsets.has_value() == values.has_value()) {
        throw py::value_error("expected at least one key, logits of shape (B, C) with at least one class, and either "
                              "class_offsets or values");
    }
    iosr::CacheTerm term;
    term.n_keys = static_cast<std::size_t>(n_keys);
    term.n_classes = static_cast<std::size_t>(n_classes);
    term.width = static_cast<std::size_t>(keys.shape(1));
    const float* rows = checked_floats(queries, "queries", {n_queries, keys.shape(1)});
    term.keys = keys.data();
    term.key_type = checked_elements(
        keys, "keys", "float32, float16, uint16 (bfloat16) or int8", {n_keys, keys.shape(1)},
        {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBfloat16, ElementType::kInt8});
    if ((term.key_type == ElementType::kInt8) != key_scales.has_value()) {
        throw py::value_error("expected key_scales with int8 keys, and with no others");
    }
    term.key_scales = key_scales ? checked_floats(*key_scales, "key_scales", {n_keys}) : nullptr;
    term.weights = weights ? checked_floats(*weights, "weights", {n_keys}) : nullptr;
    if (values) {
        term.values = values->data();
        term.value_type = checked_elements(*values, "values", "float32 or float16", {n_keys, n_classes},
                                           {ElementType::kFloat32, ElementType::kFloat16});
    } else {
        term.class_offsets = checked<std::int64_t>(class_offsets, "class_offsets", {n_classes + 1});
        iosr::check_offsets(term.class_offsets, n_classes, n_keys);
    }
    term.alpha = alpha;
    term.beta = beta;
    float* out = checked_logits(logits, {n_queries, n_classes});
    const iosr::ScorePath& path = iosr::requested_path();
    const std::size_t threads = iosr::default_threads();
    const py::gil_scoped_release release;
    iosr::affinity_sums(term, rows, static_cast<std::size_t>(n_queries), *path.kernels, threads, out);
    return path.name;
}

bool unit_rows(const py::array& rows, float tolerance) {
    const py::ssize_t n_rows = rows_of(rows, "rows");
    const float* data = checked_floats(rows, "rows", {n_rows, rows.shape(1)});
    const iosr::ScorePath& path = iosr::requested_path();
    const py::gil_scoped_release release;
    return iosr::unit_rows(data, static_cast<std::size_t>(n_rows), static_cast<std::size_t>(rows.shape(1)), tolerance,
                           *path.kernels);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.doc() = "CPU kernels of iosr_fast";
    module.attr("version") = IOSR_FAST_VERSION;
    module.def(
        "simd_paths",
        [] {
            std::vector<std::pair<std::string, bool>> paths;
            for (const iosr::ScorePath& path : iosr::score_paths()) {
                paths.emplace_back(path.name, path.supported());
            }
            return paths;
        },
        "Compiled paths, best first, each with whether this processor can run it.");
    module.def("add_product", &add_product, py::arg("rows"), py::arg("matrix"), py::arg("factor"), py::arg("logits"),
               "logits (B, C) += factor * rows (B, K) @ matrix' (C, K), float32, in place. A row's logits have the same\n"
               "bits in any batch and with any number of threads.");
    module.def("affinity_sums", &affinity_sums, py::arg("queries"), py::arg("keys"), py::arg("key_scales"),
               py::arg("weights"), py::arg("class_offsets"), py::arg("values"), py::arg("alpha"), py::arg("beta"),
               py::arg("logits"),
               "logits[b, c] += alpha * sum over keys j of class c: weights[j] * exp(-beta * (1 - key_scales[j] *\n"
               "<queries[b], keys[j]>)), in place; with `values` over all keys j, times values[j, c]. queries (B, D) and\n"
               "logits (B, C) float32; keys (N, D) float32, float16, uint16 (bfloat16) or int8, with key_scales (N,)\n"
               "float32; weights (N,) float32 or None; either class_offsets (C + 1,) int64 or values (N, C) float32 or\n"
               "float16. Returns the name of the instruction set.\n\n"
               "The threads are IOSR_FAST_THREADS or all; the logits don't depend on it. Raises ValueError for a wrong\n"
               "dtype, shape or layout, RuntimeError if IOSR_FAST_SIMD or IOSR_FAST_THREADS is invalid here.");
    module.def("unit_rows", &unit_rows, py::arg("rows"), py::arg("tolerance"),
               "Whether each of rows (B, K), float32, is finite and its norm differs from 1 by at most `tolerance`.");
    py::class_<BoundPlan>(module, "BoundPlan",
                          "A scoring plan's arrays, checked once and kept alive. Raises ValueError if a dtype, shape or\n"
                          "layout is wrong. `tolerance` is the largest difference of an embedding's norm from 1.")
        .def(py::init<py::ssize_t, py::ssize_t, const std::optional<py::array>&, float, const std::optional<py::array>&,
                      const std::optional<py::array>&, const std::optional<py::array>&, float, float,
                      const std::optional<py::array>&, const std::optional<py::array>&,
                      const std::optional<py::array>&, const std::optional<py::array>&, bool, bool, float>(),
             py::kw_only(), py::arg("n_classes"), py::arg("width"), py::arg("text") = py::none(), py::arg("tau") = 0.0F,
             py::arg("keys") = py::none(), py::arg("class_offsets") = py::none(), py::arg("weights") = py::none(),
             py::arg("alpha") = 0.0F, py::arg("beta") = 0.0F, py::arg("linear") = py::none(),
             py::arg("bias") = py::none(), py::arg("key_scales") = py::none(), py::arg("query_transform") = py::none(),
             py::arg("adapted_query") = false, py::arg("adapted_feature") = false, py::arg("tolerance") = 1e-3F)
        .def("__call__", &BoundPlan::operator(), py::arg("plain"), py::arg("adapted") = py::none(),
             py::arg("check") = true, py::arg("query") = py::none(), py::arg("feature") = py::none(),
             "(logits (B, C) float32, name of the instruction set) of embeddings (B, D). None if an embedding isn't a\n"
             "C-contiguous float32 array of this width, if a term lacks the one that it reads or, with `check`, if a row\n"
             "isn't of unit norm. `query` and `feature` replace what the cache and the linear term read. The threads are\n"
             "IOSR_FAST_THREADS or all; the logits don't depend on it. Raises RuntimeError if IOSR_FAST_SIMD or\n"
             "IOSR_FAST_THREADS is invalid here.");
}
