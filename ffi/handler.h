// The XLA FFI handlers, for registration.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

// One custom call target: its handler for each stage, nullptr where the stage is not used.
struct Target {
  const char* name;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* prepare;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};

// "jax_gemma_arf.post_ff": one rank a device, over a mesh. "jax_gemma_arf.loopback_post_ff": all
// ranks on one device, on streams of their own; x and the result have a leading axis of ranks.
extern const Target kTargets[2];

// Launches that Execute has enqueued or captured in this process. A replayed CUDA graph adds none.
int64_t EnqueuedLaunches();

// The state that Instantiate makes; its type must be registered before the targets.
xla::ffi::TypeId* CallTypeId();
const xla::ffi::TypeInfo* CallTypeInfo();

}  // namespace jax_gemma_arf
