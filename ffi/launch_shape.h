// How the rows of a call are spread over blocks, and what a device can hold of them: alike for both
// implementations of kernels.h.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels.h"

namespace jax_gemma_arf {

// The grid of a launch. Depends on the shapes of the call and on max_ctas, not on its buffers.
struct Grid {
  int blocks;
  int threads;  // of a block
  int cluster;  // blocks of a cluster; 1: no clusters
  int shared_bytes;
};
Grid GridOf(const Launch& launch);

cudaLaunchAttribute ClusterAttribute(int cluster);

// Loads every kernel of this library on the current device. CUDA otherwise loads a kernel at its
// first launch, which can need a device on which a peer's kernel already waits (hazard 29).
cudaError_t Preload();

// How many blocks of this kernel, for rows of `width` elements and with `next_norms` next norms,
// the current device holds at once.
cudaError_t ResidentCtas(const KernelKind& kind, int width, int next_norms, int* ctas);

}  // namespace jax_gemma_arf
