// Memory and packing of the driver.
#pragma once

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <memory>
#include <new>

namespace iosr {

inline std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{64}); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> make_buffer(std::size_t n) {
    return Buffer<T>(static_cast<T*>(::operator new(std::max<std::size_t>(n, 1) * sizeof(T), std::align_val_t{64})));
}

// The queries of one term in panels: (ceil(B / P), D, P), the last one padded with zeros.
struct Panels {
    Buffer<float> own;               // empty if the term is missing or another term has packed the same array
    float* data = nullptr;           // own, or those of the other term
    const float* source = nullptr;   // queries (B, D)

    Panels() = default;
    Panels(const float* queries, std::size_t size, std::initializer_list<const Panels*> others) : source(queries) {
        for (const Panels* other : others) {
            if (queries != nullptr && other != nullptr && other->source == queries) {
                data = other->data;
            }
        }
        if (queries != nullptr && data == nullptr) {
            own = make_buffer<float>(size);
            data = own.get();
        }
    }

    // Queries [first, first + n) as the panel `out`, n <= panel.
    void pack(std::size_t first, std::size_t n, std::size_t width, std::size_t panel, float* out) const {
        const float* from = source + first * width;
        for (std::size_t d = 0; d < width; ++d, out += panel) {
            for (std::size_t lane = 0; lane < panel; ++lane) {
                out[lane] = lane < n ? from[lane * width + d] : 0.0F;
            }
        }
    }
};

}  // namespace iosr
