#include "loopback.h"

#include <cuda_runtime_api.h>

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "agreement.h"
#include "call.h"
#include "errors.h"
#include "file_exchange.h"
#include "launches.h"
#include "ready.h"
#include "workspace.h"

namespace jax_gemma_arf {
namespace {

// The attributes of the loopback target (loopback.py).
struct LoopbackAttributes : CallAttributes {
  xla::ffi::Span<const int64_t> local_ranks;
  std::string_view rendezvous;
  int64_t absent_rank;
};

}  // namespace
}  // namespace jax_gemma_arf

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_gemma_arf::LoopbackAttributes,
                                      JAX_GEMMA_ARF_CALL_ATTRIBUTES,
                                      StructMember<Span<const int64_t>>("local_ranks"),
                                      StructMember<std::string_view>("rendezvous"),
                                      StructMember<int64_t>("absent_rank"));

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::Error;
using ffi::ErrorOr;

struct LoopbackCall : CallState {
  static ffi::TypeId id;

  using CallState::CallState;

  std::vector<int> local_ranks;  // the ranks that this process holds
  std::string rendezvous;        // directory of ranks in several processes; "": all are here
  int absent_rank = -1;          // this rank is not launched, for tests; -1: none
};

ffi::TypeId LoopbackCall::id = {};

ErrorOr<std::unique_ptr<LoopbackCall>> InstantiateLoopback(LoopbackAttributes attributes) {
  ErrorOr<Call> call = CallOf(attributes);
  if (call.has_error()) return call.error();
  const int64_t axis_size = attributes.axis_size;
  const auto& local_ranks = attributes.local_ranks;
  int64_t previous = -1;
  for (const int64_t rank : local_ranks) {
    if (rank <= previous || rank >= axis_size) {
      return Invalid("local_ranks must rise from 0 to at most " + std::to_string(axis_size - 1) +
                     ", got " + std::to_string(rank) + " after " + std::to_string(previous));
    }
    previous = rank;
  }
  if (attributes.absent_rank < -1 || attributes.absent_rank >= axis_size) {
    return Invalid("absent_rank must be -1 or from 0 to " + std::to_string(axis_size - 1) +
                   ", got " + std::to_string(attributes.absent_rank));
  }
  if (local_ranks.size() == 0 ||
      (attributes.rendezvous.empty() && static_cast<int64_t>(local_ranks.size()) != axis_size)) {
    return Invalid("without a rendezvous directory this process must hold all " +
                   std::to_string(axis_size) + " ranks, got " + std::to_string(local_ranks.size()));
  }
  auto state = std::make_unique<LoopbackCall>(*std::move(call));
  state->local_ranks.assign(local_ranks.begin(), local_ranks.end());
  state->rendezvous = std::string(attributes.rendezvous);
  state->absent_rank = static_cast<int>(attributes.absent_rank);
  return state;
}

// The streams of all ranks of a workspace but the first, forked from XLA's stream and joined to it.
struct Streams {
  std::vector<cudaStream_t> streams;
  std::vector<cudaEvent_t> joins;
  cudaEvent_t fork = nullptr;
};

cudaError_t CreateStreams(size_t count, Streams* created) {
  if (count == 0) return cudaSuccess;
  created->streams.resize(count);
  created->joins.resize(count);
  cudaError_t error = cudaEventCreateWithFlags(&created->fork, cudaEventDisableTiming);
  for (size_t i = 0; i < count && error == cudaSuccess; ++i) {
    error = cudaStreamCreateWithFlags(&created->streams[i], cudaStreamNonBlocking);
    if (error == cudaSuccess) {
      error = cudaEventCreateWithFlags(&created->joins[i], cudaEventDisableTiming);
    }
  }
  return error;
}

// The streams of every workspace, which live as long as the workspace: until the process ends.
class StreamsByWorkspace {
 public:
  static StreamsByWorkspace& Get() {
    static auto* const all = new StreamsByWorkspace();
    return *all;
  }
  cudaError_t CreateOnce(const Workspace* workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (streams_.count(workspace) != 0) return cudaSuccess;
    Streams created;
    const cudaError_t error = CreateStreams(workspace->size() - 1, &created);
    if (error == cudaSuccess) streams_[workspace] = std::move(created);
    return error;
  }
  const Streams& Of(const Workspace* workspace) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return streams_.at(workspace);
  }

 private:
  std::mutex mutex_;
  std::map<const Workspace*, Streams> streams_;
};

