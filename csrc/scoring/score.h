// The table of scoring paths, one for each instruction set, and the driver that they share.
#pragma once

#include <string>
#include <vector>

#include "scoring/microkernels.h"
#include "scoring/plan.h"

namespace iosr {

struct ScorePath {
    const char* name;
    const Microkernels* kernels;
    bool (*supported)();  // whether this processor and operating system can run it
};

// Every compiled path, best first.
const std::vector<ScorePath>& score_paths();

// The best supported path, or the one that `requested` names if it isn't empty. Throws std::runtime_error if that one
// can't run here, or is unknown (with the existing names).
const ScorePath& choose_score_path(const std::string& requested);

// Writes logits (B, C), row-major, with up to `threads` threads (at least 1), whose number doesn't change the result.
// May be called from several threads at once. Besides its arguments it uses memory for packed queries and partial sums:
// about 45 MB at most for D <= 12288, and 0.3 MB per thread. Throws std::bad_alloc before any work if memory is
// insufficient.
void score(const PlanView& plan, const QueryView& queries, const Microkernels& kernels, std::size_t threads,
           float* logits);

}  // namespace iosr
