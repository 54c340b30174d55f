// Exchange of peer records through files, for ranks of one GPU that are in several processes: there
// XLA has no communicator to lend. Tests use it to have another process's memory without another
// GPU.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "agreement.h"

namespace jax_gemma_arf {

class FileExchange : public PeerExchange {
 public:
  // `directory` exists, was empty when the first process came, and serves one replica group;
  // `ranks` are this process's.
  FileExchange(std::string directory, std::vector<int> ranks, int nranks)
      : directory_(std::move(directory)), ranks_(std::move(ranks)), nranks_(nranks) {}

  xla::ffi::Error AllGather(const std::vector<PeerRecord>& mine,
                            std::vector<PeerRecord>* all) override;

 private:
  std::string directory_;
  std::vector<int> ranks_;
  int nranks_;
};

}  // namespace jax_gemma_arf
