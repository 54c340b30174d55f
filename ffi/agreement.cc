#include "agreement.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <random>
#include <string>

#include "errors.h"
#include "launch_shape.h"

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

// Tells processes apart.
int64_t ProcessToken() {
  static const int64_t token = [] {
    std::random_device random;
    return static_cast<int64_t>(random()) << 32 | random();
  }();
  return token;
}

int64_t ProposeId() {
  static std::atomic<int64_t> made{0};
  return ProcessToken() + ++made;
}

template <size_t kSize>
void CopyText(char (&to)[kSize], const std::string& from) {
  std::strncpy(to, from.c_str(), kSize - 1);
}

// The error that every rank returns if any rank failed, or if they are out of step.
Error Vote(const std::vector<PeerRecord>& records) {
  for (size_t rank = 0; rank < records.size(); ++rank) {
    const PeerRecord& record = records[rank];
    std::string failure = record.failure;
    if (failure.empty() && std::strcmp(record.version, records[0].version) != 0) {
      failure = std::string("its jax_gemma_arf is ") + record.version + " where rank 0's is " +
                records[0].version;
    }
    if (failure.empty() && !(record.call == records[0].call)) {
      failure = "it calls " + record.call.Describe() + " where rank 0 calls " +
                records[0].call.Describe();
    }
    if (failure.empty() && record.multiprocessors != records[0].multiprocessors) {
      failure = "it has another kind of GPU than rank 0 (" +
                std::to_string(record.multiprocessors) + " multiprocessors, not " +
                std::to_string(records[0].multiprocessors) + ")";
    }
    if (failure.empty()) continue;
    return Internal("the ranks of this replica group did not agree on a workspace: rank " +
                    std::to_string(rank) + " of " + std::to_string(records.size()) +
                    " (CUDA device " + std::to_string(record.part.device) + "): " + failure);
  }
  return Error::Success();
}

// The facts of the current device that the peers must know.
std::string FillFacts(const CallShape& call, PeerRecord* record) {
  record->part.process = ProcessToken();
  record->call = call;
  CopyText(record->version, JAX_GEMMA_ARF_VERSION);
  std::string failure = Describe(cudaGetDevice(&record->part.device), "cudaGetDevice");
  if (failure.empty()) {
    failure = Describe(cudaDeviceGetAttribute(&record->multiprocessors,
                                              cudaDevAttrMultiProcessorCount, record->part.device),
                       "cudaDeviceGetAttribute");
  }
  if (failure.empty()) failure = Describe(Preload(), "loading the kernels");
  if (failure.empty()) {
    failure = Describe(ResidentCtas(call.kind, call.width, call.next_norms, &record->resident_ctas),
                       "asking for the kernel's occupancy");
  }
  return failure;
}

}  // namespace

ErrorOr<Agreement> Agree(const WorkspaceSpec& spec, const CallShape& call,
                         const std::vector<int>& ranks, const Workspace* existing,
                         PeerExchange& exchange) {
  Agreement agreement;
  Workspace& created = agreement.created;
  std::vector<PeerRecord> mine(ranks.size()), all;

  // A stream that does not wait for the legacy default stream, on which others may be working.
  cudaStream_t stream = nullptr;
  const std::string no_stream = Describe(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                         "cudaStreamCreateWithFlags");
  const std::unique_ptr<CUstream_st, decltype(&cudaStreamDestroy)> stream_owner(stream,
                                                                                &cudaStreamDestroy);
  // Memory that a peer may have mapped is not freed, not even where creation fails.
  const auto keep_forever = [&] {
    for (auto& part : created) (void)part.release();
  };

  for (PeerRecord& record : mine) {
    if (existing != nullptr) record.workspace_id = existing->front()->id();
    const std::string failure = FillFacts(call, &record);
    CopyText(record.failure, failure.empty() ? no_stream : failure);
  }
  if (Error error = exchange.AllGather(mine, &all); error.failure()) return error;
  if (Error error = Vote(all); error.failure()) return error;
  agreement.resident_ctas = all[0].resident_ctas;
  for (const PeerRecord& record : all) {
    agreement.resident_ctas = std::min(agreement.resident_ctas, record.resident_ctas);
  }
  const bool shared = std::all_of(all.begin(), all.end(), [&](const PeerRecord& record) {
    return record.workspace_id != 0 && record.workspace_id == all[0].workspace_id;
  });
  if (shared) return agreement;

  for (size_t i = 0; i < ranks.size(); ++i) {
    created.push_back(std::make_unique<RankWorkspace>(spec, ranks[i]));
    CopyText(mine[i].failure, created[i]->Allocate(stream));
    mine[i].workspace_id = ProposeId();
    mine[i].part.base = created[i]->base();
    // Not to be had everywhere; only ranks in other processes need it, and they will say so.
    if (cudaIpcGetMemHandle(&mine[i].part.handle, mine[i].part.base) != cudaSuccess) {
      (void)cudaGetLastError();
    }
  }
  if (Error error = exchange.AllGather(mine, &all); error.failure()) {
    keep_forever();
    return error;
  }
  if (Error error = Vote(all); error.failure()) return error;

  std::vector<PartAddress> parts;
  for (const PeerRecord& record : all) parts.push_back(record.part);
  for (size_t i = 0; i < ranks.size(); ++i) {
    CopyText(mine[i].failure, created[i]->Connect(parts, all[0].workspace_id));
  }
  Error error = exchange.AllGather(mine, &all);
  if (error.success()) error = Vote(all);
  if (error.failure()) {
    keep_forever();
    return error;
  }
  return agreement;
}

}  // namespace jax_gemma_arf
