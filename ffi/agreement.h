// Agreement between the ranks of a replica group on the workspace of a call, by a vote: whatever
// fails on one rank is the same error on all.
#pragma once

#include <cstdint>
#include <vector>

#include "call.h"
#include "workspace.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

// What a rank tells its peers, and its vote on whether to go on.
struct PeerRecord {
  PartAddress part;
  int32_t multiprocessors = 0;
  int32_t resident_ctas = 0;  // how many blocks of the call's kernel its device holds at once
  int64_t workspace_id = 0;   // of the one that it has, or proposed for a new one; 0: none
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

// What all ranks agreed on for a call.
struct Agreement {
  Workspace created;  // empty if `existing` is what all ranks share
  int resident_ctas;  // the fewest on any rank: all must launch grids of one size
};

// Agrees with the peers on the workspace for a call, before any rank launches. `existing` is what
// this device has already, or nullptr. Unless all ranks have one and the same, the parts of `ranks`
// are allocated, filled and connected here. Synchronises; must not run while capturing.
xla::ffi::ErrorOr<Agreement> Agree(const WorkspaceSpec& spec, const CallShape& call,
                                   const std::vector<int>& ranks, const Workspace* existing,
                                   PeerExchange& exchange);

}  // namespace jax_gemma_arf
