// The pybind11 file of the CUDA module, for iosr_fast.scoring.backends.cuda alone, which checks what it passes: device
// addresses (0 for an array that the plan lacks), shapes and constants.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>

#include "few_queries.h"

namespace py = pybind11;
using namespace pybind11::literals;
using namespace iosr::cuda;

namespace {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

BoundPlan bind(int device, int format, int32_t n_keys, int32_t n_classes, int32_t width, int32_t key_vectors,
               int32_t value_stride, bool half_values, double alpha, double beta, uintptr_t keys, uintptr_t key_scales,
               uintptr_t weights, uintptr_t class_offsets, uintptr_t tile_classes, uintptr_t values) {
    Plan plan{at<void>(keys), at<float>(key_scales), at<float>(weights), at<int32_t>(class_offsets),
              at<int32_t>(tile_classes), at<void>(values)};
    plan.half_values = half_values;
    plan.n_keys = n_keys;
    plan.n_classes = n_classes;
    plan.width = width;
    plan.key_vectors = key_vectors;
    plan.value_stride = value_stride;
    plan.tile_keys = tile_keys(device, n_keys);
    plan.scale = static_cast<float>(beta / std::log(2.0));
    plan.alpha = static_cast<float>(alpha);
    return BoundPlan(device, static_cast<Format>(format), plan);
}

void add_affinity_sums(const BoundPlan& plan, uintptr_t queries, int n_queries, uintptr_t logits, uintptr_t workspace,
                       uintptr_t stream) {
    plan.add_affinity_sums(at<float>(queries), n_queries, at<float>(logits), at<float>(workspace),
                           at<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "The CUDA kernel for few queries (few_queries.h). CUDA's errors are RuntimeErrors with its message.";
    module.attr("version") = IOSR_FAST_VERSION;
    module.def("tile_keys", &tile_keys, "device"_a, "n_keys"_a);
    py::class_<BoundPlan>(module, "BoundPlan")
        .def(py::init(&bind), py::kw_only(), "device"_a, "format"_a, "n_keys"_a, "n_classes"_a, "width"_a,
             "key_vectors"_a, "value_stride"_a, "half_values"_a, "alpha"_a, "beta"_a, "keys"_a, "key_scales"_a,
             "weights"_a, "class_offsets"_a, "tile_classes"_a, "values"_a)
        .def("workspace_size", &BoundPlan::workspace_size, "n_queries"_a)
        .def("add_affinity_sums", &add_affinity_sums, "queries"_a, "n_queries"_a, "logits"_a, "workspace"_a, "stream"_a,
             py::call_guard<py::gil_scoped_release>());
}
