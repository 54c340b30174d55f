#include "nccl_exchange.h"

#include <dlfcn.h>

#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "errors.h"

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

// How long a rank waits for its peers while they agree on a workspace: they may still be compiling
// the program that this rank runs already.
constexpr std::chrono::seconds kDeadline{600};

// The few NCCL functions used, from the library that XLA has loaded; this one links none of its
// own.
struct Nccl {
  static constexpr int kSuccess = 0, kInProgress = 7, kInt8 = 0;
  int (*comm_count)(void*, int*);
  int (*comm_user_rank)(void*, int*);
  int (*all_gather)(const void*, void*, size_t, int, void*, cudaStream_t);
  int (*comm_get_async_error)(void*, int*);
  const char* (*get_error_string)(int);
};

const Nccl* LoadNccl() {
  static const Nccl* const nccl = []() -> const Nccl* {
    void* library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    auto* loaded = new Nccl();
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    const bool complete = find(loaded->comm_count, "ncclCommCount") &&
                          find(loaded->comm_user_rank, "ncclCommUserRank") &&
                          find(loaded->all_gather, "ncclAllGather") &&
                          find(loaded->comm_get_async_error, "ncclCommGetAsyncError") &&
                          find(loaded->get_error_string, "ncclGetErrorString");
    return complete ? loaded : nullptr;
  }();
  return nccl;
}

Error NcclError(const Nccl& nccl, int result, const std::string& what) {
  return Internal(what + ": " + nccl.get_error_string(result));
}

// Polls until `done` says so. False after the deadline: a peer is gone, and blocking calls would
// wait for it without a bound.
bool WaitUntil(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (!done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

// Buffers and streams of exchanges that have ended, by device. The buffers are host memory, which
// NCCL's kernels can reach: to meet the others must be possible where a GPU's memory is full.
struct Spare {
  PeerRecord* buffer;
  cudaStream_t stream;
};
std::mutex spares_mutex;
std::map<int, std::vector<Spare>>& Spares() {
  static auto* const spares = new std::map<int, std::vector<Spare>>();
  return *spares;
}

Error TimedOut() {
  return Internal("no answer from the other ranks of the replica group for " +
                  std::to_string(kDeadline.count()) +
                  " s while they agreed on a workspace; a peer failed or never started");
}

}  // namespace

ErrorOr<std::unique_ptr<NcclExchange>> NcclExchange::Create(void* nccl_comm) {
  const Nccl* nccl = LoadNccl();
  if (nccl == nullptr) return Internal("XLA's libnccl.so.2 is not loaded or lacks a function");
  std::unique_ptr<NcclExchange> exchange(new NcclExchange());
  exchange->comm_ = nccl_comm;
  int result = nccl->comm_count(nccl_comm, &exchange->size_);
  if (result == Nccl::kSuccess) result = nccl->comm_user_rank(nccl_comm, &exchange->rank_);
  if (result != Nccl::kSuccess) return NcclError(*nccl, result, "asking for rank and size");
  if (exchange->size_ > kMaxRanks) {
    return Internal("XLA's communicator has " + std::to_string(exchange->size_) + " ranks");
  }
  cudaError_t error = cudaGetDevice(&exchange->device_);
  {
    const std::lock_guard<std::mutex> lock(spares_mutex);
    std::vector<Spare>& spares = Spares()[exchange->device_];
    if (!spares.empty()) {
      exchange->buffer_ = spares.back().buffer;
      exchange->stream_ = spares.back().stream;
      spares.pop_back();
      return exchange;
    }
  }
  if (error == cudaSuccess) {
    error = cudaHostAlloc(reinterpret_cast<void**>(&exchange->buffer_),
                          (kMaxRanks + 1) * sizeof(PeerRecord), cudaHostAllocMapped);
  }
  if (error == cudaSuccess) {
    error = cudaStreamCreateWithFlags(&exchange->stream_, cudaStreamNonBlocking);
  }
  if (error != cudaSuccess) return Internal(Describe(error, "preparing to meet the other ranks"));
  return exchange;
}

NcclExchange::~NcclExchange() {
  if (pending_) return;  // freeing would wait for it
  if (stream_ == nullptr) {
    (void)cudaFreeHost(buffer_);
    return;
  }
  const std::lock_guard<std::mutex> lock(spares_mutex);
  Spares()[device_].push_back({buffer_, stream_});
}

Error NcclExchange::AllGather(const std::vector<PeerRecord>& mine, std::vector<PeerRecord>* all) {
  const Nccl& nccl = *LoadNccl();
  buffer_[0] = mine[0];

  pending_ = true;
  int result =
      nccl.all_gather(buffer_, buffer_ + 1, sizeof(PeerRecord), Nccl::kInt8, comm_, stream_);
  if (result == Nccl::kInProgress) {  // XLA may use non-blocking communicators
    const bool finished = WaitUntil([&] {
      return nccl.comm_get_async_error(comm_, &result) != Nccl::kSuccess ||
             result != Nccl::kInProgress;
    });
    if (!finished) return TimedOut();
  }
  if (result != Nccl::kSuccess) return NcclError(nccl, result, "meeting the other ranks");

  cudaError_t error = cudaSuccess;
  if (!WaitUntil([&] { return (error = cudaStreamQuery(stream_)) != cudaErrorNotReady; })) {
    return TimedOut();
  }
  pending_ = false;
  if (error != cudaSuccess) return Internal(Describe(error, "hearing from the other ranks"));
  all->assign(buffer_ + 1, buffer_ + 1 + size_);
  return Error::Success();
}

}  // namespace jax_gemma_arf
