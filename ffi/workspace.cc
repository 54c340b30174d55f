#include "workspace.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <utility>

#include "errors.h"
#include "launch_shape.h"
#include "watchdog.h"

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

constexpr int64_t kAlignment = 256;
constexpr int64_t kSmallestCapacity = int64_t{64} << 10;
constexpr int kGuardByte = 0xa5;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Tells processes apart.
int64_t ProcessToken() {
  static const int64_t token = [] {
    std::random_device random;
    return static_cast<int64_t>(random()) << 32 | random();
  }();
  return token;
}

int64_t ProposeName() {
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
                    " (CUDA device " + std::to_string(record.device) + "): " + failure);
  }
  return Error::Success();
}

// The facts of the current device that the peers must know.
std::string FillFacts(const CallShape& call, PeerRecord* record) {
  record->process = ProcessToken();
  record->call = call;
  CopyText(record->version, JAX_GEMMA_ARF_VERSION);
  std::string failure = Describe(cudaGetDevice(&record->device), "cudaGetDevice");
  if (failure.empty()) {
    failure = Describe(cudaDeviceGetAttribute(&record->multiprocessors,
                                              cudaDevAttrMultiProcessorCount, record->device),
                       "cudaDeviceGetAttribute");
  }
  if (failure.empty()) failure = Describe(Preload(), "loading the kernels");
  if (failure.empty()) {
    failure =
        Describe(ResidentCtas(call.kind, call.hidden, call.next_norms, &record->resident_ctas),
                 "asking for the kernel's occupancy");
  }
  return failure;
}

}  // namespace

bool CallShape::operator==(const CallShape& other) const {
  const auto all = [](const CallShape& call) {
    return std::make_tuple(call.kind.algorithm, call.kind.dtype, call.kind.nranks,
                           call.kind.branches, call.tokens, call.hidden, call.next_norms,
                           call.out_dtype);
  };
  return all(*this) == all(other);
}

std::string CallShape::Describe() const {
  const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  return std::string(Name(kind.algorithm)) + ", " + std::to_string(kind.branches) + " x [" +
         std::to_string(tokens) + ", " + std::to_string(hidden) + "] " +
         dtypes[static_cast<int>(kind.dtype)] + " over " + std::to_string(kind.nranks) +
         " ranks, " + std::to_string(next_norms) + " next norms, to " +
         dtypes[static_cast<int>(out_dtype)];
}

int64_t CapacityFor(const CallShape& call) {
  const KernelKind& kind = call.kind;
  const bool one_shot = kind.algorithm == Algorithm::kOneShot;
  const int64_t groups = (int64_t{call.tokens} + kind.nranks - 1) / kind.nranks;
  const int64_t rows = kind.branches * (one_shot ? call.tokens : groups * kind.nranks);
  return std::max(rows * call.hidden * ItemSize(kind.dtype),
                  one_shot ? 0 : int64_t{call.tokens} * call.hidden * ItemSize(call.out_dtype));
}

WorkspaceSpec::WorkspaceSpec(const KernelKind& kind, int64_t least_capacity)
    : SlotSpec{kind.algorithm, kind.nranks, kSmallestCapacity,
               kImplementation.slots_by_item_size ? ItemSize(kind.dtype) : 0} {
  while (capacity < least_capacity) capacity *= 2;
}

WorkspaceLayout::WorkspaceLayout(const WorkspaceSpec& spec) {
  front_guard = Align(sizeof(Control));
  slots = front_guard + Align(kGuardBytes);
  back_guard = slots + Align(SlotBytes(spec));
  total = back_guard + Align(kGuardBytes);
}

RankWorkspace::~RankWorkspace() { (void)cudaFree(base_); }

