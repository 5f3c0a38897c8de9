// Checks shared by the bindings: dtypes and shapes of arrays, threads, the scoring path.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "scoring/score.h"
#include "scoring/threads.h"

namespace py = pybind11;

namespace iosr {

inline std::string shape_text(const std::vector<py::ssize_t>& shape) {
    std::string text = "(";
    for (std::size_t i = 0; i < shape.size(); ++i) {
        text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
    }
    return text + (shape.size() == 1 ? ",)" : ")");
}

// The data of a C-contiguous array of T with exactly this shape; null without an array.
template <typename T>
const T* checked(const std::optional<py::array>& array, const char* name, const std::vector<py::ssize_t>& shape) {
    if (!array) {
        return nullptr;
    }
    const std::vector<py::ssize_t> got(array->shape(), array->shape() + array->ndim());
    if (!py::isinstance<py::array_t<T>>(*array) || (array->flags() & py::array::c_style) == 0 || got != shape) {
        throw py::value_error(std::string("expected ") + name + " C-contiguous, " +
                              py::str(py::dtype::of<T>()).cast<std::string>() + " of shape " + shape_text(shape) +
                              ", got " + py::str(array->dtype()).cast<std::string>() + " of shape " + shape_text(got));
    }
    return static_cast<const T*>(array->data());
}

// IOSR_FAST_THREADS, or every thread that this process may use.
inline std::size_t default_threads() {
    const char* text = std::getenv("IOSR_FAST_THREADS");
    if (text == nullptr || *text == '\0') {
        return usable_threads();
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
inline const ScorePath& requested_path() {
    const char* requested = std::getenv("IOSR_FAST_SIMD");
    return choose_score_path(requested == nullptr ? "" : requested);
}

inline void check_offsets(const std::int64_t* offsets, py::ssize_t n_classes, py::ssize_t n_keys) {
    bool good = offsets[0] == 0 && offsets[n_classes] == n_keys;
    for (py::ssize_t c = 0; c < n_classes; ++c) {
        good = good && offsets[c] <= offsets[c + 1];
    }
    if (!good) {
        throw py::value_error("expected class_offsets to rise from 0 to the number of keys, " + std::to_string(n_keys));
    }
}

}  // namespace iosr
