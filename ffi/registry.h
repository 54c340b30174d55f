// The workspaces of this process. They live until it ends: CUDA graphs and peers hold addresses.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "workspace.h"

namespace jax_gemma_arf {

// A communicator belongs to one rank of one replica group; in loopback it is nullptr, or stands for
// a rendezvous directory.
using RegistryKey = std::tuple<void* /*communicator*/, int32_t /*device*/, WorkspaceSpec::Key>;

// Returns the workspace that was registered last, or nullptr.
const Workspace* FindWorkspace(const RegistryKey& key);

const Workspace* RegisterWorkspace(const RegistryKey& key, Workspace workspace);

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

}  // namespace jax_gemma_arf
