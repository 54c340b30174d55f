#include "watchdog.h"

#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "errors.h"
#include "kernels.h"

namespace jax_gemma_arf {
namespace {

std::atomic<uint64_t> timeout_ns{60'000'000'000};

// All of it lives until the process ends, also after CUDA is gone: the thread goes on reading.
class Watchdog {
 public:
  static Watchdog& Get() {
    static auto* const watchdog = new Watchdog();
    return *watchdog;
  }

  uint32_t NewCallId(const std::string& description) {
    const std::lock_guard<std::mutex> lock(mutex_);
    calls_.push_back(description);
    return static_cast<uint32_t>(calls_.size() - 1);
  }

  std::string NewWord(const std::string& owner, uint64_t** word) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (words_ == nullptr) {
      void* page = std::aligned_alloc(kPageBytes, kPageBytes);
      const std::string failure = Describe(
          cudaHostRegister(page, kPageBytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
          "registering host memory");
      if (!failure.empty()) {
        std::free(page);
        return failure;
      }
      words_ = static_cast<volatile uint64_t*>(page);
      for (int i = 0; i < kWords; ++i) words_[i] = 0;
      std::thread([this] { Watch(); }).detach();
    }
    const int index = next_++ % kWords;  // shared by some, should there ever be more
    owners_[index] = owner;
    return Describe(cudaHostGetDevicePointer(reinterpret_cast<void**>(word),
                                             const_cast<uint64_t*>(&words_[index]), 0),
                    "cudaHostGetDevicePointer");
  }

 private:
  static constexpr int kPageBytes = 4096;
  static constexpr int kWords = kPageBytes / sizeof(uint64_t);

  [[noreturn]] void Watch() {
    std::array<bool, kWords> told{};
    while (true) {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int i = 0; i < kWords; ++i) {
        if (words_[i] == 0 || told[i]) continue;
        told[i] = true;
        const Failure failure = DecodeFailure(words_[i]);
        std::fprintf(
            stderr,
            "jax_gemma_arf: rank %d waited longer than the peer timeout for rank %d of its "
            "replica group, in call %u (%s) on %s. That rank ended, hangs, or runs another "
            "program. This GPU is stopped with a launch failure; restart the process. "
            "jax_gemma_arf.set_peer_timeout sets the bound.\n",
            failure.rank, failure.source, failure.call_id, calls_[failure.call_id].c_str(),
            owners_[i].c_str());
        std::fflush(stderr);
      }
    }
  }

  std::mutex mutex_;
  std::vector<std::string> calls_;
  volatile uint64_t* words_ = nullptr;
  std::array<std::string, kWords> owners_;
  int next_ = 0;
};

}  // namespace

void SetTimeout(double seconds) { timeout_ns = static_cast<uint64_t>(seconds * 1e9); }

uint64_t TimeoutNanoseconds() { return timeout_ns; }

uint32_t NewCallId(const std::string& description) {
  return Watchdog::Get().NewCallId(description);
}

std::string NewFailureWord(const std::string& owner, uint64_t** word) {
  return Watchdog::Get().NewWord(owner, word);
}

}  // namespace jax_gemma_arf
