// The inner loops at the sixteen lanes of AVX-512, in plain C++: tests their indexing on processors without it.
#include <cstdint>
#include <cstring>

#include "scoring/microkernels.h"

namespace iosr {
namespace {

#include "scoring/channels.inl"
#include "scoring/portable_vector.inl"

using V = PortableVector<16>;

#include "scoring/microkernels.inl"

}  // namespace

extern const Microkernels kWideKernels = kKernels;

}  // namespace iosr
