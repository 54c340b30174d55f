// Exchange of peer records over the communicator that XLA lends to a custom call.
#pragma once

#include "workspace.h"

namespace jax_gemma_arf {

// Rank and size of this device in the communicator (an ncclComm_t) that XLA made for the group.
struct CommunicatorInfo {
  int rank;
  int size;
};
xla::ffi::ErrorOr<CommunicatorInfo> DescribeCommunicator(void* nccl_comm);

class NcclExchange : public PeerExchange {
 public:
  NcclExchange(void* nccl_comm, int size) : comm_(nccl_comm), size_(size) {}
  xla::ffi::Error AllGather(const std::vector<PeerRecord>& mine,
                            std::vector<PeerRecord>* all) override;

 private:
  void* comm_;
  int size_;
};

}  // namespace jax_gemma_arf
