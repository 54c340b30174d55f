// The loopback target: all ranks that this process holds run on one device, on streams of their
// own, for tests and benchmarks on one GPU. Partial sums and results have a leading axis of ranks.
// No program on a mesh comes here.
#pragma once

#include "handler.h"

namespace jax_gemma_arf {

Target LoopbackTarget();
StateType LoopbackStateType();

}  // namespace jax_gemma_arf
