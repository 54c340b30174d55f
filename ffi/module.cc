// The Python face of the compiled part: handlers to register, and what this machine's GPUs can do.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "call_limits.h"
#include "handler.h"
#include "launches.h"
#include "registry.h"
#include "watchdog.h"
#include "workspace.h"

namespace nb = nanobind;

namespace jax_gemma_arf {
namespace {

template <typename Pointer>
nb::capsule Capsule(Pointer* pointer) {
  return nb::capsule(reinterpret_cast<const void*>(pointer));
}

nb::dict Registrations() {
  nb::dict targets;
  for (const Target& target : Targets()) {
    nb::dict stages;
    const std::pair<const char*, XLA_FFI_Handler*> all[] = {{"instantiate", target.instantiate},
                                                            {"prepare", target.prepare},
                                                            {"initialize", target.initialize},
                                                            {"execute", target.execute}};
    for (const auto& [stage, handler] : all) {
      if (handler != nullptr) stages[stage] = Capsule(handler);
    }
    targets[target.name] = stages;
  }
  return targets;
}

nb::dict TypeRegistrations() {
  nb::dict types;
  for (const StateType& state : StateTypes()) {
    nb::dict type;
    type["type_id"] = Capsule(state.id);
    type["type_info"] = Capsule(state.info);
    types[state.name] = type;
  }
  return types;
}

nb::dict Limits() {
  nb::list axis_sizes;
  for (const int count : kRankCounts) axis_sizes.append(count);
  nb::dict limits;
  limits["axis_sizes"] = nb::tuple(axis_sizes);
  limits["width_multiple"] = kWidthMultiple;
  limits["min_width"] = kMinWidth;
  limits["max_width"] = kMaxWidth;
  limits["max_next_norms"] = kMaxNextNorms;
  limits["max_message_bytes"] = kMaxMessageBytes;
  limits["max_one_shot_bytes"] = kMaxOneShotBytes;
  return limits;
}

// [i][j]: whether device i reaches device j's memory over NVLink. PCIe peers have no native
// atomics.
std::vector<std::vector<bool>> NvlinkPeers() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) count = 0;
  (void)cudaGetLastError();
  std::vector<std::vector<bool>> peers(count, std::vector<bool>(count, true));
  for (int i = 0; i < count; ++i) {
    for (int j = 0; j < count; ++j) {
      if (i == j) continue;
      int access = 0, atomics = 0;
      const bool known =
          cudaDeviceGetP2PAttribute(&access, cudaDevP2PAttrAccessSupported, i, j) == cudaSuccess &&
          cudaDeviceGetP2PAttribute(&atomics, cudaDevP2PAttrNativeAtomicSupported, i, j) ==
              cudaSuccess;
      peers[i][j] = known && access != 0 && atomics != 0;
    }
  }
  return peers;
}

// Maps memory of other processes of this host, as RankWorkspace::Connect will. gather(bytes) sends
// bytes to every process of the job and returns what the others of this host sent. All processes
// call it twice, whatever fails: to exchange handles, and to keep the memory until all have mapped
// it. Returns the first CUDA error, or 0.
int TryIpc(int device, const nb::callable& gather) {
  int current = 0;
  void* base = nullptr;
  cudaIpcMemHandle_t mine = {};
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMalloc(&base, sizeof(mine));
  if (error == cudaSuccess) error = cudaIpcGetMemHandle(&mine, base);
  const nb::bytes message(&mine, sizeof(mine));
  for (const nb::handle& sent : gather(message)) {
    const auto bytes = nb::cast<nb::bytes>(sent);
    cudaIpcMemHandle_t peer = {};
    std::memcpy(&peer, bytes.data(), sizeof(peer));
    void* mapped = nullptr;
    if (error == cudaSuccess) {
      error = cudaIpcOpenMemHandle(&mapped, peer, cudaIpcMemLazyEnablePeerAccess);
    }
    if (mapped != nullptr) error = cudaIpcCloseMemHandle(mapped);
  }
  gather(message);
  if (base != nullptr) cudaFree(base);
  cudaSetDevice(current);
  (void)cudaGetLastError();
  return error;
}

int64_t WorkspaceBytes(bool one_shot, int nranks, int64_t message_bytes) {
  const KernelKind kind{one_shot ? Algorithm::kOneShot : Algorithm::kTwoShot, Dtype::kBFloat16,
                        nranks, 1};
  return WorkspaceLayout(WorkspaceSpec(kind, message_bytes)).total;
}

nb::list Workspaces() {
  nb::list all;
  std::vector<WorkspaceReport> reports;
  {
    const nb::gil_scoped_release release;  // it waits for device memory
    reports = ReportWorkspaces();
  }
  for (const WorkspaceReport& report : reports) {
    nb::dict one;
    one["device"] = report.device;
    one["rank"] = report.rank;
    one["nranks"] = report.nranks;
    one["algorithm"] = report.algorithm;
    one["capacity"] = report.capacity;
    one["bytes"] = report.bytes;
    one["base"] = report.base;
    one["damage"] = report.damage;
    all.append(one);
  }
  return all;
}

}  // namespace
}  // namespace jax_gemma_arf

NB_MODULE(JAX_GEMMA_ARF_MODULE, module) {
  using namespace jax_gemma_arf;
  module.attr("__version__") = JAX_GEMMA_ARF_VERSION;
#ifdef JAX_GEMMA_ARF_FLASHINFER_VERSION
  module.attr("flashinfer_version") = JAX_GEMMA_ARF_FLASHINFER_VERSION;
#endif
  module.def("limits", &Limits, "The limits of a call that the handlers check, by name.");
  module.def("registrations", &Registrations,
             "Custom call targets: {name: {stage: capsule}}, for jax.ffi.register_ffi_target.");
  module.def("type_registrations", &TypeRegistrations,
             "FFI types: {name: {type_id, type_info}}, for jax.ffi.register_ffi_type.");
  module.def("set_record", &SetRecord, nb::arg("enabled"),
             "Whether launches are programmatic and recorded; to be set before registration.");
  module.def("mesh_stages", &MeshStages,
             "Stages that the mesh target is registered with; none before a runtime has asked.");
  module.def("nvlink_peers", &NvlinkPeers,
             "Matrix over CUDA devices: whether one reaches the other's memory over NVLink.");
  module.def("try_ipc", &TryIpc, nb::arg("device"), nb::arg("gather"),
             "CUDA error of mapping memory of the host's other processes, or 0.");
  module.def("enqueued_launches", &EnqueuedLaunches,
             "Launches enqueued, captured or recorded so far; a replayed CUDA graph adds none.");
  module.def("recorded_launches", &RecordedLaunches,
             "Of these, launches recorded: put into a CUDA graph as a node, or updated there.");
  module.def("workspace_bytes", &WorkspaceBytes, nb::arg("one_shot"), nb::arg("nranks"),
             nb::arg("message_bytes"),
             "Device memory that one rank's workspace takes for messages of this many bytes.");
  module.def("workspaces", &Workspaces,
             "Every rank's part of a workspace in this process; reads the guard words.");
  module.def("set_timeout", &SetTimeout, nb::arg("seconds"),
             "How long kernels enqueued from now on wait for a peer; 0: no bound.");
}
