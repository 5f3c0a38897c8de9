// The pybind11 file of the CUDA module. The caller owns all memory: tensors are passed as device addresses with their
// shapes and checked as far as addresses can be; nothing is allocated, synchronised or read back.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "score.h"

namespace py = pybind11;

namespace {

using namespace iosr::cuda;

void expect(bool good, const std::string& expected, const std::string& got) {
    if (!good) {
        throw py::value_error("expected " + expected + ", got " + got);
    }
}

template <class T>
T* pointer(const char* name, uintptr_t address, std::size_t alignment = alignof(T)) {
    expect(address != 0 && address % alignment == 0,
           std::string(name) + " at a device address that is a multiple of " + std::to_string(alignment),
           std::to_string(address));
    return reinterpret_cast<T*>(address);
}

template <class T>
const T* optional_pointer(const char* name, const std::optional<uintptr_t>& address) {
    return address ? pointer<const T>(name, *address) : nullptr;
}

int64_t count(const char* name, int64_t value, int64_t largest) {
    expect(value >= 1 && value <= largest, std::string(name) + " in 1.." + std::to_string(largest),
           std::to_string(value));
    return value;
}

int64_t row_bytes(const char* name, int64_t value) {
    count(name, value, kMaxRowBytes);
    expect(value % kCopy == 0, std::string(name) + " to be a multiple of 16", std::to_string(value));
    return value;
}

Keys keys_of(const std::string& precision) {
    for (const auto& [name, keys] : {std::pair<const char*, Keys>{"fp32", Keys::kFp32},
                                     {"fp16", Keys::kFp16},
                                     {"bf16", Keys::kBf16},
                                     {"int8", Keys::kInt8}}) {
        if (precision == name) {
            return keys;
        }
    }
    throw py::value_error("expected a key precision of fp32, fp16, bf16 or int8, got " + precision);
}

CUstream_st* stream_of(uintptr_t stream) { return reinterpret_cast<CUstream_st*>(stream); }

std::string cache(int device, uintptr_t stream, const std::string& key_precision, int64_t n_queries, int64_t n_keys,
                  int64_t n_classes, uintptr_t queries, int64_t query_bytes, int query_parts, float part_scale,
                  uintptr_t keys, int64_t key_bytes, uintptr_t key_class, uintptr_t class_offsets,
                  std::optional<uintptr_t> weights, std::optional<uintptr_t> key_scales, float scale, float alpha,
                  std::optional<uintptr_t> edges, uintptr_t logits) {
    const Keys format = keys_of(key_precision);
    CacheArgs args;
    args.n_queries = count("n_queries", n_queries, INT32_MAX);
    args.n_keys = count("n_keys", n_keys, INT32_MAX);
    args.n_classes = count("n_classes", n_classes, INT32_MAX);
    args.queries = pointer<const char>("queries", queries, kCopy);
    args.keys = pointer<const char>("keys", keys, kCopy);
    args.query_bytes = row_bytes("query_bytes", query_bytes);
    args.key_bytes = row_bytes("key_bytes", key_bytes);
    args.query_parts = static_cast<int>(count("query_parts", query_parts, format == Keys::kFp32 ? 1 : kMaxParts));
    args.part_scale = part_scale;
    const int64_t channels = args.key_bytes / (format == Keys::kFp32 ? 4 : format == Keys::kInt8 ? 1 : 2);
    const int64_t part_bytes = (channels + 31) / 32 * 64;
    expect(query_parts == 1 || args.query_bytes == query_parts * part_bytes,
           std::to_string(query_parts) + " parts of " + std::to_string(part_bytes) + " bytes in a query",
           std::to_string(query_bytes) + " bytes");
    args.key_class = pointer<const int32_t>("key_class", key_class);
    args.weights = optional_pointer<float>("weights", weights);
    args.key_scales = optional_pointer<float>("key_scales", key_scales);
    expect((format == Keys::kInt8) == (args.key_scales != nullptr), "key_scales with int8 keys and only there",
           key_precision + (args.key_scales != nullptr ? " with scales" : " without"));
    args.scale = scale;
    args.alpha = alpha;
    args.logits = pointer<float>("logits", logits);

    const bool merged = edges.has_value();
    MergeArgs merge;
    if (merged) {
        args.edges = pointer<float>("edges", *edges);
        merge.class_offsets = pointer<const int32_t>("class_offsets", class_offsets);
        merge.key_class = args.key_class;
        merge.n_queries = args.n_queries;
        merge.n_keys = args.n_keys;
        merge.n_classes = args.n_classes;
        merge.edges = args.edges;
        merge.alpha = alpha;
        merge.logits = args.logits;
    }

    const DeviceGuard guard(device);
    launch_cache(args, format, stream_of(stream));
    if (merged && n_keys > kChunk) {
        launch_merge(merge, stream_of(stream));
    }
    return std::string(format == Keys::kFp32 ? "fp32" : "mma") + (query_parts > 1 ? "-split" : "") +
           (n_queries <= kSmallBatch ? "-small" : "");
}

std::string linear(int device, uintptr_t stream, const std::string& precision, int64_t n_queries, int64_t n_classes,
                   const py::list& operands, int row_parts, float part_scale, std::optional<uintptr_t> bias,
                   std::optional<uintptr_t> class_offsets, uintptr_t logits) {
    expect(precision == "fp32" || precision == "fp16", "a precision of fp32 or fp16", precision);
    const bool half = precision == "fp16";
    LinearArgs args;
    args.row_parts = static_cast<int>(count("row_parts", row_parts, half ? kMaxParts : 1));
    args.part_scale = part_scale;
    expect(operands.size() <= 2, "at most 2 operands", std::to_string(operands.size()));
    for (const py::handle& item : operands) {
        const auto [queries, query_bytes, rows, bytes, factor] =
            item.cast<std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, float>>();
        Operand& operand = args.operands[args.n_operands++];
        operand.queries = pointer<const char>("queries", queries, kCopy);
        operand.rows = pointer<const char>("rows", rows, kCopy);
        operand.query_bytes = row_bytes("query_bytes", query_bytes);
        operand.row_bytes = row_bytes("row_bytes", bytes);
        operand.factor = factor;
        const int64_t part_bytes = (query_bytes + 63) / 64 * 64;
        expect(row_parts == 1 || bytes == row_parts * part_bytes,
               std::to_string(row_parts) + " parts of " + std::to_string(part_bytes) + " bytes in a row",
               std::to_string(bytes) + " bytes");
    }
    args.n_queries = count("n_queries", n_queries, INT32_MAX);
    args.n_classes = count("n_classes", n_classes, INT32_MAX);
    args.bias = optional_pointer<float>("bias", bias);
    args.class_offsets = optional_pointer<int32_t>("class_offsets", class_offsets);
    args.logits = pointer<float>("logits", logits);
    const DeviceGuard guard(device);
    launch_linear(args, half ? Keys::kFp16 : Keys::kFp32, stream_of(stream));
    return std::string(half ? "linear-mma" : "linear") + (n_queries <= kSmallBatch ? "-small" : "");
}

}  // namespace

