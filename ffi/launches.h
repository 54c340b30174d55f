// The launches of a call that is ready on a device, one for each rank that the device holds.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "call.h"
#include "kernels.h"
#include "ready.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

xla::ffi::ErrorOr<std::vector<Launch>> LaunchesOf(const Call& call, const Ready& ready,
                                                  const xla::ffi::RemainingArgs& args,
                                                  const xla::ffi::RemainingRets& rets);

// Whether kernels are launched programmatically and the mesh target gets a record handler, if the
// implementation is programmatic. No if never set; to be set before the registration of that
// target. Off: XLA captures calls into graphs, and nothing is launched programmatically.
void SetRecord(bool enabled);
bool RecordEnabled();

// Enqueues a launch and counts it. With may_overlap it is launched programmatically, unless that is
// switched off: the kernel may then start before the kernel in front of it in the stream has ended.
cudaError_t EnqueueAndCount(const Launch& launch, bool may_overlap, cudaStream_t stream);

xla::ffi::Error LaunchError(cudaError_t error, const Launch& launch);

// Counts a launch that Record has put into a CUDA graph, or updated there.
void CountRecorded();

// Launches of this process that Execute has enqueued or XLA has captured, and launches that Record
// has put into a CUDA graph or updated there; the second number counts the latter alone. A replayed
// graph adds none.
int64_t EnqueuedLaunches();
int64_t RecordedLaunches();

}  // namespace jax_gemma_arf
