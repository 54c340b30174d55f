#include "workspace.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "errors.h"

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

constexpr int64_t kAlignment = 256;
constexpr int64_t kSmallestCapacity = int64_t{64} << 10;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t ProcessToken() {
  static const int64_t token = [] {
    std::random_device random;
    return static_cast<int64_t>(random()) << 32 | random();
  }();
  return token;
}

void SetFailure(PeerRecord& record, const std::string& failure) {
  std::strncpy(record.failure, failure.c_str(), sizeof(record.failure) - 1);
}

// The error that every rank returns if any rank failed, or if they are out of step.
Error Vote(const std::vector<PeerRecord>& records) {
  for (size_t rank = 0; rank < records.size(); ++rank) {
    const PeerRecord& record = records[rank];
    std::string failure = record.failure;
    if (failure.empty() && record.has_workspace != records[0].has_workspace) {
      failure = "it has a workspace where rank 0 has none, or the other way round";
    }
    if (failure.empty()) continue;
    return Internal("the ranks of this replica group did not agree on a workspace: rank " +
                    std::to_string(rank) + " of " + std::to_string(records.size()) +
                    " (CUDA device " + std::to_string(record.device) + "): " + failure);
  }
  return Error::Success();
}

// The facts of the current device that the peers must know.
std::string FillFacts(const KernelKind& kind, int hidden, PeerRecord* record) {
  record->process = ProcessToken();
  std::string failure = Describe(cudaGetDevice(&record->device), "cudaGetDevice");
  if (failure.empty()) {
    failure = Describe(cudaDeviceGetAttribute(&record->multiprocessors,
                                              cudaDevAttrMultiProcessorCount, record->device),
                       "cudaDeviceGetAttribute");
  }
  if (failure.empty()) failure = Describe(Preload(), "loading the kernels");
  if (failure.empty()) {
    failure = Describe(ResidentCtas(kind, hidden, &record->resident_ctas),
                       "asking for the kernel's occupancy");
  }
  return failure;
}

}  // namespace

ErrorOr<WorkspaceSpec> WorkspaceSpec::For(const KernelKind& kind, int64_t message_bytes) {
  WorkspaceSpec spec{kind.algorithm, kind.nranks, ItemSize(kind.dtype), kSmallestCapacity};
  while (spec.capacity_bytes < message_bytes) spec.capacity_bytes *= 2;
  const bool one_shot = kind.algorithm == Algorithm::kOneShot;
  if (spec.capacity_bytes > kMaxMessageBytes ||
      (one_shot && spec.capacity_bytes * spec.nranks > kMaxLamportBytes)) {
    return Invalid("a message of " + std::to_string(message_bytes) + " bytes over " +
                   std::to_string(spec.nranks) + " ranks is above the cap of " +
                   std::to_string(one_shot ? kMaxLamportBytes / spec.nranks : kMaxMessageBytes) +
                   " bytes for " + (one_shot ? "one-shot" : "two-shot") +
                   "; use fewer tokens per call");
  }
  return spec;
}

WorkspaceLayout::WorkspaceLayout(const WorkspaceSpec& spec) {
  flags = Align(5 * sizeof(int32_t));
  data = flags + Align(int64_t{kMaxCtas} * spec.nranks * sizeof(int32_t));
  if (spec.algorithm == Algorithm::kOneShot) generation = spec.nranks * spec.capacity_bytes;
  table = data + Align(generation > 0 ? 3 * generation : 2 * spec.capacity_bytes);
  total = table + Align((3 * spec.nranks + 1) * sizeof(void*));
}

RankWorkspace::~RankWorkspace() { (void)cudaFree(base_); }

