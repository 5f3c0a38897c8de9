// Aligned memory of the drivers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace iosr {

inline std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer make_buffer(std::size_t n) {
    const std::size_t bytes = std::max<std::size_t>(n, 1) * sizeof(float);
    return Buffer(static_cast<float*>(::operator new(bytes, std::align_val_t{64})));
}

}  // namespace iosr
