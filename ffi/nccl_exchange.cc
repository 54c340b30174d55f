#include "nccl_exchange.h"

#include <dlfcn.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;
using ::xla::ffi::Unexpected;

// How long a rank waits for its peers while a workspace is created.
constexpr std::chrono::seconds kDeadline{60};

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
  return Error::Internal("jax_gemma_arf: " + what + ": " + nccl.get_error_string(result));
}

Error CudaError(cudaError_t error, const std::string& what) {
  (void)cudaGetLastError();
  return Error::Internal("jax_gemma_arf: " + what + ": " + cudaGetErrorString(error));
}

// Polls until `done` says so. False after the deadline: a peer is gone, and blocking calls would
// wait for it for ever.
bool WaitUntil(const std::function<bool()>& done) {
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  while (!done()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  return true;
}

Error TimedOut() {
  return Error::Internal("jax_gemma_arf: no answer from the other ranks of the replica group for " +
                         std::to_string(kDeadline.count()) +
                         " s while its workspace was created; a peer failed or never started");
}

}  // namespace

ErrorOr<CommunicatorInfo> DescribeCommunicator(void* nccl_comm) {
  const Nccl* nccl = LoadNccl();
  if (nccl == nullptr) {
    return Error::Internal("jax_gemma_arf: XLA's libnccl.so.2 is not loaded or lacks a function");
  }
  CommunicatorInfo info{};
  int result = nccl->comm_count(nccl_comm, &info.size);
  if (result == Nccl::kSuccess) result = nccl->comm_user_rank(nccl_comm, &info.rank);
  if (result != Nccl::kSuccess) return NcclError(*nccl, result, "asking for rank and size");
  return info;
}

Error NcclExchange::AllGather(const std::vector<PeerRecord>& mine, std::vector<PeerRecord>* all) {
  const Nccl& nccl = *LoadNccl();
  const size_t bytes = sizeof(PeerRecord);
  char* buffer = nullptr;
  cudaStream_t stream = nullptr;
  cudaError_t error = cudaMalloc(reinterpret_cast<void**>(&buffer), (size_ + 1) * bytes);
  const std::unique_ptr<char, decltype(&cudaFree)> buffer_owner(buffer, &cudaFree);
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  const std::unique_ptr<CUstream_st, decltype(&cudaStreamDestroy)> stream_owner(stream,
                                                                                &cudaStreamDestroy);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(buffer, mine.data(), bytes, cudaMemcpyHostToDevice, stream);
  }
  if (error != cudaSuccess) return CudaError(error, "preparing the exchange of peer addresses");

  int result = nccl.all_gather(buffer, buffer + bytes, bytes, Nccl::kInt8, comm_, stream);
  if (result == Nccl::kInProgress) {  // XLA may use non-blocking communicators
    const bool finished = WaitUntil([&] {
      return nccl.comm_get_async_error(comm_, &result) != Nccl::kSuccess ||
             result != Nccl::kInProgress;
    });
    if (!finished) return TimedOut();
  }
  if (result != Nccl::kSuccess) return NcclError(nccl, result, "exchanging peer addresses");

  if (!WaitUntil([&] { return (error = cudaStreamQuery(stream)) != cudaErrorNotReady; })) {
    return TimedOut();
  }
  all->resize(size_);
  if (error == cudaSuccess) {
    error =
        cudaMemcpyAsync(all->data(), buffer + bytes, size_ * bytes, cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return CudaError(error, "exchanging peer addresses");
  return Error::Success();
}

}  // namespace jax_gemma_arf
