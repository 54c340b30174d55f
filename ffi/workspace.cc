#include "workspace.h"

#include <unistd.h>

#include <cstring>

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

constexpr int64_t kAlignment = 256;
constexpr int64_t kSmallestCapacity = int64_t{64} << 10;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// "" or what failed, for a record. Clears CUDA's sticky last error: it is reported here.
std::string Describe(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();
  return what + ": " + cudaGetErrorString(error);
}

// The error that every rank returns if any rank failed.
Error Vote(const std::vector<PeerRecord>& records) {
  for (size_t rank = 0; rank < records.size(); ++rank) {
    if (records[rank].failure[0] == '\0') continue;
    return Error::Internal(
        "jax_gemma_arf: the workspace of this replica group could not be created: "
        "rank " +
        std::to_string(rank) + " of " + std::to_string(records.size()) + " (CUDA device " +
        std::to_string(records[rank].device) + "): " + records[rank].failure);
  }
  return Error::Success();
}

void SetFailure(PeerRecord& record, const std::string& failure) {
  std::strncpy(record.failure, failure.c_str(), sizeof(record.failure) - 1);
}

}  // namespace

ErrorOr<WorkspaceSpec> WorkspaceSpec::For(const KernelKind& kind, int64_t message_bytes) {
  WorkspaceSpec spec{kind.algorithm, kind.nranks, ItemSize(kind.dtype), kSmallestCapacity};
  while (spec.capacity_bytes < message_bytes) spec.capacity_bytes *= 2;
  const bool one_shot = kind.algorithm == Algorithm::kOneShot;
  if (spec.capacity_bytes > kMaxMessageBytes ||
      (one_shot && spec.capacity_bytes * spec.nranks > kMaxLamportBytes)) {
    return Error::InvalidArgument(
        "jax_gemma_arf: a message of " + std::to_string(message_bytes) + " bytes over " +
        std::to_string(spec.nranks) + " ranks is above the cap of " +
        std::to_string(one_shot ? kMaxLamportBytes / spec.nranks : kMaxMessageBytes) +
        " bytes for " + (one_shot ? "one-shot" : "two-shot") + "; use fewer tokens per call");
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

std::string RankWorkspace::Allocate(cudaStream_t stream, PeerRecord* record) {
  const WorkspaceLayout layout(spec_);
  record->process = getpid();
  std::string failure = Describe(cudaGetDevice(&record->device), "cudaGetDevice");
  if (failure.empty()) {
    failure = Describe(cudaDeviceGetAttribute(&record->multiprocessors,
                                              cudaDevAttrMultiProcessorCount, record->device),
                       "cudaDeviceGetAttribute");
  }
  if (failure.empty()) {
    failure = Describe(cudaMalloc(reinterpret_cast<void**>(&base_), layout.total),
                       "no " + std::to_string(layout.total) +
                           " bytes of device memory outside JAX's own pool (lower "
                           "XLA_PYTHON_CLIENT_MEM_FRACTION)");
  }
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    if (failure.empty()) failure = Describe(Preload(dtype), "loading the kernels");
  }
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
  if (failure.empty())
    failure = Describe(cudaStreamSynchronize(stream), "initialising the workspace");
  record->base = base_;
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
    if (peer.multiprocessors != mine.multiprocessors) {  // grids must have the same size
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
  if (failure.empty())
    failure = Describe(cudaStreamSynchronize(stream), "connecting the workspace");
  return failure;
}

ErrorOr<std::vector<std::unique_ptr<RankWorkspace>>> CreateWorkspace(const WorkspaceSpec& spec,
                                                                     const std::vector<int>& ranks,
                                                                     PeerExchange& exchange) {
  std::vector<std::unique_ptr<RankWorkspace>> parts;
  std::vector<PeerRecord> mine(ranks.size()), all;

  // A stream that does not wait for the legacy default stream, on which others may be working.
  cudaStream_t stream = nullptr;
  const std::string no_stream = Describe(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking),
                                         "cudaStreamCreateWithFlags");
  const std::unique_ptr<CUstream_st, decltype(&cudaStreamDestroy)> stream_owner(stream,
                                                                                &cudaStreamDestroy);

  for (size_t i = 0; i < ranks.size(); ++i) {
    parts.push_back(std::unique_ptr<RankWorkspace>(new RankWorkspace(spec, ranks[i])));
    SetFailure(mine[i], no_stream.empty() ? parts[i]->Allocate(stream, &mine[i]) : no_stream);
  }
  if (Error error = exchange.AllGather(mine, &all); error.failure()) return error;
  if (Error error = Vote(all); error.failure()) return error;

  for (size_t i = 0; i < ranks.size(); ++i) SetFailure(mine[i], parts[i]->Connect(stream, all));
  if (Error error = exchange.AllGather(mine, &all); error.failure()) return error;
  if (Error error = Vote(all); error.failure()) return error;
  return parts;
}

}  // namespace jax_gemma_arf