std::string RankWorkspace::Allocate(cudaStream_t stream) {
  const WorkspaceLayout layout(spec_);
  std::string failure = Describe(cudaMalloc(reinterpret_cast<void**>(&base_), layout.total),
                                 "no " + std::to_string(layout.total) +
                                     " bytes of device memory outside JAX's own pool (lower "
                                     "XLA_PYTHON_CLIENT_MEM_FRACTION)");
  if (failure.empty()) {
    failure = Describe(cudaMemsetAsync(base_, 0, layout.total, stream), "cudaMemsetAsync");
  }
  if (failure.empty() && layout.generation > 0) {
    failure = Describe(
        FillNegativeZero(base_ + layout.data, 3 * layout.generation, spec_.item_size, stream),
        "filling the Lamport buffers");
    const int32_t control[5] = {0, 0, 0, static_cast<int32_t>(layout.generation), 0};
    if (failure.empty()) {
      failure = Describe(cudaMemcpyAsync(base_ + layout.control, control, sizeof(control),
                                         cudaMemcpyHostToDevice, stream),
                         "writing the control block");
    }
  }
  if (failure.empty()) {
    failure = Describe(cudaStreamSynchronize(stream), "initialising the workspace");
  }
  return failure;
}

std::string RankWorkspace::Connect(cudaStream_t stream, const std::vector<PeerRecord>& peers) {
  const WorkspaceLayout layout(spec_);
  const PeerRecord& mine = peers[rank_];
  std::vector<void*> table(3 * spec_.nranks + 1);
  for (int r = 0; r < spec_.nranks; ++r) {
    const PeerRecord& peer = peers[r];
    if (peer.process != mine.process) {
      return "rank " + std::to_string(r) +
             " is in another process; one process must hold all ranks of a replica group";
    }
    if (peer.multiprocessors != mine.multiprocessors) {
      return "rank " + std::to_string(r) + " has another kind of GPU (" +
             std::to_string(peer.multiprocessors) + " multiprocessors, not " +
             std::to_string(mine.multiprocessors) + ")";
    }
    if (peer.device != mine.device) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer.device, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError();
      } else if (error != cudaSuccess) {
        return Describe(error, "no peer access to CUDA device " + std::to_string(peer.device));
      }
    }
    char* base = static_cast<char*>(peer.base);
    table[r] = base + layout.data;
    table[spec_.nranks + r] = base + layout.flags;
    table[2 * spec_.nranks + r] = base + layout.data;
  }
  table[3 * spec_.nranks] = base_ + layout.control;
  std::string failure =
      Describe(cudaMemcpyAsync(base_ + layout.table, table.data(), table.size() * sizeof(void*),
                               cudaMemcpyHostToDevice, stream),
               "writing the pointer table");
  if (failure.empty()) {
    failure = Describe(cudaStreamSynchronize(stream), "connecting the workspace");
  }
  return failure;
}

ErrorOr<Agreement> Agree(const WorkspaceSpec& spec, const KernelKind& kind, int hidden,
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
  // Once peers know an address it must not be freed before they are known to have given it up.
  const auto exchange_records = [&]() -> Error {
    Error error = exchange.AllGather(mine, &all);
    if (error.success()) return Vote(all);
    for (auto& part : created) (void)part.release();
    return error;
  };

  for (size_t i = 0; i < ranks.size(); ++i) {
    mine[i].has_workspace = existing != nullptr;
    std::string failure = no_stream.empty() ? FillFacts(kind, hidden, &mine[i]) : no_stream;
    if (failure.empty() && existing == nullptr) {
      created.push_back(std::make_unique<RankWorkspace>(spec, ranks[i]));
      failure = created[i]->Allocate(stream);
      mine[i].base = created[i]->base();
    }
    SetFailure(mine[i], failure);
  }
  if (Error error = exchange_records(); error.failure()) return error;
  agreement.resident_ctas = all[0].resident_ctas;
  for (const PeerRecord& record : all) {
    agreement.resident_ctas = std::min(agreement.resident_ctas, record.resident_ctas);
  }
  if (existing != nullptr) return agreement;

  for (size_t i = 0; i < ranks.size(); ++i) SetFailure(mine[i], created[i]->Connect(stream, all));
  if (Error error = exchange_records(); error.failure()) return error;
  return agreement;
}

}  // namespace jax_gemma_arf
