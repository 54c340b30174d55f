// XLA FFI stages. Instantiate reads the attributes. Prepare asks XLA for the replica group's
// communicator, whose acquisition lines the ranks up. Initialize, which XLA calls at every run,
// finds the workspace, and creates it at the first. Execute enqueues kernels: it neither allocates
// nor synchronises, and all state between calls is on the device. Record puts the kernel of a mesh
// call into a CUDA graph, as a node; in loopback XLA captures what Execute enqueues.
#include "handler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "errors.h"
#include "file_exchange.h"
#include "kernels.h"
#include "launch_shape.h"
#include "nccl_exchange.h"
#include "watchdog.h"
#include "workspace.h"
#include "xla/ffi/api/collectives_api.h"
#include "xla/ffi/api/record_api.h"

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::AnyBuffer;
using ffi::Error;
using ffi::ErrorOr;

using Groups = std::vector<std::vector<int64_t>>;

constexpr int kLeastCtas = 8;  // the largest cluster: no grid may be limited to less

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
  // A communicator belongs to one rank of one replica group; loopback has none, or a directory.
  using Key = std::tuple<void* /*communicator*/, int32_t /*device*/, WorkspaceSpec::Key>;

  static Registry& Get() {
    static auto* const registry = new Registry();
    return *registry;
  }
  const Parts* Find(const Key& key) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = parts_.find(key);
    return found == parts_.end() ? nullptr : found->second.back().get();
  }
  std::vector<WorkspaceReport> Report() {
    std::vector<const RankWorkspace*> all;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [key, made] : parts_) {
        for (const auto& parts : made) {
          for (const auto& rank : parts->ranks) all.push_back(rank.get());
        }
      }
    }
    std::vector<WorkspaceReport> reports;
    for (const RankWorkspace* part : all) {  // reads device memory: without the lock
      const WorkspaceSpec& spec = part->spec();
      reports.push_back({part->device(), part->rank(), spec.nranks, Name(spec.algorithm),
                         spec.capacity, WorkspaceLayout(spec).total,
                         reinterpret_cast<uintptr_t>(part->base()), part->CheckGuards()});
    }
    return reports;
  }
  const Parts* Insert(const Key& key, std::unique_ptr<Parts> parts) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return parts_[key].emplace_back(std::move(parts)).get();
  }

 private:
  std::mutex mutex_;
  // The last made is in use. There are others where XLA has given a new communicator the address of
  // one that is gone.
  std::map<Key, std::vector<std::unique_ptr<Parts>>> parts_;
};

// What one call needs on one device, once its workspace exists.
struct Ready {
  const Parts* parts;
  int max_ctas;
  KernelCode code;
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
  int branches;
  bool has_residual;
  bool has_layer_scalar;
  int next_norms;
  // Loopback alone: the ranks that this process holds, the directory where it meets those of
  // others ("": there are none), and the rank that stays away, for tests.
  std::vector<int> local_ranks;
  std::string rendezvous;
  int absent_rank = -1;

  std::mutex mutex;
  uint32_t name = 0;               // for failures; set with the first of `ready`
  std::map<int32_t, Ready> ready;  // by device ordinal

  const Ready* FindReady(int32_t device) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = ready.find(device);
    return found == ready.end() ? nullptr : &found->second;
  }
  bool HasBeenReady() {  // on some device
    const std::lock_guard<std::mutex> lock(mutex);
    return !ready.empty();
  }
};

ffi::TypeId Call::id = {};

ErrorOr<std::unique_ptr<Call>> Instantiate(std::string_view algorithm, int64_t axis_size,
                                           ffi::Span<const int64_t> replica_groups, float eps,
                                           float scale_offset, int64_t max_ctas, int64_t branches,
                                           bool has_residual, bool has_layer_scalar,
                                           int64_t next_norms) {
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
  if (max_ctas != 0 && (max_ctas < kLeastCtas || max_ctas > kMaxCtas)) {
    return Invalid("max_ctas must be 0 or from " + std::to_string(kLeastCtas) + " to " +
                   std::to_string(kMaxCtas) + ", got " + std::to_string(max_ctas));
  }
  if (branches < 1 || branches > kImplementation.max_branches) {
    return Invalid("branches must be from 1 to " + std::to_string(kImplementation.max_branches) +
                   ", got " + std::to_string(branches));
  }
  if (next_norms < 0 || next_norms > kMaxNextNorms) {
    return Invalid("next_norms must be from 0 to 3, got " + std::to_string(next_norms));
  }
  call->nranks = static_cast<int>(axis_size);
  for (auto id = replica_groups.begin(); id != replica_groups.end(); id += axis_size) {
    call->groups.emplace_back(id, id + axis_size);
  }
  call->eps = eps;
  call->scale_offset = scale_offset;
  call->max_ctas = static_cast<int>(max_ctas);
  call->branches = static_cast<int>(branches);
  call->has_residual = has_residual;
  call->has_layer_scalar = has_layer_scalar;
  call->next_norms = static_cast<int>(next_norms);
  return call;
}

