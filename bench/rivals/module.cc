// The rivals as XLA custom calls, and their memory: allocated up front, for one process.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/collectives_api.h"
#include "xla/ffi/api/ffi.h"

namespace rivals {
namespace {

namespace ffi = ::xla::ffi;
namespace nb = nanobind;
using ffi::Error;

void Check(cudaError_t error, const std::string& what) {
  if (error != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

int64_t Align(int64_t bytes) { return (bytes + 255) / 256 * 256; }

struct Rank {
  int device;
  char* base;
  cudaStream_t stream;  // in loopback, of all ranks but the first
  cudaEvent_t joined;
};

// One-shot and two-shot have control blocks and pointer tables of their own, so that no counter
// serves two kernels. FlashInfer's table: data, flags and Lamport buffers of every rank, own
// control.
struct Group {
  std::vector<Rank> ranks;
  int64_t one_shot_bytes, two_shot_bytes;  // largest messages
  int64_t control[2], epochs, flags, wire_flags, table[2], lamport, data, mailbox, total;
  cudaEvent_t forked = nullptr;

  int64_t size() const { return ranks.size(); }
  bool loopback() const { return ranks.front().device == ranks.back().device; }
};

Group* group = nullptr;

void Create(const std::vector<int>& devices, int64_t one_shot_bytes, int64_t two_shot_bytes) {
  if (group != nullptr) throw std::runtime_error("create: there is a group already");
  auto made = std::make_unique<Group>();
  const int64_t n = devices.size();
  if (n != 2 && n != 4 && n != 8) throw std::invalid_argument("create: 2, 4 or 8 ranks");
  made->one_shot_bytes = one_shot_bytes;
  made->two_shot_bytes = two_shot_bytes;
  int64_t end = 0;
  const auto take = [&](int64_t bytes) { return std::exchange(end, end + Align(bytes)); };
  for (int64_t& control : made->control) control = take(5 * sizeof(int32_t));
  made->epochs = take(kMaxBlocks * sizeof(uint32_t));
  made->flags = take(kMaxBlocks * n * sizeof(int32_t));
  made->wire_flags = take(kMaxBlocks * n * sizeof(uint32_t));
  for (int64_t& table : made->table) table = take((3 * n + 1) * sizeof(void*));
  made->lamport = take(3 * n * one_shot_bytes);
  made->data = take(2 * two_shot_bytes);
  made->mailbox = take(n * WireBytes(two_shot_bytes, n));
  made->total = end;

  int before = 0;
  Check(cudaGetDevice(&before), "cudaGetDevice");
  for (const int device : devices) {
    Rank rank{device, nullptr, nullptr, nullptr};
    Check(cudaSetDevice(device), "cudaSetDevice");
    Check(cudaMalloc(reinterpret_cast<void**>(&rank.base), made->total),
          std::to_string(made->total) +
              " bytes outside JAX's pool (lower "
              "XLA_PYTHON_CLIENT_MEM_FRACTION)");
    Check(cudaMemset(rank.base, 0, made->total), "cudaMemset");
    Check(FillNegativeZero(rank.base + made->lamport, 3 * n * one_shot_bytes), "-0.0");
    Check(Preload(), "loading the kernels");
    Check(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking), "a stream");
    Check(cudaEventCreateWithFlags(&rank.joined, cudaEventDisableTiming), "an event");
    for (const int peer : devices) {
      if (peer == device) continue;
      const cudaError_t error = cudaDeviceEnablePeerAccess(peer, 0);
      if (error == cudaErrorPeerAccessAlreadyEnabled) {
        (void)cudaGetLastError();
      } else {
        Check(error, "peer access to device " + std::to_string(peer));
      }
    }
    made->ranks.push_back(rank);
  }
  const int32_t controls[2][5] = {{0, 0, 0, 0, 0},
                                  {0, 0, 0, static_cast<int32_t>(n * one_shot_bytes), 0}};
  for (const Rank& rank : made->ranks) {
    Check(cudaSetDevice(rank.device), "cudaSetDevice");
    for (const int one_shot : {0, 1}) {
      std::vector<void*> table(3 * n + 1);
      for (int64_t r = 0; r < n; ++r) {
        table[r] = made->ranks[r].base + made->data;
        table[n + r] = made->ranks[r].base + made->flags;
        table[2 * n + r] = made->ranks[r].base + made->lamport;
      }
      table[3 * n] = rank.base + made->control[one_shot];
      Check(cudaMemcpy(rank.base + made->table[one_shot], table.data(),
                       table.size() * sizeof(void*), cudaMemcpyHostToDevice),
            "the pointer table");
      Check(cudaMemcpy(rank.base + made->control[one_shot], controls[one_shot],
                       sizeof(controls[one_shot]), cudaMemcpyHostToDevice),
            "the control block");
    }
    Check(cudaDeviceSynchronize(), "initialising");
  }
  Check(cudaSetDevice(devices[0]), "cudaSetDevice");
  Check(cudaEventCreateWithFlags(&made->forked, cudaEventDisableTiming), "an event");
  Check(cudaSetDevice(before), "cudaSetDevice");
  group = made.release();
}

// As the library does: the communicator's acquisition lines the ranks of a run up.
struct Collectives : ffi::internal::CollectivesExtensionBase<
                         ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy>> {
  static bool Support(int32_t major, int32_t minor) { return major == 0 && minor >= 1; }
};

Error Prepare(ffi::internal::CommunicatorContextBase<ffi::internal::ErrorPolicy> collectives) {
  if (group == nullptr)
    return Error::InvalidArgument("no memory for the rivals: call create first");
  std::vector<int64_t> ids;
  for (int64_t r = 0; r < group->size(); ++r) ids.push_back(r);
  return collectives.RequestCommunicator(ffi::GroupMode::kFlattenedId, {ids}, 0);
}

// x: [tokens..., width], or [ranks, tokens..., width] in loopback. all_reduce_norm takes a
// residual and a norm_scale as well, and has a second result, the sum. The wire's result is x
// itself (aliased), or what the peers sent if `read` is set.
Error Execute(cudaStream_t stream, int32_t device, std::string_view kind, bool one_shot, bool read,
              float eps, ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out,
              ffi::RemainingRets more) {
  const auto invalid = [](const std::string& what) { return Error::InvalidArgument(what); };
  if (group == nullptr) return invalid("no memory for the rivals: call create first");
  const Group& g = *group;
  const int n = static_cast<int>(g.size());
  const bool loopback = g.loopback();
  const auto dimensions = x.dimensions();
  if (x.element_type() != ffi::DataType::BF16 || dimensions.size() < 2) {
    return invalid("x must be bfloat16, [tokens, width] or [ranks, tokens, width]");
  }
  const int64_t bytes = static_cast<int64_t>(x.size_bytes()) / (loopback ? n : 1);
  const int64_t width = dimensions.back();
  if (bytes > (one_shot ? g.one_shot_bytes : g.two_shot_bytes)) {
    return invalid("a message of " + std::to_string(bytes) +
                   " bytes is above what create was told");
  }
  Launch launch{};
  launch.kind = kind == "all_reduce"        ? Kind::kAllReduce
                : kind == "all_reduce_norm" ? Kind::kAllReduceNorm
                                            : Kind::kWire;
  launch.one_shot = one_shot;
  launch.ranks = n;
  launch.tokens = static_cast<int>(bytes / 2 / width);
  launch.width = static_cast<int>(width);
  launch.sharing = loopback ? n : 1;
  launch.eps = eps;
  char* sums = nullptr;
  if (launch.kind == Kind::kAllReduceNorm) {
    auto residual = rest.get<ffi::AnyBuffer>(0);
    auto norm_scale = rest.get<ffi::AnyBuffer>(1);
    auto sum = more.get<ffi::AnyBuffer>(0);
    if (!residual || !norm_scale || !sum) {
      return invalid("all_reduce_norm takes x, residual and norm_scale, and has two results");
    }
    launch.residual = residual->untyped_data();
    launch.norm_scale = norm_scale->untyped_data();
    sums = static_cast<char*>((*sum)->untyped_data());
  }

  cudaError_t error = loopback ? cudaEventRecord(g.forked, stream) : cudaSuccess;
  for (int r = 0; r < n && error == cudaSuccess; ++r) {
    const Rank& rank = g.ranks[r];
    if (!loopback && rank.device != device) continue;
    const int64_t at = loopback ? r * bytes : 0;
    const cudaStream_t own = loopback && r > 0 ? rank.stream : stream;
    launch.rank = r;
    launch.table = reinterpret_cast<void**>(rank.base + g.table[one_shot]);
    launch.x = static_cast<const char*>(x.untyped_data()) + at;
    launch.out = static_cast<char*>(out->untyped_data()) + at;
    launch.sum = sums + at;
    launch.wire.epochs = reinterpret_cast<uint32_t*>(rank.base + g.epochs);
    launch.wire.slot_bytes = WireBytes(bytes, n);
    for (int peer = 0; peer < n; ++peer) {
      char* base = g.ranks[peer].base;
      launch.wire.mailbox[peer] = base + g.mailbox;
      launch.wire.flags[peer] = reinterpret_cast<uint32_t*>(base + g.wire_flags);
    }
    if (own != stream) error = cudaStreamWaitEvent(own, g.forked);
    if (error == cudaSuccess) error = Enqueue(launch, own);
    if (error == cudaSuccess && read) {  // the slot of the next rank, whose first WireBytes it sent
      const char* slot = launch.wire.mailbox[r] + (r + 1) % n * launch.wire.slot_bytes;
      error =
          cudaMemcpyAsync(launch.out, slot, launch.wire.slot_bytes, cudaMemcpyDeviceToDevice, own);
    }
    if (error == cudaSuccess && own != stream) error = cudaEventRecord(rank.joined, own);
    if (error == cudaSuccess && own != stream) error = cudaStreamWaitEvent(stream, rank.joined);
  }
  if (error == cudaSuccess) return Error::Success();
  return Error::Internal(std::string(kind) + ": " + cudaGetErrorString(error));
}

XLA_FFI_DEFINE_HANDLER(kPrepare, Prepare,
                       ffi::Ffi::BindPrepare().Ctx<ffi::Extension<Collectives>>());

XLA_FFI_DEFINE_HANDLER(kExecute, Execute,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Attr<std::string_view>("kind")
                           .Attr<bool>("one_shot")
                           .Attr<bool>("read")
                           .Attr<float>("eps")
                           .Arg<ffi::AnyBuffer>()
                           .RemainingArgs()
                           .Ret<ffi::AnyBuffer>()
                           .RemainingRets(),
                       {ffi::Traits::kCmdBufferCompatible});

nb::capsule Capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<const void*>(handler));
}

nb::dict Registrations() {
  nb::dict mesh, loopback, targets;
  mesh["prepare"] = Capsule(kPrepare);
  mesh["execute"] = loopback["execute"] = Capsule(kExecute);
  targets["rivals.mesh"] = mesh;
  targets["rivals.loopback"] = loopback;
  return targets;
}

}  // namespace
}  // namespace rivals

NB_MODULE(_rivals, module) {
  module.attr("flashinfer_version") = RIVALS_FLASHINFER_VERSION;
  module.def("registrations", &rivals::Registrations);
  module.def("create", &rivals::Create, nanobind::arg("devices"), nanobind::arg("one_shot_bytes"),
             nanobind::arg("two_shot_bytes"),
             "Allocates for one rank on each CUDA device, or for all on one that is repeated.");
}
