// XLA FFI stages. Instantiate reads the attributes. Prepare asks XLA for the replica group's
// communicator, whose acquisition lines the ranks up. Initialize, which XLA calls at every run,
// finds the workspace, and creates it at the first. Execute enqueues kernels, which XLA may capture
// into a CUDA graph: it neither allocates nor synchronises, and all state between calls is on the
// device.
#include "handler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "kernels.h"
#include "nccl_exchange.h"
#include "workspace.h"
#include "xla/ffi/api/collectives_api.h"

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::AnyBuffer;
using ffi::Error;
using ffi::ErrorOr;

using Groups = std::vector<std::vector<int64_t>>;

// A workspace's parts on one device. In loopback each rank but the first has a stream of its own,
// forked from and joined to XLA's.
struct Parts {
  Workspace ranks;
  std::vector<cudaStream_t> streams;
  std::vector<cudaEvent_t> joins;
  cudaEvent_t fork = nullptr;

  // Makes the streams and events for all ranks but the first.
  cudaError_t Fork() {
    if (ranks.size() < 2) return cudaSuccess;
    streams.resize(ranks.size() - 1);
    joins.resize(ranks.size() - 1);
    cudaError_t error = cudaEventCreateWithFlags(&fork, cudaEventDisableTiming);
    for (size_t i = 0; i < streams.size() && error == cudaSuccess; ++i) {
      error = cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking);
      if (error == cudaSuccess) error = cudaEventCreateWithFlags(&joins[i], cudaEventDisableTiming);
    }
    return error;
  }
};

// Lives until the process ends: CUDA graphs and peers hold the addresses.
class Registry {
 public:
  // A communicator belongs to one rank of one replica group; loopback has none.
  using Key = std::tuple<void* /*communicator*/, int32_t /*device*/, WorkspaceSpec::Key>;

  static Registry& Get() {
    static auto* const registry = new Registry();
    return *registry;
  }
  const Parts* Find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = parts_.find(key);
    return found == parts_.end() ? nullptr : found->second.get();
  }
  const Parts* Insert(const Key& key, std::unique_ptr<Parts> parts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return parts_.emplace(key, std::move(parts)).first->second.get();
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::unique_ptr<Parts>> parts_;
};

// What one call needs on one device, once its workspace exists.
struct Ready {
  const Parts* parts;
  int max_ctas;
};

// One custom call instruction, shared by all local devices. Attributes, and what Initialize found.
struct Call {
  static ffi::TypeId id;

  Algorithm algorithm;
  int nranks;
  Groups groups;
  float eps;
  float scale_offset;
  int max_ctas;  // 0: as many as the device holds

  std::mutex mutex;
  std::map<int32_t, Ready> ready;  // by device ordinal

  const Ready* FindReady(int32_t device) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = ready.find(device);
    return found == ready.end() ? nullptr : &found->second;
  }
};

ffi::TypeId Call::id = {};

ErrorOr<std::unique_ptr<Call>> Instantiate(std::string_view algorithm, int64_t axis_size,
                                           ffi::Span<const int64_t> replica_groups, float eps,
                                           float scale_offset, int64_t max_ctas) {
  auto call = std::make_unique<Call>();
  if (algorithm == "one_shot") {
    call->algorithm = Algorithm::kOneShot;
  } else if (algorithm == "two_shot") {
    call->algorithm = Algorithm::kTwoShot;
  } else {
    return Invalid("algorithm must be one_shot or two_shot, got " + std::string(algorithm));
  }
  if (axis_size != 2 && axis_size != 4 && axis_size != 8) {
    return Invalid("axis_size must be 2, 4 or 8, got " + std::to_string(axis_size));
  }
  if (replica_groups.size() == 0 || replica_groups.size() % axis_size != 0) {
    return Invalid("replica_groups must hold whole groups of " + std::to_string(axis_size) +
                   ", got " + std::to_string(replica_groups.size()) + " ids");
  }
  if (!(eps > 0) || !std::isfinite(eps) || !std::isfinite(scale_offset)) {
    std::ostringstream numbers;
    numbers << eps << " and " << scale_offset;
    return Invalid("eps must be positive and finite and scale_offset finite, got " + numbers.str());
  }
  if (max_ctas != 0 && (max_ctas < 8 || max_ctas > kMaxCtas)) {
    return Invalid("max_ctas must be 0 or from 8 to " + std::to_string(kMaxCtas) + ", got " +
                   std::to_string(max_ctas));
  }
  call->nranks = static_cast<int>(axis_size);
  for (auto id = replica_groups.begin(); id != replica_groups.end(); id += axis_size) {
    call->groups.emplace_back(id, id + axis_size);
  }
  call->eps = eps;
  call->scale_offset = scale_offset;
  call->max_ctas = static_cast<int>(max_ctas);
  return call;
}

