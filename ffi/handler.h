// The custom call targets, for registration, and the stages of the mesh target.
#pragma once

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

// The mesh target runs one rank a device; the loopback target is described in loopback.h.
// "jax_gemma_arf.register_tail", of a programmatic implementation, is not to be called; when it is
// registered, it registers the mesh target in the same runtime.
std::vector<Target> Targets();

// The state that a target's Instantiate makes; its type must be registered before the targets.
struct StateType {
  const char* name;
  xla::ffi::TypeId* id;
  const xla::ffi::TypeInfo* info;
};
std::vector<StateType> StateTypes();

// The stages that the register target has registered the mesh target with; none before a runtime
// has asked.
std::vector<std::string> MeshStages();

}  // namespace jax_gemma_arf