PYBIND11_MODULE(_C_cuda, module) {
    module.doc() = "CUDA kernels of iosr_fast; iosr_fast.scoring.cuda_scorer calls them";
    module.attr("version") = IOSR_FAST_VERSION;
    module.attr("chunk") = kChunk;
    module.def("cache", &cache, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("key_precision"),
               py::arg("n_queries"), py::arg("n_keys"), py::arg("n_classes"), py::arg("queries"),
               py::arg("query_bytes"), py::arg("query_parts"), py::arg("part_scale"), py::arg("keys"),
               py::arg("key_bytes"), py::arg("key_class"), py::arg("class_offsets"), py::arg("weights"),
               py::arg("key_scales"),
               py::arg("scale"), py::arg("alpha"), py::arg("edges"), py::arg("logits"),
               "Write the cache term of the classes that have keys to logits (B, C); see CacheArgs in plan.h.\n"
               "`edges` is float32 (2 * ceil(N / chunk), B), or None where no class spans chunks. Returns the path's\n"
               "name. Raises ValueError for an invalid argument, RuntimeError with CUDA's message if a launch fails.");
    module.def("linear", &linear, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("precision"),
               py::arg("n_queries"), py::arg("n_classes"), py::arg("operands"), py::arg("row_parts"),
               py::arg("part_scale"), py::arg("bias"), py::arg("class_offsets"), py::arg("logits"),
               "Add bias and at most two operands (queries, query_bytes, rows, row_bytes, factor) to logits (B, C),\n"
               "which count as 0 in classes without keys (class_offsets None: in all). Returns and raises as\n"
               "cache().");
}
