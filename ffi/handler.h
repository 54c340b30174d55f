// The XLA FFI handlers, for registration.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

// A custom call target for Python to register: its handler for each stage, nullptr where the stage
// is not used.
struct Target {
  const char* name;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* prepare;
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
};

// The mesh target runs one rank a device. The loopback target runs all ranks that this process
// holds on one device, on streams of their own; partial sums and results have a leading axis of
// ranks. "jax_gemma_arf.register_tail", of a programmatic implementation, is not to be called; when
// it is registered, it registers the mesh target in the same runtime.
std::vector<Target> Targets();

// Whether kernels are launched programmatically and the mesh target gets a record handler, if the
// implementation is programmatic. No if never set; to be set before the registration of that
// target.
void SetRecord(bool enabled);

// The stages that the register target has registered the mesh target with; none before a runtime
// has asked.
std::vector<std::string> MeshStages();

// Launches of this process that Execute has enqueued or XLA has captured, and launches that Record
// has put into a CUDA graph or updated there; the second number counts the latter alone. A replayed
// graph adds none.
int64_t EnqueuedLaunches();
int64_t RecordedLaunches();

// One rank's part of a workspace of this process. damage: "", or what happened to its guard words.
struct WorkspaceReport {
  int device;
  int rank;
  int nranks;
  std::string algorithm;
  int64_t capacity;
  int64_t bytes;
  uintptr_t base;  // its first byte in device memory
  std::string damage;
};
std::vector<WorkspaceReport> ReportWorkspaces();

// The state that Instantiate makes; its type must be registered before the targets.
xla::ffi::TypeId* CallTypeId();
const xla::ffi::TypeInfo* CallTypeInfo();

}  // namespace jax_gemma_arf
