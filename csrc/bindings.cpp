// The CPU module: checks arrays, releases the GIL, calls.
#include <pybind11/stl.h>

#include <cmath>

#include "arrays.h"
#include "scoring/score.h"

namespace {

using iosr::checked;
using iosr::shape_text;

// Keys of float32, float16, bfloat16 (its bits as uint16) or int8; the dtype decides.
const void* checked_keys(const py::array& keys, const std::vector<py::ssize_t>& shape, iosr::KeyType& type) {
    const std::vector<py::ssize_t> got(keys.shape(), keys.shape() + keys.ndim());
    const char kind = keys.dtype().kind();  // reading its name takes as long as scoring a few hundred keys
    const py::ssize_t bytes = keys.dtype().itemsize();
    const bool native = keys.dtype().byteorder() == '=' || bytes == 1;
    type = kind == 'f' && bytes == 2   ? iosr::KeyType::kFloat16
           : kind == 'u' && bytes == 2 ? iosr::KeyType::kBfloat16
           : kind == 'i' && bytes == 1 ? iosr::KeyType::kInt8
                                       : iosr::KeyType::kFloat32;
    const bool known = type != iosr::KeyType::kFloat32 || (kind == 'f' && bytes == 4);
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
        if ((plan_.key_type == iosr::KeyType::kInt8) != (plan_.key_scales != nullptr)) {
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
            kernels.dot_rows(rows, iosr::KeyType::kFloat32, 1, plan_.width, rows, 1, &square, 1);
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
