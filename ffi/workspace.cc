#include "workspace.h"

#include <algorithm>
#include <string>

#include "errors.h"
#include "watchdog.h"

namespace jax_gemma_arf {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kSmallestCapacity = int64_t{64} << 10;
constexpr int kGuardByte = 0xa5;

int64_t Align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

int64_t CapacityFor(const CallShape& call) {
  const KernelKind& kind = call.kind;
  const bool one_shot = kind.algorithm == Algorithm::kOneShot;
  const int64_t stripes = (int64_t{call.tokens} + kind.nranks - 1) / kind.nranks;
  const int64_t rows = kind.branches * (one_shot ? call.tokens : stripes * kind.nranks);
  return std::max(rows * call.width * ItemSize(kind.dtype),
                  one_shot ? 0 : int64_t{call.tokens} * call.width * ItemSize(call.out_dtype));
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

std::string RankWorkspace::Connect(const std::vector<PartAddress>& parts, int64_t id) {
  const WorkspaceLayout layout(spec_);
  const PartAddress& mine = parts[rank_];
  for (int r = 0; r < spec_.nranks; ++r) {
    const PartAddress& peer = parts[r];
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
  id_ = id;
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

}  // namespace jax_gemma_arf
