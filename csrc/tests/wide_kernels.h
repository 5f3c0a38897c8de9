#pragma once

#include <cstdint>

#include "scoring/microkernels.h"

namespace iosr {

extern const Microkernels kWideKernels;
float half_to_float(std::uint16_t bits);

}  // namespace iosr
