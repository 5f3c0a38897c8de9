// The table of scoring kernels: one entry per instruction set, one source file each.
#pragma once

#include <string>
#include <vector>

#include "scoring/plan.h"

namespace iosr {

// Writes logits (B, C), row-major. Reads nothing global and keeps no state: safe from several threads at once.
using ScoreFunction = void (*)(const PlanView& plan, const QueryView& queries, float* logits);

struct ScorePath {
    const char* name;
    ScoreFunction run;
    bool (*supported)();  // whether this processor and operating system can run it
};

void score_scalar(const PlanView& plan, const QueryView& queries, float* logits);

// Every compiled path, best first.
const std::vector<ScorePath>& score_paths();

// The best supported path, or the one that `requested` names where it isn't empty. Throws std::runtime_error, with the
// names that exist, where that one is unknown or can't run here.
const ScorePath& choose_score_path(const std::string& requested);

}  // namespace iosr
