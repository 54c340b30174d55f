// Peer-mapped buffers that the ranks of one replica group share.
//
// A workspace is created once for a (replica group, algorithm, size class) and lives as long as the
// process: it never grows and is never shared between those, so pointers that a CUDA graph holds
// stay valid and no counter ever serves two algorithms.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"
#include "kernels.h"

namespace jax_gemma_arf {

// What the slots of a call must hold, as slots.cuh lays them out: whole stripes of rows in
// two-shot, and the finished rows, which can have wider elements.
int64_t CapacityFor(const CallShape& call);

// The capacity is a power of two, so that few workspaces serve many sizes.
struct WorkspaceSpec : SlotSpec {
  WorkspaceSpec(const KernelKind& kind, int64_t least_capacity);

  using Key = std::tuple<Algorithm, int, int64_t, int>;
  Key key() const { return {algorithm, nranks, capacity, item_size}; }
};

// Byte offsets inside one rank's allocation. The only place that computes sizes.
struct WorkspaceLayout {
  explicit WorkspaceLayout(const WorkspaceSpec& spec);

  int64_t control = 0;  // Control
  int64_t front_guard;  // kGuardBytes that nobody writes to
  int64_t slots;        // SlotBytes
  int64_t back_guard;
  int64_t total;
};
inline constexpr int64_t kGuardBytes = 256;

// Where one rank's part of a workspace is, for its peers to map.
struct PartAddress {
  int64_t process = 0;  // tells processes apart, also those in containers of their own
  int32_t device = -1;
  void* base = nullptr;
  cudaIpcMemHandle_t handle = {};  // of base, for other processes
};

// One rank's part of a workspace.
class RankWorkspace {
 public:
  RankWorkspace(const WorkspaceSpec& spec, int rank) : spec_(spec), rank_(rank) {}
  ~RankWorkspace();
  RankWorkspace(const RankWorkspace&) = delete;
  RankWorkspace& operator=(const RankWorkspace&) = delete;

  // Each returns "" or what failed. Allocate synchronises with `stream`. Connect takes the
  // addresses of all parts, by rank, and the id that rank 0 proposes.
  std::string Allocate(cudaStream_t stream);
  std::string Connect(const std::vector<PartAddress>& parts, int64_t id);
  // Also if the guards on both sides of the slots are no longer what they were (hazard 18).
  std::string CheckGuards() const;

  const WorkspaceSpec& spec() const { return spec_; }
  int rank() const { return rank_; }
  int64_t id() const { return id_; }  // the same on all ranks that share it, and on no other
  int device() const { return device_; }
  char* base() const { return base_; }
  const Peers& peers() const { return peers_; }

 private:
  WorkspaceSpec spec_;
  int rank_;
  int device_ = -1;
  int64_t id_ = 0;
  char* base_ = nullptr;
  Peers peers_ = {};
};

// The parts of the ranks that one device holds: one of a mesh, all in loopback.
using Workspace = std::vector<std::unique_ptr<RankWorkspace>>;

}  // namespace jax_gemma_arf
