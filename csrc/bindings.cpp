// The CPU module and its scoring function: checks arrays, releases the GIL, calls. search/bind.cpp binds the search.
#include <pybind11/stl.h>

#include "arrays.h"
#include "scoring/score.h"

namespace iosr {
void bind_search(py::module_& module);
}

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

py::tuple score(py::ssize_t n_classes, const std::optional<py::array>& plain, const std::optional<py::array>& query,
                const std::optional<py::array>& feature, const std::optional<py::array>& text, float tau,
                const std::optional<py::array>& keys, const std::optional<py::array>& class_offsets,
                const std::optional<py::array>& weights, float alpha, float beta,
                const std::optional<py::array>& linear, const std::optional<py::array>& bias,
                const std::optional<py::array>& key_scales, const std::optional<py::array>& query_transform,
                py::ssize_t threads) {
    const std::optional<py::array>& any = plain ? plain : query ? query : feature;
    if (!any || any->ndim() != 2 || n_classes < 1) {
        throw py::value_error("expected n_classes >= 1 and embeddings of shape (B, D)");
    }
    if ((text && !plain) || (keys && (!query || !class_offsets || keys->ndim() != 2)) || (linear && !feature)) {
        throw py::value_error(
            "expected plain with text, query and class_offsets with keys of shape (N, D), feature with linear");
    }
    const py::ssize_t n_queries = any->shape(0);
    const py::ssize_t width = any->shape(1);
    const py::ssize_t n_keys = keys ? keys->shape(0) : 0;

    iosr::QueryView queries;
    queries.n_queries = static_cast<std::size_t>(n_queries);
    queries.plain = checked<float>(plain, "plain", {n_queries, width});
    queries.query = checked<float>(query, "query", {n_queries, width});
    queries.feature = checked<float>(feature, "feature", {n_queries, width});

    iosr::PlanView plan;
    plan.n_classes = static_cast<std::size_t>(n_classes);
    plan.width = static_cast<std::size_t>(width);
    plan.text = checked<float>(text, "text", {n_classes, width});
    if (keys) {
        plan.keys = checked_keys(*keys, {n_keys, width}, plan.key_type);
    }
    plan.key_scales = checked<float>(key_scales, "key_scales", {n_keys});
    plan.query_transform = checked<float>(query_transform, "query_transform", {width, width});
    plan.class_offsets = checked<std::int64_t>(class_offsets, "class_offsets", {n_classes + 1});
    plan.weights = checked<float>(weights, "weights", {n_keys});
    plan.linear = checked<float>(linear, "linear", {n_classes, width});
    plan.bias = checked<float>(bias, "bias", {n_classes});
    plan.tau = tau;
    plan.alpha = alpha;
    plan.beta = beta;
    if (width < 1) {
        throw py::value_error("expected a width of at least 1");
    }
    if ((plan.key_type == iosr::KeyType::kInt8) != (plan.key_scales != nullptr)) {
        throw py::value_error("expected key_scales with int8 keys, and with no others");
    }
    if (plan.keys != nullptr) {
        iosr::check_offsets(plan.class_offsets, n_classes, n_keys);
    }

    const iosr::ScorePath& path = iosr::requested_path();
    const std::size_t n_threads = iosr::checked_threads(threads);
    py::array_t<float> logits({n_queries, n_classes});
    float* out = logits.mutable_data();
    {
        py::gil_scoped_release release;
        iosr::score(plan, queries, *path.kernels, n_threads, out);
    }
    return py::make_tuple(std::move(logits), path.name);
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
    module.def("score", &score, py::kw_only(), py::arg("n_classes"), py::arg("plain") = py::none(),
               py::arg("query") = py::none(), py::arg("feature") = py::none(), py::arg("text") = py::none(),
               py::arg("tau") = 0.0F, py::arg("keys") = py::none(), py::arg("class_offsets") = py::none(),
               py::arg("weights") = py::none(), py::arg("alpha") = 0.0F, py::arg("beta") = 0.0F,
               py::arg("linear") = py::none(), py::arg("bias") = py::none(),
               py::arg("key_scales") = py::none(), py::arg("query_transform") = py::none(), py::arg("threads") = 0,
               "Execute a scoring plan: (logits (B, C) float32, name of the path that ran). threads=0 takes\n"
               "IOSR_FAST_THREADS or all; the logits don't depend on it. Raises ValueError if an array's dtype, shape\n"
               "or layout is wrong, RuntimeError if IOSR_FAST_SIMD or IOSR_FAST_THREADS is invalid here.");
    iosr::bind_search(module);
}