ErrorOr<std::unique_ptr<Call>> InstantiateLoopback(
    std::string_view algorithm, int64_t axis_size, ffi::Span<const int64_t> replica_groups,
    float eps, float scale_offset, int64_t max_ctas, int64_t branches, bool has_residual,
    bool has_layer_scalar, int64_t next_norms, ffi::Span<const int64_t> local_ranks,
    std::string_view rendezvous, int64_t absent_rank) {
  auto call = Instantiate(algorithm, axis_size, replica_groups, eps, scale_offset, max_ctas,
                          branches, has_residual, has_layer_scalar, next_norms);
  if (call.has_error()) return call;
  (*call)->local_ranks.assign(local_ranks.begin(), local_ranks.end());
  (*call)->rendezvous = std::string(rendezvous);
  (*call)->absent_rank = static_cast<int>(absent_rank);
  int64_t previous = -1;
  for (const int64_t rank : local_ranks) {
    if (rank <= previous || rank >= axis_size) {
      return Invalid("local_ranks must rise from 0 to at most " + std::to_string(axis_size - 1) +
                     ", got " + std::to_string(rank) + " after " + std::to_string(previous));
    }
    previous = rank;
  }
  if (absent_rank < -1 || absent_rank >= axis_size) {
    return Invalid("absent_rank must be -1 or from 0 to " + std::to_string(axis_size - 1) +
                   ", got " + std::to_string(absent_rank));
  }
  if (local_ranks.size() == 0 ||
      (rendezvous.empty() && static_cast<int64_t>(local_ranks.size()) != axis_size)) {
    return Invalid("without a rendezvous directory this process must hold all " +
                   std::to_string(axis_size) + " ranks, got " + std::to_string(local_ranks.size()));
  }
  return call;
}

ErrorOr<Dtype> DtypeOf(const AnyBuffer& buffer, const std::string& name) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Dtype::kFloat32;
    case ffi::DataType::BF16: return Dtype::kBFloat16;
    case ffi::DataType::F16: return Dtype::kFloat16;
    default:
      return Invalid(name + " must be bfloat16, float16 or float32, got XLA type " +
                     std::to_string(static_cast<int>(buffer.element_type())));
  }
}

ErrorOr<Operand> OperandOf(const AnyBuffer& buffer, const std::string& name, int64_t elements) {
  if (static_cast<int64_t>(buffer.element_count()) != elements) {
    return Invalid(name + " must have " + std::to_string(elements) + " elements, got " +
                   std::to_string(buffer.element_count()));
  }
  ErrorOr<Dtype> dtype = DtypeOf(buffer, name);
  if (dtype.has_error()) return dtype.error();
  if (elements > 1 && reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
    return Invalid(name + " must be aligned to 16 bytes");  // read 16 bytes at once
  }
  return Operand{buffer.untyped_data(), *dtype};
}

// The operands of one call on one device, checked. Those that have a part for each rank that the
// device holds are those of the first.
struct Arguments {
  KernelKind kind;
  int tokens;
  int hidden;
  const void* x[kMaxBranches];
  Tail tail;  // but for the results

  int64_t elements() const { return int64_t{tokens} * hidden; }
  CallShape shape() const { return {kind, tokens, hidden, tail.next_norms, tail.out_dtype}; }
};

