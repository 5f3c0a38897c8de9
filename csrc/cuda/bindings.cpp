// The pybind11 file of the CUDA module. Tensors are passed as device addresses with their shapes, and checked as far as
// addresses can be; the caller keeps them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>

#include "few_queries.h"

namespace py = pybind11;

namespace {

using namespace iosr::cuda;
using namespace pybind11::literals;
using Address = std::optional<uintptr_t>;

void expect(bool good, const std::string& expected, const std::string& got) {
    if (!good) {
        throw py::value_error("expected " + expected + ", got " + got);
    }
}

template <class T>
T* pointer(const char* name, Address address, std::size_t alignment = alignof(T)) {
    expect(!address || (*address != 0 && *address % alignment == 0),
           std::string(name) + " at a device address that is a multiple of " + std::to_string(alignment),
           std::to_string(address.value_or(0)));
    return reinterpret_cast<T*>(address.value_or(0));
}

int32_t count(const char* name, int64_t value, int64_t largest = INT32_MAX) {
    expect(value >= 1 && value <= largest, std::string(name) + " in 1.." + std::to_string(largest),
           std::to_string(value));
    return static_cast<int32_t>(value);
}

// Elements in a row that holds `used` of them and is padded to a multiple of 16 bytes.
int32_t row_elements(const char* name, int64_t bytes, int64_t used, int64_t element_bytes) {
    const int64_t expected = (used * element_bytes + 15) / 16 * 16;
    expect(bytes == expected, std::string(name) + " of " + std::to_string(expected), std::to_string(bytes));
    return count(name, bytes / element_bytes);
}

BoundPlan bind(int device, const std::string& precision, int64_t n_keys, int64_t n_classes, int64_t width,
               uintptr_t keys, int64_t key_bytes, Address key_scales, Address weights, Address class_offsets,
               Address tile_classes, Address values, int64_t value_bytes, bool half_values, double alpha, double beta) {
    static const std::map<std::string, std::pair<Keys, int>> formats = {
        {"fp32", {Keys::kFp32, 4}}, {"fp16", {Keys::kFp16, 2}}, {"bf16", {Keys::kBf16, 2}}, {"int8", {Keys::kInt8, 1}}};
    const auto format = formats.find(precision);
    expect(format != formats.end(), "a precision of fp32, fp16, bf16 or int8", precision);
    expect((precision == "int8") == key_scales.has_value(), "key_scales with int8 keys and only there",
           precision + (key_scales ? " with key_scales" : " without"));
    expect(class_offsets.has_value() != values.has_value() && class_offsets.has_value() == tile_classes.has_value(),
           "values, or class_offsets with tile_classes", "both or neither");
    Plan plan;
    plan.n_keys = count("n_keys", n_keys);
    plan.n_classes = count("n_classes", n_classes, INT32_MAX / kMaxQueries);
    plan.width = count("width", width, INT32_MAX / 64);
    plan.keys = pointer<const void>("keys", keys, 16);
    plan.key_vectors = row_elements("key_bytes", key_bytes, width, format->second.second) * format->second.second / 16;
    plan.key_scales = pointer<const float>("key_scales", key_scales);
    plan.weights = pointer<const float>("weights", weights);
    plan.class_offsets = pointer<const int32_t>("class_offsets", class_offsets);
    plan.tile_classes = pointer<const int32_t>("tile_classes", tile_classes);
    plan.values = pointer<const void>("values", values, 16);
    plan.half_values = half_values;
    plan.value_stride = values ? row_elements("value_bytes", value_bytes, n_classes, half_values ? 2 : 4) : 0;
    plan.tile_keys = tile_keys(device, n_keys);
    plan.scale = static_cast<float>(beta / std::log(2.0));
    plan.alpha = static_cast<float>(alpha);
    return BoundPlan(device, format->second.first, plan);
}

void add_affinity_sums(const BoundPlan& plan, uintptr_t queries, int64_t n_queries, uintptr_t logits,
                       uintptr_t workspace, uintptr_t stream) {
    plan.add_affinity_sums(pointer<const float>("queries", queries), count("n_queries", n_queries, kMaxQueries),
                           pointer<float>("logits", logits), pointer<float>("workspace", workspace, 16),
                           reinterpret_cast<CUstream_st*>(stream));
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "The CUDA kernel for few queries, which iosr_fast.scoring.backends.cuda calls; see few_queries.h.\n"
                   "ValueError for an argument that can't be right, RuntimeError with CUDA's message if a call fails.";
    module.attr("version") = IOSR_FAST_VERSION;
    module.def("tile_keys", [](int device, int64_t n_keys) { return tile_keys(device, count("n_keys", n_keys)); },
               "device"_a, "n_keys"_a);
    py::class_<BoundPlan>(module, "BoundPlan")
        .def(py::init(&bind), py::kw_only(), "device"_a, "precision"_a, "n_keys"_a, "n_classes"_a, "width"_a, "keys"_a,
             "key_bytes"_a, "key_scales"_a, "weights"_a, "class_offsets"_a, "tile_classes"_a, "values"_a,
             "value_bytes"_a, "half_values"_a, "alpha"_a, "beta"_a)
        .def("workspace_size", &BoundPlan::workspace_size, "n_queries"_a)
        .def("add_affinity_sums", &add_affinity_sums, "queries"_a, "n_queries"_a, "logits"_a, "workspace"_a, "stream"_a,
             py::call_guard<py::gil_scoped_release>());
}