ErrorOr<Dtype> DtypeOf(const AnyBuffer& buffer, const char* name) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Dtype::kFloat32;
    case ffi::DataType::BF16: return Dtype::kBFloat16;
    case ffi::DataType::F16: return Dtype::kFloat16;
    default:
      return Invalid(std::string(name) + " must be bfloat16, float16 or float32, got XLA type " +
                     std::to_string(static_cast<int>(buffer.element_type())));
  }
}

ErrorOr<Operand> OperandOf(const AnyBuffer& buffer, const char* name, int64_t elements) {
  if (static_cast<int64_t>(buffer.element_count()) != elements) {
    return Invalid(std::string(name) + " must have " + std::to_string(elements) +
                   " elements, got " + std::to_string(buffer.element_count()));
  }
  ErrorOr<Dtype> dtype = DtypeOf(buffer, name);
  if (dtype.has_error()) return dtype.error();
  if (elements > 1 && reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
    return Invalid(std::string(name) + " must be aligned to 16 bytes");  // read 16 bytes at once
  }
  return Operand{buffer.untyped_data(), *dtype};
}

// Sizes and types of the partial sums of one rank.
struct Message {
  KernelKind kind;
  int tokens;
  int hidden;
  int64_t bytes;
};

// x is [tokens, hidden] for each of the `ranks` that this device holds.
ErrorOr<Message> MessageOf(const Call& call, const AnyBuffer& x, int64_t ranks) {
  ErrorOr<Dtype> dtype = DtypeOf(x, "x");
  if (dtype.has_error()) return dtype.error();
  const auto dims = x.dimensions();
  const int64_t hidden = dims.size() == 0 ? 0 : dims.back();
  const int64_t elements = static_cast<int64_t>(x.element_count());
  if (hidden % 64 != 0 || hidden < 256 || hidden > 16384) {
    return Invalid("the last dimension of x must be a multiple of 64 from 256 to 16384, got " +
                   std::to_string(hidden));
  }
  if (elements == 0 || elements % (hidden * ranks) != 0) {
    return Invalid("x must hold " + std::to_string(ranks) + " x [tokens, " +
                   std::to_string(hidden) + "], got " + std::to_string(elements) + " elements");
  }
  const int64_t bytes = elements / ranks * ItemSize(*dtype);
  if (bytes > kMaxMessageBytes) {
    return Invalid("x must have at most " + std::to_string(kMaxMessageBytes) +
                   " bytes a rank, got " + std::to_string(bytes));
  }
  return Message{{call.algorithm, *dtype, call.nranks},
                 static_cast<int>(elements / ranks / hidden),
                 static_cast<int>(hidden),
                 bytes};
}

// Agrees with the other ranks on a workspace, found or created, and remembers it for Execute.
Error MakeReady(Call& call, int32_t device, void* communicator, const AnyBuffer& x,
                const std::vector<int>& ranks, PeerExchange& exchange) {
  ErrorOr<Message> message = MessageOf(call, x, ranks.size());
  if (message.has_error()) return message.error();
  ErrorOr<WorkspaceSpec> spec = WorkspaceSpec::For(message->kind, message->bytes);
  if (spec.has_error()) return spec.error();

  const Registry::Key key(communicator, device, spec->key());
  const Parts* parts = Registry::Get().Find(key);
  ErrorOr<Agreement> agreement = Agree(*spec, message->kind, message->hidden, ranks,
                                       parts == nullptr ? nullptr : &parts->ranks, exchange);
  if (agreement.has_error()) return agreement.error();
  if (parts == nullptr) {
    auto created = std::make_unique<Parts>();
    created->ranks = std::move(agreement->created);
    if (const std::string failure = Describe(created->Fork(), "creating streams and events");
        !failure.empty()) {
      return Internal(failure);
    }
    parts = Registry::Get().Insert(key, std::move(created));
  }

  // All blocks of all ranks on a device must be resident together: they wait for each other.
  int max_ctas = std::min<int>(agreement->resident_ctas / ranks.size(), kMaxCtas);
  if (call.max_ctas > 0) max_ctas = std::min(max_ctas, call.max_ctas);
  if (max_ctas < 8) {
    return Internal("the device holds " + std::to_string(agreement->resident_ctas) +
                    " blocks of this kernel, too few for " + std::to_string(ranks.size()) +
                    " ranks of at least 8");
  }
  const std::lock_guard<std::mutex> lock(call.mutex);
  call.ready[device] = Ready{parts, max_ctas};
  return Error::Success();
}

