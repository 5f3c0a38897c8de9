// The portable path: C++17 without intrinsics. Every processor's baseline can vectorise four lanes.
#include "scoring/microkernels.h"

#include <cstdint>
#include <cstring>

namespace iosr {
namespace {

#include "scoring/channels.inl"

#include "scoring/portable_vector.inl"

using V = PortableVector<4>;

#include "scoring/microkernels.inl"

}  // namespace

const Microkernels kScalarKernels = kKernels;

}  // namespace iosr
