// The portable path: C++17 without intrinsics. Four lanes are what every processor's baseline can be vectorised to.
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
