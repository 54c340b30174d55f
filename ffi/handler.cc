// The XLA FFI stages of the mesh target. Instantiate reads the attributes. Prepare asks XLA for the
// replica group's communicator, whose acquisition lines the ranks up. Initialize, which XLA calls
// at every run, finds the workspace, and creates it at the first. Execute enqueues the kernel: it
// neither allocates nor synchronises, and all state between calls is on the device. Record puts the
// kernel into a CUDA graph, as a node.
#include "handler.h"

#include <cuda_runtime_api.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "call.h"
#include "errors.h"
#include "kernels.h"
#include "launch_shape.h"
#include "launches.h"
#include "loopback.h"
#include "nccl_exchange.h"
#include "ready.h"
#include "xla/ffi/api/collectives_api.h"
#include "xla/ffi/api/record_api.h"

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::Error;
using ffi::ErrorOr;

struct MeshCall : CallState {
  static ffi::TypeId id;

  using CallState::CallState;
};

ffi::TypeId MeshCall::id = {};

ErrorOr<std::unique_ptr<MeshCall>> InstantiateMesh(CallAttributes attributes) {
  ErrorOr<Call> call = CallOf(attributes);
  if (call.has_error()) return call.error();
  return std::make_unique<MeshCall>(*std::move(call));
}

// The external flavour of XLA's collectives extension. The struct only ever grows at its end.
using CommunicatorContext = ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy>;
struct Collectives : ffi::internal::CollectivesExtensionBase<CommunicatorContext> {
  static bool Support(int32_t major, int32_t minor) { return major == 0 && minor >= 1; }
};

// XLA's default communicator for a group, which its own collectives use too.
constexpr int64_t kCommunicationId = 0;

// A request costs XLA two microseconds, and one serves all calls of a run: what another call has
// asked for in this run is not asked for again. That is kept by thread, since each device of a run
// has one: acquiring makes them wait for each other.
Error PrepareMesh(ffi::RunId run, CommunicatorContext collectives, MeshCall* state) {
  thread_local int64_t asked_in = -1;
  thread_local ReplicaGroups asked_for;
  const ReplicaGroups& groups = state->call().replica_groups;
  if (run.run_id != -1 && run.run_id == asked_in && groups == asked_for && state->HasBeenReady()) {
    return Error::Success();
  }
  Error error =
      collectives.RequestCommunicator(ffi::GroupMode::kFlattenedId, groups, kCommunicationId);
  if (error.success()) {
    asked_in = run.run_id;
    asked_for = groups;
  }
  return error;
}

Error InitializeMesh(int32_t device, CommunicatorContext collectives, MeshCall* state,
                     ffi::RemainingArgs args) {
  if (state->FindReady(device) != nullptr) return Error::Success();
  const Call& call = state->call();
  auto communicator = collectives.GetCommunicator(ffi::GroupMode::kFlattenedId, call.replica_groups,
                                                  kCommunicationId);
  if (communicator.has_error()) return communicator.error();
  auto exchange = NcclExchange::Create(*communicator);
  if (exchange.has_error()) return exchange.error();
  if ((*exchange)->size() != call.nranks) {
    return Internal("XLA's communicator has " + std::to_string((*exchange)->size()) +
                    " ranks where the replica groups have " + std::to_string(call.nranks));
  }
  ErrorOr<Ready> ready =
      MakeReady(call, device, *communicator, args, {(*exchange)->rank()}, **exchange);
  if (ready.has_error()) return ready.error();
  state->SetReady(device, *ready);
  return Error::Success();
}

Error ExecuteMesh(cudaStream_t stream, int32_t device, MeshCall* state, ffi::RemainingArgs args,
                  ffi::RemainingRets rets) {
  const Ready* ready = state->FindReady(device);
  if (ready == nullptr) return NotReady("Execute", device);
  ErrorOr<std::vector<Launch>> launches = LaunchesOf(state->call(), *ready, args, rets);
  if (launches.has_error()) return launches.error();
  const Launch& launch = launches->front();
  const cudaError_t error = EnqueueAndCount(launch, /*may_overlap=*/true, stream);
  return error == cudaSuccess ? Error::Success() : LaunchError(error, launch);
}

// XLA's record extension, in the flavour for other libraries. From version 0.2 on it also takes a
// function that is loaded already.
struct Recorder {
  ffi::internal::RecordContextBase<ffi::internal::ErrorPolicy> context;
  bool takes_functions;
};
struct Recording : ffi::internal::RecordExtensionBase<Recorder> {
  static bool Support(int32_t major, int32_t minor) { return major == 0 && minor >= 1; }
  static Recorder Create(const XLA_FFI_Api* api, const CExtension* extension) {
    return {{api, extension->record_frame}, extension->extension_base.id.minor_version >= 2};
  }
};
constexpr auto kFunctionPointer = static_cast<ffi::SourceFormat>(2);  // of version 0.2

