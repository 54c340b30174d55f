// Exchange of peer records over the communicator that XLA lends to a custom call.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "agreement.h"

namespace jax_gemma_arf {

class NcclExchange : public PeerExchange {
 public:
  // nccl_comm is XLA's ncclComm_t, of the current device. What an exchange needs is allocated here,
  // and kept for the device's next one, so that a rank without memory can still say so.
  static xla::ffi::ErrorOr<std::unique_ptr<NcclExchange>> Create(void* nccl_comm);
  ~NcclExchange() override;

  int rank() const { return rank_; }
  int size() const { return size_; }

  xla::ffi::Error AllGather(const std::vector<PeerRecord>& mine,
                            std::vector<PeerRecord>* all) override;

 private:
  NcclExchange() = default;

  int device_ = -1;
  void* comm_ = nullptr;
  int rank_ = 0;
  int size_ = 0;
  PeerRecord* buffer_ = nullptr;  // pinned: one record to send, then one a rank
  cudaStream_t stream_ = nullptr;
  bool pending_ = false;  // an operation that may never end uses buffer and stream
};

}  // namespace jax_gemma_arf