// All ranks are this thread's, so their records are all there are.
class LoopbackExchange : public PeerExchange {
 public:
  Error AllGather(const std::vector<PeerRecord>& mine, std::vector<PeerRecord>* all) override {
    *all = mine;
    return Error::Success();
  }
};

ErrorOr<Ready> MakeLoopbackReady(const LoopbackCall& state, int32_t device,
                                 const ffi::RemainingArgs& args) {
  const Call& call = state.call();
  if (state.rendezvous.empty()) {
    LoopbackExchange exchange;
    return MakeReady(call, device, nullptr, args, state.local_ranks, exchange);
  }
  // The directory stands for the communicator: its name's address tells groups apart.
  static std::set<std::string> directories;  // guarded by InitializeLoopback's lock
  const std::string& directory = *directories.insert(state.rendezvous).first;
  FileExchange exchange(directory, state.local_ranks, call.nranks);
  return MakeReady(call, device, const_cast<std::string*>(&directory), args, state.local_ranks,
                   exchange);
}

Error InitializeLoopback(int32_t device, LoopbackCall* state, ffi::RemainingArgs args) {
  // No communicator orders two threads here, and only one may create.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (state->FindReady(device) != nullptr) return Error::Success();
  ErrorOr<Ready> ready = MakeLoopbackReady(*state, device, args);
  if (ready.has_error()) return ready.error();
  if (const std::string failure = Describe(StreamsByWorkspace::Get().CreateOnce(ready->workspace),
                                           "creating streams and events");
      !failure.empty()) {
    return Internal(failure);
  }
  state->SetReady(device, *ready);
  return Error::Success();
}

Error ExecuteLoopback(cudaStream_t stream, int32_t device, LoopbackCall* state,
                      ffi::RemainingArgs args, ffi::RemainingRets rets) {
  const Ready* ready = state->FindReady(device);
  if (ready == nullptr) return NotReady("Execute", device);
  ErrorOr<std::vector<Launch>> launches = LaunchesOf(state->call(), *ready, args, rets);
  if (launches.has_error()) return launches.error();
  const Streams& others = StreamsByWorkspace::Get().Of(ready->workspace);
  const size_t ranks = launches->size();
  cudaError_t error = cudaSuccess;
  if (ranks > 1) error = cudaEventRecord(others.fork, stream);
  for (size_t i = 0; i < ranks && error == cudaSuccess; ++i) {
    const Launch& launch = (*launches)[i];
    const cudaStream_t own = i == 0 ? stream : others.streams[i - 1];
    if (i > 0) error = cudaStreamWaitEvent(own, others.fork);
    if (error == cudaSuccess && launch.rank != state->absent_rank) {
      error = EnqueueAndCount(launch, /*may_overlap=*/i == 0, own);  // others follow an event
    }
    if (error == cudaSuccess && i > 0) error = cudaEventRecord(others.joins[i - 1], own);
  }
  for (size_t i = 1; i < ranks && error == cudaSuccess; ++i) {
    error = cudaStreamWaitEvent(stream, others.joins[i - 1]);
  }
  return error == cudaSuccess ? Error::Success() : LaunchError(error, launches->front());
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, InstantiateLoopback,
                       ffi::Ffi::BindInstantiate().Attrs<LoopbackAttributes>());

XLA_FFI_DEFINE_HANDLER(kInitialize, InitializeLoopback,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<LoopbackCall>>()
                           .RemainingArgs());

XLA_FFI_DEFINE_HANDLER(kExecute, ExecuteLoopback,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<LoopbackCall>>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

Target LoopbackTarget() {
  return {kImplementation.loopback_target, kInstantiate, nullptr, kInitialize, kExecute};
}

StateType LoopbackStateType() {
  static const ffi::TypeInfo info = ffi::MakeTypeInfo<LoopbackCall>();
  return {kImplementation.loopback_call_type, &LoopbackCall::id, &info};
}

}  // namespace jax_gemma_arf