// The external flavour of XLA's collectives extension. The struct only ever grows at its end.
using CommunicatorContext = ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy>;
struct Collectives : ffi::internal::CollectivesExtensionBase<CommunicatorContext> {
  static bool Support(int32_t major, int32_t minor) { return major == 0 && minor >= 1; }
};

// XLA's default communicator for a group, which its own collectives use too.
constexpr int64_t kCommunicationId = 0;

Error PrepareMesh(CommunicatorContext collectives, Call* call) {
  return collectives.RequestCommunicator(ffi::GroupMode::kFlattenedId, call->groups,
                                         kCommunicationId);
}

Error InitializeMesh(int32_t device, CommunicatorContext collectives, Call* call, AnyBuffer x,
                     ffi::RemainingArgs) {
  if (call->FindReady(device) != nullptr) return Error::Success();
  auto communicator =
      collectives.GetCommunicator(ffi::GroupMode::kFlattenedId, call->groups, kCommunicationId);
  if (communicator.has_error()) return communicator.error();
  auto exchange = NcclExchange::Create(*communicator);
  if (exchange.has_error()) return exchange.error();
  if ((*exchange)->size() != call->nranks) {
    return Internal("XLA's communicator has " + std::to_string((*exchange)->size()) +
                    " ranks where the replica groups have " + std::to_string(call->nranks));
  }
  return MakeReady(*call, device, *communicator, x, {(*exchange)->rank()}, **exchange);
}

// All ranks are this thread's, so their records are all there are.
class LoopbackExchange : public PeerExchange {
 public:
  Error AllGather(const std::vector<PeerRecord>& mine, std::vector<PeerRecord>* all) override {
    *all = mine;
    return Error::Success();
  }
};

Error InitializeLoopback(int32_t device, Call* call, AnyBuffer x, ffi::RemainingArgs) {
  // No communicator orders two threads here, and only one may create.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (call->FindReady(device) != nullptr) return Error::Success();
  std::vector<int> ranks(call->nranks);
  std::iota(ranks.begin(), ranks.end(), 0);
  LoopbackExchange exchange;
  return MakeReady(*call, device, nullptr, x, ranks, exchange);
}

std::atomic<int64_t> enqueued{0};