ErrorOr<Arguments> ArgumentsOf(const Call& call, const ffi::RemainingArgs& args, int64_t ranks) {
  const int own_scales = OwnScales(call.branches);
  const size_t expected =
      call.branches + own_scales + call.has_residual + call.has_layer_scalar + call.next_norms;
  if (args.size() != expected) {
    return Invalid("expected " + std::to_string(expected) + " operands, got " +
                   std::to_string(args.size()));
  }
  ErrorOr<AnyBuffer> x = args.get<AnyBuffer>(0);
  if (x.has_error()) return x.error();
  ErrorOr<Dtype> dtype = DtypeOf(*x, "x");
  if (dtype.has_error()) return dtype.error();
  const auto dims = x->dimensions();
  const int64_t hidden = dims.size() == 0 ? 0 : dims.back();
  const int64_t elements = static_cast<int64_t>(x->element_count());
  if (hidden % 64 != 0 || hidden < 256 || hidden > 16384) {
    return Invalid("the last dimension of x must be a multiple of 64 from 256 to 16384, got " +
                   std::to_string(hidden));
  }
  if (elements == 0 || elements % (hidden * ranks) != 0) {
    return Invalid("x must hold " + std::to_string(ranks) + " x [tokens, " +
                   std::to_string(hidden) + "], got " + std::to_string(elements) + " elements");
  }
  const int64_t bytes = elements / ranks * call.branches * ItemSize(*dtype);
  const int64_t limit = call.algorithm == Algorithm::kOneShot ? kMaxOneShotBytes : kMaxMessageBytes;
  if (bytes > limit) {
    return Invalid("x must have at most " + std::to_string(limit) + " bytes a rank, got " +
                   std::to_string(bytes) + "; use fewer tokens a call");
  }

  Arguments parsed = {};
  parsed.kind = {call.algorithm, *dtype, call.nranks, call.branches};
  parsed.tokens = static_cast<int>(elements / ranks / hidden);
  parsed.hidden = static_cast<int>(hidden);
  size_t index = 0;
  Error error = Error::Success();
  const auto next = [&](const char* name, int64_t count) -> Operand {
    if (error.failure()) return {};
    ErrorOr<AnyBuffer> buffer = args.get<AnyBuffer>(index++);
    if (buffer.has_error()) {
      error = buffer.error();
      return {};
    }
    ErrorOr<Operand> operand = OperandOf(*buffer, name, count);
    if (operand.has_error()) {
      error = operand.error();
      return {};
    }
    return *operand;
  };
  for (int b = 0; b < call.branches; ++b) {
    const Operand sums = next("x", elements);
    if (error.success() && sums.dtype != *dtype) error = Invalid("all x must have one type");
    parsed.x[b] = sums.data;
  }
  for (int n = 1; n < own_scales; ++n) parsed.tail.scales[n] = next("branch norm_scale", hidden);
  parsed.tail.scales[0] = next("norm_scale", hidden);
  parsed.tail.out_dtype = *dtype;
  if (call.has_residual) {
    parsed.tail.residual = next("residual", parsed.elements());
    parsed.tail.out_dtype = parsed.tail.residual.dtype;
  }
  if (call.has_layer_scalar) parsed.tail.layer_scalar = next("layer_scalar", 1);
  for (int n = 0; n < call.next_norms; ++n) {
    parsed.tail.scales[own_scales + n] = next("next_norm_scale", hidden);
  }
  if (error.failure()) return error;
  parsed.tail.next_norms = call.next_norms;
  parsed.tail.eps = call.eps;
  parsed.tail.scale_offset = call.scale_offset;
  parsed.tail.inverse_hidden = 1.f / static_cast<float>(hidden);
  return parsed;
}

std::string Summary(const Call& call, const Arguments& arguments) {
  std::ostringstream text;
  text << arguments.shape().Describe() << "; groups";
  for (const std::vector<int64_t>& group : call.groups) {
    for (size_t i = 0; i < group.size(); ++i) text << (i == 0 ? " [" : ", ") << group[i];
    text << "]";
  }
  return text.str();
}

