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
  int item_size;  // 2 or 4: the -0.0 that fills a Lamport buffer depends on it
  int64_t
      capacity_bytes;  // of one message; a power of two, so that few workspaces serve many sizes

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

// What a rank tells its peers, and its vote on whether creation may go on.
struct PeerRecord {
  int64_t process = 0;
  void* base = nullptr;
  int32_t device = -1;
  int32_t multiprocessors = 0;
  char failure[232] = {};  // empty: this rank is fine
};

// Where the peers' records come from: other threads and, later, other processes (NCCL), or this
// thread alone when it holds every rank (loopback).
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
  ~RankWorkspace();
  RankWorkspace(const RankWorkspace&) = delete;
  RankWorkspace& operator=(const RankWorkspace&) = delete;

  const WorkspaceSpec& spec() const { return spec_; }
  int rank() const { return rank_; }
  void** table() const { return reinterpret_cast<void**>(base_ + WorkspaceLayout(spec_).table); }

 private:
  friend xla::ffi::ErrorOr<std::vector<std::unique_ptr<RankWorkspace>>> CreateWorkspace(
      const WorkspaceSpec&, const std::vector<int>&, PeerExchange&);
  RankWorkspace(const WorkspaceSpec& spec, int rank) : spec_(spec), rank_(rank) {}
  std::string Allocate(cudaStream_t stream, PeerRecord* record);
  std::string Connect(cudaStream_t stream, const std::vector<PeerRecord>& peers);

  WorkspaceSpec spec_;
  int rank_;
  char* base_ = nullptr;
};

// Creates the parts of `ranks` on the current device. Allocation, mapping and loading all happen
// here, and all ranks agree on the outcome before any of them can launch: if one fails, every rank
// returns the error of the lowest failing one. Synchronises; must not run while capturing.
xla::ffi::ErrorOr<std::vector<std::unique_ptr<RankWorkspace>>> CreateWorkspace(
    const WorkspaceSpec& spec, const std::vector<int>& ranks, PeerExchange& exchange);

}  // namespace jax_gemma_arf
