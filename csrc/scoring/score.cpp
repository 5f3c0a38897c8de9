#include "scoring/score.h"

#include <stdexcept>

namespace iosr {

const std::vector<ScorePath>& score_paths() {
    static const std::vector<ScorePath> paths = {
        {"scalar", score_scalar, [] { return true; }},
    };
    return paths;
}

const ScorePath& choose_score_path(const std::string& requested) {
    std::string names;
    for (const ScorePath& path : score_paths()) {
        if (requested.empty() ? path.supported() : requested == path.name) {
            if (path.supported()) {
                return path;
            }
            throw std::runtime_error("IOSR_FAST_SIMD=" + requested + " is compiled, but this processor can't run it");
        }
        names += std::string(names.empty() ? "" : ", ") + path.name;
    }
    throw std::runtime_error("expected IOSR_FAST_SIMD to name a compiled path (" + names + "), got '" + requested +
                             "'; unset it to take the best one");
}

}  // namespace iosr