Error Execute(cudaStream_t stream, int32_t device, Call* call, AnyBuffer x, AnyBuffer residual,
              AnyBuffer norm_scale, ffi::RemainingArgs rest, ffi::Result<AnyBuffer> out) {
  const Ready* ready = call->FindReady(device);
  if (ready == nullptr) {
    return Internal("Execute before Initialize on device " + std::to_string(device));
  }
  const Parts& parts = *ready->parts;
  const int64_t ranks = parts.ranks.size();
  ErrorOr<Message> message = MessageOf(*call, x, ranks);
  if (message.has_error()) return message.error();
  const WorkspaceSpec& spec = parts.ranks[0]->spec();
  if (message->bytes > spec.capacity_bytes || ItemSize(message->kind.dtype) != spec.item_size) {
    return Internal("a message of " + std::to_string(message->bytes) +
                    " bytes does not fit its workspace of " + std::to_string(spec.capacity_bytes));
  }
  const int64_t elements = int64_t{message->tokens} * message->hidden;
  ErrorOr<Operand> x_operand = OperandOf(x, "x", elements * ranks);
  if (x_operand.has_error()) return x_operand.error();
  ErrorOr<Operand> residual_operand = OperandOf(residual, "residual", elements);
  if (residual_operand.has_error()) return residual_operand.error();
  ErrorOr<Operand> scale_operand = OperandOf(norm_scale, "norm_scale", message->hidden);
  if (scale_operand.has_error()) return scale_operand.error();
  ErrorOr<Operand> out_operand = OperandOf(*out, "the result", elements * ranks);
  if (out_operand.has_error()) return out_operand.error();
  if (out_operand->dtype != residual_operand->dtype) {
    return Invalid("the result must have residual's type");
  }
  Operand layer_scalar;
  if (rest.size() > 1) return Invalid("expected at most 4 operands");
  if (rest.size() == 1) {
    ErrorOr<AnyBuffer> buffer = rest.get<AnyBuffer>(0);
    if (buffer.has_error()) return buffer.error();
    ErrorOr<Operand> operand = OperandOf(*buffer, "layer_scalar", 1);
    if (operand.has_error()) return operand.error();
    layer_scalar = *operand;
  }

  cudaError_t error = cudaSuccess;
  if (ranks > 1) error = cudaEventRecord(parts.fork, stream);
  for (int64_t i = 0; i < ranks; ++i) {
    const RankWorkspace& workspace = *parts.ranks[i];
    const cudaStream_t own = i == 0 ? stream : parts.streams[i - 1];
    if (error == cudaSuccess && i > 0) error = cudaStreamWaitEvent(own, parts.fork);
    Launch launch{
        message->kind,
        workspace.rank(),
        message->tokens,
        message->hidden,
        ready->max_ctas,
        workspace.table(),
        static_cast<const char*>(x_operand->data) + i * message->bytes,
        {*residual_operand, *scale_operand, layer_scalar,
         static_cast<char*>(out->untyped_data()) + i * elements * ItemSize(out_operand->dtype),
         call->eps, call->scale_offset}};
    if (error == cudaSuccess) error = Enqueue(launch, own);
    if (error == cudaSuccess) enqueued.fetch_add(1, std::memory_order_relaxed);
    if (error == cudaSuccess && i > 0) error = cudaEventRecord(parts.joins[i - 1], own);
  }
  for (int64_t i = 1; i < ranks && error == cudaSuccess; ++i) {
    error = cudaStreamWaitEvent(stream, parts.joins[i - 1]);
  }
  if (error == cudaSuccess) return Error::Success();
  return Internal(Describe(error, "launching for " + std::to_string(message->tokens) +
                                      " tokens of " + std::to_string(message->hidden)));
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate()
                           .Attr<std::string_view>("algorithm")
                           .Attr<int64_t>("axis_size")
                           .Attr<ffi::Span<const int64_t>>("replica_groups")
                           .Attr<float>("eps")
                           .Attr<float>("scale_offset")
                           .Attr<int64_t>("max_ctas"));

XLA_FFI_DEFINE_HANDLER(
    kPrepareMesh, PrepareMesh,
    ffi::Ffi::BindPrepare().Ctx<ffi::Extension<Collectives>>().Ctx<ffi::State<Call>>());

XLA_FFI_DEFINE_HANDLER(kInitializeMesh, InitializeMesh,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::Extension<Collectives>>()
                           .Ctx<ffi::State<Call>>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs());

XLA_FFI_DEFINE_HANDLER(kInitializeLoopback, InitializeLoopback,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<Call>>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<Call>>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .Arg<AnyBuffer>()
                           .RemainingArgs()
                           .Ret<AnyBuffer>(),
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace

const Target kTargets[2] = {
    {"jax_gemma_arf.post_ff", kInstantiate, kPrepareMesh, kInitializeMesh, kExecute},
    {"jax_gemma_arf.loopback_post_ff", kInstantiate, nullptr, kInitializeLoopback, kExecute},
};

int64_t EnqueuedLaunches() { return enqueued.load(); }

ffi::TypeId* CallTypeId() { return &Call::id; }

const ffi::TypeInfo* CallTypeInfo() {
  static const ffi::TypeInfo info = ffi::MakeTypeInfo<Call>();
  return &info;
}

}  // namespace jax_gemma_arf
