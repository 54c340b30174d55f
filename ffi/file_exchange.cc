#include "file_exchange.h"

#include <chrono>
#include <cstdio>
#include <fstream>
#include <map>
#include <string>
#include <thread>

#include "errors.h"

namespace jax_gemma_arf {
namespace {

constexpr std::chrono::seconds kDeadline{60};

// Exchanges so far in this directory; the same in every process.
int NextRound(const std::string& directory) {
  static std::map<std::string, int> rounds;  // guarded by InitializeLoopback's lock
  return rounds[directory]++;
}

}  // namespace

xla::ffi::Error FileExchange::AllGather(const std::vector<PeerRecord>& mine,
                                        std::vector<PeerRecord>* all) {
  const std::string prefix = directory_ + "/" + std::to_string(NextRound(directory_)) + ".";
  for (size_t i = 0; i < ranks_.size(); ++i) {
    const std::string path = prefix + std::to_string(ranks_[i]);
    std::ofstream(path + ".part", std::ios::binary)
        .write(reinterpret_cast<const char*>(&mine[i]), sizeof(PeerRecord));
    if (std::rename((path + ".part").c_str(), path.c_str()) != 0) {
      return Internal("cannot write to the rendezvous directory " + directory_);
    }
  }
  all->resize(nranks_);
  const auto deadline = std::chrono::steady_clock::now() + kDeadline;
  for (int r = 0; r < nranks_; ++r) {
    while (!std::ifstream(prefix + std::to_string(r), std::ios::binary)
                .read(reinterpret_cast<char*>(&(*all)[r]), sizeof(PeerRecord))) {
      if (std::chrono::steady_clock::now() > deadline) {
        return Internal("rank " + std::to_string(r) + " did not come to " + directory_ +
                        " within " + std::to_string(kDeadline.count()) + " s");
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  return xla::ffi::Error::Success();
}

}  // namespace jax_gemma_arf