std::string RankWorkspace::Allocate(cudaStream_t stream) {
  const WorkspaceLayout layout(spec_);
  std::string failure = Describe(cudaGetDevice(&device_), "cudaGetDevice");
  if (failure.empty()) {
    failure = Describe(cudaMalloc(reinterpret_cast<void**>(&base_), layout.total),
                       "no " + std::to_string(layout.total) +
                           " bytes of device memory outside JAX's own pool (lower "
                           "XLA_PYTHON_CLIENT_MEM_FRACTION, or call jax_gemma_arf.reserve at "
                           "start-up)");
  }
  if (!failure.empty()) return failure;
  cudaError_t error = cudaMemsetAsync(base_, 0, layout.front_guard, stream);
  for (const int64_t guard : {layout.front_guard, layout.back_guard}) {
    if (error == cudaSuccess) {
      error = cudaMemsetAsync(base_ + guard, kGuardByte, kGuardBytes, stream);
    }
  }
  if (error == cudaSuccess) error = FillSlots(spec_, base_ + layout.slots, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  return Describe(error, "initialising the workspace");
}

std::string RankWorkspace::Connect(const std::vector<PeerRecord>& peers) {
  const WorkspaceLayout layout(spec_);
  const PeerRecord& mine = peers[rank_];
  for (int r = 0; r < spec_.nranks; ++r) {
    const PeerRecord& peer = peers[r];
    void* base = peer.base;
    if (peer.process != mine.process) {
      const std::string failure = Describe(
          cudaIpcOpenMemHandle(&base, peer.handle, cudaIpcMemLazyEnablePeerAccess),
          "mapping the memory of rank " + std::to_string(r) + ", which is in another process");
      if (!failure.empty()) return failure;
    } else if (peer.device != mine.device) {
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer.device, 0);
      if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) {
        return Describe(error, "no peer access to CUDA device " + std::to_string(peer.device));
      }
      (void)cudaGetLastError();
    }
    peers_.slots[r] = static_cast<char*>(base) + layout.slots;
  }
  if (const std::string failure =
          Describe(ConnectSlots(spec_, rank_, peers_.slots), "connecting the slots");
      !failure.empty()) {
    return failure;
  }
  name_ = peers[0].workspace;
  peers_.capacity = spec_.capacity;
  peers_.control = reinterpret_cast<Control*>(base_ + layout.control);
  return NewFailureWord("CUDA device " + std::to_string(device_), &peers_.failure);
}

std::string RankWorkspace::CheckGuards() const {
  const WorkspaceLayout layout(spec_);
  for (const int64_t guard : {layout.front_guard, layout.back_guard}) {
    unsigned char bytes[kGuardBytes];
    const std::string failure =
        Describe(cudaMemcpy(bytes, base_ + guard, kGuardBytes, cudaMemcpyDeviceToHost),
                 "reading the guard words");
    if (!failure.empty()) return failure;
    if (std::any_of(bytes, bytes + kGuardBytes, [](int byte) { return byte != kGuardByte; })) {
      return "something wrote over the guard words " +
             std::string(guard == layout.front_guard ? "before" : "behind") + " the slots";
    }
  }
  return "";
}

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
  const auto keep_for_ever = [&] {
    for (auto& part : created) (void)part.release();
  };

  for (PeerRecord& record : mine) {
    if (existing != nullptr) record.workspace = existing->front()->name();
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
    return record.workspace != 0 && record.workspace == all[0].workspace;
  });
  if (shared) return agreement;

  for (size_t i = 0; i < ranks.size(); ++i) {
    created.push_back(std::make_unique<RankWorkspace>(spec, ranks[i]));
    CopyText(mine[i].failure, created[i]->Allocate(stream));
    mine[i].workspace = ProposeName();
    mine[i].base = created[i]->base();
    // Not to be had everywhere; only ranks in other processes need it, and they will say so.
    if (cudaIpcGetMemHandle(&mine[i].handle, mine[i].base) != cudaSuccess) {
      (void)cudaGetLastError();
    }
  }
  if (Error error = exchange.AllGather(mine, &all); error.failure()) {
    keep_for_ever();
    return error;
  }
  if (Error error = Vote(all); error.failure()) return error;

  for (size_t i = 0; i < ranks.size(); ++i) CopyText(mine[i].failure, created[i]->Connect(all));
  Error error = exchange.AllGather(mine, &all);
  if (error.success()) error = Vote(all);
  if (error.failure()) {
    keep_for_ever();
    return error;
  }
  return agreement;
}

}  // namespace jax_gemma_arf