// Agrees with the other ranks on a workspace, found or created, and remembers it for Execute.
Error MakeReady(Call& call, int32_t device, void* communicator, const ffi::RemainingArgs& args,
                const std::vector<int>& ranks, PeerExchange& exchange) {
  ErrorOr<Arguments> arguments = ArgumentsOf(call, args, ranks.size());
  if (arguments.has_error()) return arguments.error();
  const WorkspaceSpec spec(arguments->kind, CapacityFor(arguments->shape()));
  const Registry::Key key(communicator, device, spec.key());
  const Parts* parts = Registry::Get().Find(key);
  ErrorOr<Agreement> agreement =
      Agree(spec, arguments->shape(), ranks, parts == nullptr ? nullptr : &parts->ranks, exchange);
  if (agreement.has_error()) return agreement.error();
  if (!agreement->created.empty()) {
    auto created = std::make_unique<Parts>();
    created->ranks = std::move(agreement->created);
    if (const std::string failure = Describe(created->Fork(), "creating streams and events");
        !failure.empty()) {
      return Internal(failure);
    }
    parts = Registry::Get().Insert(key, std::move(created));
  }

  // All blocks of all ranks on a device must be resident together: they wait for each other.
  int max_ctas = std::min<int>(agreement->resident_ctas / ranks.size(), kImplementation.max_ctas);
  if (call.max_ctas > 0) max_ctas = std::min(max_ctas, call.max_ctas);
  if (max_ctas < kLeastCtas) {
    return Internal("the device holds " + std::to_string(agreement->resident_ctas) +
                    " blocks of this kernel, too few for " + std::to_string(ranks.size()) +
                    " ranks of at least " + std::to_string(kLeastCtas));
  }
  KernelCode code = {};
  if (kImplementation.programmatic) {
    const cudaError_t error = FindCode(arguments->kind, &code);
    if (error != cudaSuccess) return Internal(Describe(error, "finding the kernel's code"));
  }
  const std::lock_guard<std::mutex> lock(call.mutex);
  if (call.ready.empty()) call.name = NameCall(Summary(call, *arguments));
  call.ready[device] = Ready{parts, max_ctas, code};
  return Error::Success();
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
Error PrepareMesh(ffi::RunId run, CommunicatorContext collectives, Call* call) {
  thread_local int64_t asked_in = -1;
  thread_local Groups asked_for;
  if (run.run_id != -1 && run.run_id == asked_in && call->groups == asked_for &&
      call->HasBeenReady()) {
    return Error::Success();
  }
  Error error =
      collectives.RequestCommunicator(ffi::GroupMode::kFlattenedId, call->groups, kCommunicationId);
  if (error.success()) {
    asked_in = run.run_id;
    asked_for = call->groups;
  }
  return error;
}

Error InitializeMesh(int32_t device, CommunicatorContext collectives, Call* call,
                     ffi::RemainingArgs args) {
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
  return MakeReady(*call, device, *communicator, args, {(*exchange)->rank()}, **exchange);
}

// All ranks are this thread's, so their records are all there are.
class LoopbackExchange : public PeerExchange {
 public:
  Error AllGather(const std::vector<PeerRecord>& mine, std::vector<PeerRecord>* all) override {
    *all = mine;
    return Error::Success();
  }
};

Error InitializeLoopback(int32_t device, Call* call, ffi::RemainingArgs args) {
  // No communicator orders two threads here, and only one may create.
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (call->FindReady(device) != nullptr) return Error::Success();
  if (call->rendezvous.empty()) {
    LoopbackExchange exchange;
    return MakeReady(*call, device, nullptr, args, call->local_ranks, exchange);
  }
  // The directory stands for the communicator: its name's address tells groups apart.
  static std::set<std::string> directories;
  const std::string& directory = *directories.insert(call->rendezvous).first;
  FileExchange exchange(directory, call->local_ranks, call->nranks);
  return MakeReady(*call, device, const_cast<std::string*>(&directory), args, call->local_ranks,
                   exchange);
}

// Off: calls are captured into graphs, and nothing is launched programmatically.
std::atomic<bool> use_record{false};
std::atomic<int64_t> enqueued{0};
std::atomic<int64_t> recorded{0};

void CountRecorded() {
  enqueued.fetch_add(1, std::memory_order_relaxed);
  recorded.fetch_add(1, std::memory_order_relaxed);
}

// The launches of one call on one device: one for each rank that the device holds.
ErrorOr<std::vector<Launch>> LaunchesOf(const Call& call, const Ready& ready,
                                        const ffi::RemainingArgs& args,
                                        const ffi::RemainingRets& rets) {
  const Parts& parts = *ready.parts;
  const int64_t ranks = parts.ranks.size();
  ErrorOr<Arguments> arguments = ArgumentsOf(call, args, ranks);
  if (arguments.has_error()) return arguments.error();
  const int64_t capacity = parts.ranks[0]->spec().capacity;
  const int64_t needed = CapacityFor(arguments->shape());
  if (needed > capacity) {
    return Internal("a message of " + std::to_string(needed) +
                    " bytes does not fit its workspace of " + std::to_string(capacity));
  }
  if (rets.size() != static_cast<size_t>(1 + call.next_norms)) {
    return Invalid("expected " + std::to_string(1 + call.next_norms) + " results, got " +
                   std::to_string(rets.size()));
  }
  char* results[1 + kMaxNextNorms];
  for (size_t i = 0; i < rets.size(); ++i) {
    ErrorOr<ffi::Result<AnyBuffer>> buffer = rets.get<AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    ErrorOr<Operand> result = OperandOf(**buffer, "a result", arguments->elements() * ranks);
    if (result.has_error()) return result.error();
    if (result->dtype != arguments->tail.out_dtype) {
      return Invalid("the results must have residual's type, or x's without a residual");
    }
    results[i] = static_cast<char*>((*buffer)->untyped_data());
  }

  const int64_t x_bytes = arguments->elements() * ItemSize(arguments->kind.dtype);
  const int64_t out_bytes = arguments->elements() * ItemSize(arguments->tail.out_dtype);
  std::vector<Launch> launches(ranks);
  for (int64_t i = 0; i < ranks; ++i) {
    const RankWorkspace& workspace = *parts.ranks[i];
    Launch& launch = launches[i];
    launch.kind = arguments->kind;
    launch.rank = workspace.rank();
    launch.tokens = arguments->tokens;
    launch.hidden = arguments->hidden;
    launch.max_ctas = ready.max_ctas;
    launch.call = call.name;
    launch.timeout_ns = TimeoutNanoseconds();
    for (int b = 0; b < call.branches; ++b) {
      launch.x[b] = static_cast<const char*>(arguments->x[b]) + i * x_bytes;
    }
    launch.tail = arguments->tail;
    launch.tail.hidden = results[0] + i * out_bytes;
    for (int n = 0; n < call.next_norms; ++n) {
      launch.tail.normed[n] = results[1 + n] + i * out_bytes;
    }
    launch.peers = workspace.peers();
  }
  return launches;
}

Error NotReady(const char* stage, int32_t device) {
  return Internal(std::string(stage) + " before Initialize on device " + std::to_string(device));
}

Error Execute(cudaStream_t stream, int32_t device, Call* call, ffi::RemainingArgs args,
              ffi::RemainingRets rets) {
  const Ready* ready = call->FindReady(device);
  if (ready == nullptr) return NotReady("Execute", device);
  ErrorOr<std::vector<Launch>> launches = LaunchesOf(*call, *ready, args, rets);
  if (launches.has_error()) return launches.error();
  const Parts& parts = *ready->parts;
  const size_t ranks = launches->size();
  cudaError_t error = cudaSuccess;
  if (ranks > 1) error = cudaEventRecord(parts.fork, stream);
  for (size_t i = 0; i < ranks && error == cudaSuccess; ++i) {
    const Launch& launch = (*launches)[i];
    const cudaStream_t own = i == 0 ? stream : parts.streams[i - 1];
    if (i > 0) error = cudaStreamWaitEvent(own, parts.fork);
    if (error == cudaSuccess && launch.rank != call->absent_rank) {
      // Ranks after the first follow an event.
      error = Enqueue(launch, kImplementation.programmatic && use_record && i == 0, own);
      if (error == cudaSuccess) enqueued.fetch_add(1, std::memory_order_relaxed);
    }
    if (error == cudaSuccess && i > 0) error = cudaEventRecord(parts.joins[i - 1], own);
  }
  for (size_t i = 1; i < ranks && error == cudaSuccess; ++i) {
    error = cudaStreamWaitEvent(stream, parts.joins[i - 1]);
  }
  if (error == cudaSuccess) return Error::Success();
  return Internal(Describe(error, "launching for " + std::to_string((*launches)[0].tokens) +
                                      " tokens of " + std::to_string((*launches)[0].hidden)));
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
Error RecordMesh(int32_t device, Recorder recorder, Call* call, ffi::RemainingArgs args,
                 ffi::RemainingRets rets) {
  const Ready* ready = call->FindReady(device);
  if (ready == nullptr) return NotReady("Record", device);
  ErrorOr<std::vector<Launch>> launches = LaunchesOf(*call, *ready, args, rets);
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

// The attributes of both targets (lowering.py).
template <typename Binding>
auto WithAttributes(Binding binding) {
  return std::move(binding)
      .template Attr<std::string_view>("algorithm")
      .template Attr<int64_t>("axis_size")
      .template Attr<ffi::Span<const int64_t>>("replica_groups")
      .template Attr<float>("eps")
      .template Attr<float>("scale_offset")
      .template Attr<int64_t>("max_ctas")
      .template Attr<int64_t>("branches")
      .template Attr<bool>("has_residual")
      .template Attr<bool>("has_layer_scalar")
      .template Attr<int64_t>("next_norms");
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate, WithAttributes(ffi::Ffi::BindInstantiate()));

XLA_FFI_DEFINE_HANDLER(kInstantiateLoopback, InstantiateLoopback,
                       WithAttributes(ffi::Ffi::BindInstantiate())
                           .Attr<ffi::Span<const int64_t>>("local_ranks")
                           .Attr<std::string_view>("rendezvous")
                           .Attr<int64_t>("absent_rank"));

XLA_FFI_DEFINE_HANDLER(kPrepareMesh, PrepareMesh,
                       ffi::Ffi::BindPrepare()
                           .Ctx<ffi::RunId>()
                           .Ctx<ffi::Extension<Collectives>>()
                           .Ctx<ffi::State<Call>>());

XLA_FFI_DEFINE_HANDLER(kInitializeMesh, InitializeMesh,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::Extension<Collectives>>()
                           .Ctx<ffi::State<Call>>()
                           .RemainingArgs());

XLA_FFI_DEFINE_HANDLER(
    kInitializeLoopback, InitializeLoopback,
    ffi::Ffi::BindInitialize().Ctx<ffi::DeviceOrdinal>().Ctx<ffi::State<Call>>().RemainingArgs());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<Call>>()
                           .RemainingArgs()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER(kRecordMesh, RecordMesh,
                       ffi::Ffi::BindRecord()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::Extension<Recording>>()
                           .Ctx<ffi::State<Call>>()
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
    const XLA_FFI_Handler_Bundle bundle = {kInstantiate, kPrepareMesh, kInitializeMesh, kExecute,
                                           use_record ? kRecordMesh : nullptr};
    XLA_FFI_Error* error =
        ffi::Ffi::RegisterStaticHandler(frame->api, kImplementation.mesh_target, "CUDA", bundle,
                                        /*traits=*/0);
    if (error != nullptr) return error;
    mesh_registered = true;
  }
  return kExecute(frame);  // answers with the metadata of Execute; XLA asks for nothing else
}

}  // namespace

std::vector<Target> Targets() {
  const Target mesh =
      kImplementation.programmatic
          ? Target{"jax_gemma_arf.register_tail", nullptr, nullptr, nullptr, RegisterMesh}
          : Target{kImplementation.mesh_target, kInstantiate, kPrepareMesh, kInitializeMesh,
                   kExecute};
  return {mesh, Target{kImplementation.loopback_target, kInstantiateLoopback, nullptr,
                       kInitializeLoopback, kExecute}};
}

void SetRecord(bool enabled) { use_record = enabled; }

std::vector<std::string> MeshStages() {
  if (!mesh_registered) return {};
  std::vector<std::string> stages = {"instantiate", "prepare", "initialize", "execute"};
  if (use_record) stages.push_back("record");
  return stages;
}

int64_t EnqueuedLaunches() { return enqueued.load(); }

int64_t RecordedLaunches() { return recorded.load(); }

std::vector<WorkspaceReport> ReportWorkspaces() { return Registry::Get().Report(); }

ffi::TypeId* CallTypeId() { return &Call::id; }

const ffi::TypeInfo* CallTypeInfo() {
  static const ffi::TypeInfo info = ffi::MakeTypeInfo<Call>();
  return &info;
}

}  // namespace jax_gemma_arf
