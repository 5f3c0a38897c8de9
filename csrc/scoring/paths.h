// The table of scoring paths, one for each instruction set.
#pragma once

#include <string>
#include <vector>

#include "scoring/microkernels.h"

namespace iosr {

struct ScoringPath {
    const char* name;
    const Microkernels* kernels;
    bool (*supported)();  // whether this processor and operating system can run it
};

// Every compiled path, best first.
const std::vector<ScoringPath>& scoring_paths();

// The best supported path, or the one that `requested` names if it isn't empty. Throws std::runtime_error if that one
// can't run here, or is unknown (with the existing names).
const ScoringPath& choose_path(const std::string& requested);

}  // namespace iosr
