// Peer-mapped buffers that the ranks of one replica group share, and how they come to be.
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

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

// The largest message, the partial sums of one rank, that a call may reduce. One-shot keeps two
// messages of every rank, and is for small ones.
inline constexpr int64_t kMaxMessageBytes = int64_t{256} << 20;
inline constexpr int64_t kMaxOneShotBytes = int64_t{64} << 20;

// What all ranks of a call must have in common.
struct CallShape {
  KernelKind kind;
  int tokens;
  int hidden;
  int next_norms;
  Dtype out_dtype;

  bool operator==(const CallShape& other) const;
  std::string Describe() const;
};

// What the slots of a call must hold, as exchange.cuh lays them out: whole groups of rows in
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

// What a rank tells its peers, and its vote on whether to go on.
struct PeerRecord {
  int64_t process = 0;  // tells processes apart, also those in containers of their own
  void* base = nullptr;
  cudaIpcMemHandle_t handle = {};  // of base, for other processes
  int32_t device = -1;
  int32_t multiprocessors = 0;
  int32_t resident_ctas = 0;  // how many blocks of the call's kernel its device holds at once
  int64_t workspace = 0;  // names the one that it has, or proposes a name for a new one; 0: none
  CallShape call = {};
  char version[24] = {};   // of the extension
  char failure[224] = {};  // empty: this rank is fine
};

// Where the peers' records come from: the other ranks' threads or processes (over NCCL), this
// thread alone when it holds every rank (loopback), or files.
class PeerExchange {
 public:
  virtual ~PeerExchange() = default;
  // In: the records of this thread's ranks. Out: the records of all ranks, in rank order. Every
  // rank calls it equally often; returning means that every rank has called it.
  virtual xla::ffi::Error AllGather(const std::vector<PeerRecord>& mine,
                                    std::vector<PeerRecord>* all) = 0;
};

// One rank's part of a workspace.
class RankWorkspace {
 public:
  RankWorkspace(const WorkspaceSpec& spec, int rank) : spec_(spec), rank_(rank) {}
  ~RankWorkspace();
  RankWorkspace(const RankWorkspace&) = delete;
  RankWorkspace& operator=(const RankWorkspace&) = delete;

  // Each returns "" or what failed. Allocate synchronises with `stream`. Connect takes the name
  // that rank 0 proposes.
  std::string Allocate(cudaStream_t stream);
  std::string Connect(const std::vector<PeerRecord>& peers);
  // Also if the guards on both sides of the slots are no longer what they were (hazard 18).
  std::string CheckGuards() const;

  const WorkspaceSpec& spec() const { return spec_; }
  int rank() const { return rank_; }
  int64_t name() const { return name_; }  // the same on all ranks that share it, and on no other
  int device() const { return device_; }
  char* base() const { return base_; }
  const Peers& peers() const { return peers_; }

 private:
  WorkspaceSpec spec_;
  int rank_;
  int device_ = -1;
  int64_t name_ = 0;
  char* base_ = nullptr;
  Peers peers_ = {};
};

// The parts of the ranks that one device holds: one of a mesh, all in loopback.
using Workspace = std::vector<std::unique_ptr<RankWorkspace>>;

// What all ranks agreed on for a call.
struct Agreement {
  Workspace created;  // empty if `existing` is what all ranks share
  int resident_ctas;  // the fewest on any rank: all must launch grids of one size
};

// Agrees with the peers on the workspace for a call, before any rank launches. `existing` is what
// this device has already, or nullptr. Unless all ranks have one and the same, the parts of `ranks`
// are allocated, filled and connected here. Whatever fails on one rank is the same error on all.
// Synchronises; must not run while capturing.
xla::ffi::ErrorOr<Agreement> Agree(const WorkspaceSpec& spec, const CallShape& call,
                                   const std::vector<int>& ranks, const Workspace* existing,
                                   PeerExchange& exchange);

}  // namespace jax_gemma_arf
