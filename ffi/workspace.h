// Peer-mapped buffers that the ranks of one replica group share, and how they come to be.
//
// A workspace is created once for a (replica group, algorithm, element size, size class) and lives
// as long as the process: it never grows and is never shared between those, so pointers that a CUDA
// graph holds stay valid and no counter ever serves two kinds of kernel.
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

// The largest message (tokens * hidden * bytes per element) that a call may reduce. FlashInfer
// addresses the two-shot buffer (two messages) with int32 element indices.
inline constexpr int64_t kMaxMessageBytes = int64_t{256} << 20;
// FlashInfer keeps the bytes of one Lamport generation (one message per rank) in an int32.
inline constexpr int64_t kMaxLamportBytes = int64_t{512} << 20;

struct WorkspaceSpec {
  Algorithm algorithm;
  int nranks;
  // 2 or 4: the -0.0 that fills a Lamport buffer depends on it.
  int item_size;
  // Of one message; a power of two, so that few workspaces serve many sizes.
  int64_t capacity_bytes;

  // The size class for a message, or an error with the numbers if it is above the cap.
  static xla::ffi::ErrorOr<WorkspaceSpec> For(const KernelKind& kind, int64_t message_bytes);

  using Key = std::tuple<Algorithm, int, int, int64_t>;
  Key key() const { return {algorithm, nranks, item_size, capacity_bytes}; }
};

// Byte offsets inside one rank's allocation. The only place that computes sizes.
struct WorkspaceLayout {
  explicit WorkspaceLayout(const WorkspaceSpec& spec);

  int64_t control = 0;     // int32[5]: arrivals, barrier flag, Lamport index, its size, to clear
  int64_t flags;           // barrier flags: int32[kMaxCtas][nranks]
  int64_t data;            // two-shot: partial sums, then reduced rows; one-shot: 3 generations
  int64_t generation = 0;  // bytes of one Lamport generation; 0 for two-shot
  int64_t table;           // this rank's table of pointers, void*[3 * nranks + 1]
  int64_t total;
};

// What a rank tells its peers, and its vote on whether to go on.
struct PeerRecord {
  int64_t process = 0;  // tells processes apart, also those in containers of their own
  void* base = nullptr;
  int32_t device = -1;
  int32_t multiprocessors = 0;
  int32_t resident_ctas = 0;  // how many blocks of the call's kernel its device holds at once
  int32_t has_workspace = 0;  // from an earlier call
  char failure[224] = {};     // empty: this rank is fine
};

// Where the peers' records come from: the other ranks' threads (over NCCL), or this thread alone
// when it holds every rank (loopback).
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

  // Each returns "" or what failed, and synchronises with `stream`.
  std::string Allocate(cudaStream_t stream);
  std::string Connect(cudaStream_t stream, const std::vector<PeerRecord>& peers);

  const WorkspaceSpec& spec() const { return spec_; }
  int rank() const { return rank_; }
  char* base() const { return base_; }
  void** table() const { return reinterpret_cast<void**>(base_ + WorkspaceLayout(spec_).table); }

 private:
  WorkspaceSpec spec_;
  int rank_;
  char* base_ = nullptr;
};

// The parts of the ranks that one device holds: one of a mesh, all in loopback.
using Workspace = std::vector<std::unique_ptr<RankWorkspace>>;

// What all ranks agreed on for a call.
struct Agreement {
  Workspace created;  // empty if the workspace was there
  int resident_ctas;  // the fewest on any rank: all must launch grids of one size
};

// Agrees with the peers on the workspace for a call of `kind` with rows of `hidden` elements,
// before any rank launches. `existing` is what this device has already, or nullptr: then the parts
// of `ranks` are allocated, filled and connected here, with the kernels loaded. Whatever fails on
// one rank is the same error on all. Synchronises; must not run while capturing.
xla::ffi::ErrorOr<Agreement> Agree(const WorkspaceSpec& spec, const KernelKind& kind, int hidden,
                                   const std::vector<int>& ranks, const Workspace* existing,
                                   PeerExchange& exchange);

}  // namespace jax_gemma_arf
