// The classes of a range of keys.
#pragma once

#include <algorithm>
#include <cstddef>

#include "scoring/plan.h"

namespace iosr {

// Rows [begin, end) of a block that belong to class c. `opens` at the first of them in this chunk, `closes` at the
// last.
struct Segment {
    std::size_t c, begin, end;
    bool opens, closes;
};

// Class c owns keys [begin(c), end(c)).
class Classes {
  public:
    Classes(const std::int64_t* offsets, std::size_t n_classes) : offsets_(offsets), n_classes_(n_classes) {}

    std::size_t begin(std::size_t c) const { return static_cast<std::size_t>(offsets_[c]); }
    std::size_t end(std::size_t c) const { return static_cast<std::size_t>(offsets_[c + 1]); }

    std::size_t of(std::size_t key) const {
        const std::int64_t* past = std::upper_bound(offsets_, offsets_ + n_classes_ + 1, static_cast<std::int64_t>(key));
        return static_cast<std::size_t>(past - offsets_) - 1;
    }

    // Cuts keys [first, last) of the chunk [chunk_begin, chunk_end) into segments, whose rows count from `first`, and
    // returns their number. The search starts at class c and sets c to the last class found.
    std::size_t cut(std::size_t first, std::size_t last, std::size_t chunk_begin, std::size_t chunk_end, std::size_t& c,
                    Segment* segments) const {
        std::size_t n = 0;
        for (std::size_t key = first; key < last;) {
            while (end(c) <= key) {
                ++c;  // skips classes without keys
            }
            const std::size_t stop = std::min(end(c), last);
            segments[n++] = {c, key - first, stop - first, key == std::max(begin(c), chunk_begin),
                             stop == std::min(end(c), chunk_end)};
            key = stop;
        }
        return n;
    }

  private:
    const std::int64_t* offsets_;
    std::size_t n_classes_;
};

}  // namespace iosr