// Called when XLA builds a CUDA graph, and again when buffers of the graph have moved. The node
// holds a copy of the launch, so a replay needs nothing of the host. A node's grid cannot change,
// and does not: it depends on the shapes alone.
Error RecordMesh(int32_t device, Recorder recorder, MeshCall* state, ffi::RemainingArgs args,
                 ffi::RemainingRets rets) {
  const Ready* ready = state->FindReady(device);
  if (ready == nullptr) return NotReady("Record", device);
  ErrorOr<std::vector<Launch>> launches = LaunchesOf(state->call(), *ready, args, rets);
  if (launches.has_error()) return launches.error();
  const Launch& launch = launches->front();
  const std::vector<ffi::KernelArg> kernel_args = {ffi::HostValue{&launch, sizeof(launch)}};

  if (recorder.context.action() == ffi::RecordAction::kUpdate) {
    Error error = recorder.context.UpdateLaunch(recorder.context.commands()[0], kernel_args);
    if (error.success()) CountRecorded();
    return error;
  }
  const Grid grid = GridOf(launch);
  XLA_FFI_LaunchDims dims = {};
  dims.grid = {grid.blocks, 1, 1};
  dims.block = {grid.threads, 1, 1};
  if (grid.cluster > 1) dims.cluster = {grid.cluster, 1, 1};
  const KernelCode& code = ready->code;
  const bool function = recorder.takes_functions;
  auto command = recorder.context.CreateLaunch(
      code.name, function ? code.function : code.image, function ? 0 : code.image_bytes,
      function ? kFunctionPointer : ffi::SourceFormat::kCubin, dims, grid.shared_bytes,
      /*uses_pdl=*/true, kernel_args);
  if (command.has_error()) return command.error();
  CountRecorded();
  return Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, InstantiateMesh,
                       ffi::Ffi::BindInstantiate().Attrs<CallAttributes>());

XLA_FFI_DEFINE_HANDLER(kPrepare, PrepareMesh,
                       ffi::Ffi::BindPrepare()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::Extension<Collectives>>()
                           .Ctx<ffi::State<MeshCall>>());

XLA_FFI_DEFINE_HANDLER(kInitialize, InitializeMesh,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::Extension<Collectives>>()
                           .Ctx<ffi::State<MeshCall>>()
                           .RemainingArgs());

XLA_FFI_DEFINE_HANDLER(kExecute, ExecuteMesh,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<MeshCall>>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kRecord, RecordMesh,
                       ffi::Ffi::BindRecord()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::Extension<Recording>>()
                           .Ctx<ffi::State<MeshCall>>()
                           .RemainingArgs()
                           .RemainingRets());

std::atomic<bool> mesh_registered{false};

// Registers the mesh target with all five stages. Python cannot: PJRT's C API, which its
// registrations pass through, has four (jaxlib 0.11.2, PJRT_Gpu_Register_Custom_Call_Args), and a
// record handler is dropped without a word. XLA's own API takes it, and XLA hands that API to every
// handler, first when it asks for the metadata of a handler that Python registers. A second call
// with the same handlers does nothing.
XLA_FFI_Error* RegisterMesh(XLA_FFI_CallFrame* frame) {
  const XLA_FFI_InternalExtension* extension = frame->extension_start;
  if (extension != nullptr && extension->type == XLA_FFI_Extension_Metadata) {
    const XLA_FFI_Handler_Bundle bundle = {kInstantiate, kPrepare, kInitialize, kExecute,
                                           RecordEnabled() ? kRecord : nullptr};
    XLA_FFI_Error* error =
        ffi::Ffi::RegisterStaticHandler(frame->api, kImplementation.mesh_target, "CUDA", bundle,
                                        /*traits=*/0);
    if (error != nullptr) return error;
    mesh_registered = true;
  }
  return kExecute(frame);  // answers with the metadata of Execute; XLA asks for nothing else
}

Target MeshTarget() {
  if (kImplementation.programmatic) {
    return {"jax_gemma_arf.register_tail", nullptr, nullptr, nullptr, RegisterMesh};
  }
  return {kImplementation.mesh_target, kInstantiate, kPrepare, kInitialize, kExecute};
}

StateType MeshStateType() {
  static const ffi::TypeInfo info = ffi::MakeTypeInfo<MeshCall>();
  return {kImplementation.mesh_call_type, &MeshCall::id, &info};
}

}  // namespace

std::vector<Target> Targets() { return {MeshTarget(), LoopbackTarget()}; }

std::vector<StateType> StateTypes() { return {MeshStateType(), LoopbackStateType()}; }

std::vector<std::string> MeshStages() {
  if (!mesh_registered) return {};
  std::vector<std::string> stages = {"instantiate", "prepare", "initialize", "execute"};
  if (RecordEnabled()) stages.push_back("record");
  return stages;
}

}  // namespace jax_gemma_arf
