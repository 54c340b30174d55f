// The state of a call: the workspace, the bound on blocks and the kernel that its first run on each
// device finds or creates there, for the runs after it.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "agreement.h"
#include "call.h"
#include "kernels.h"
#include "workspace.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

struct Ready {
  const Workspace* workspace;
  CallShape shape;
  int max_ctas;
  KernelCode code;
  uint32_t call_id = 0;  // for failures; one for all devices
};

// The state of one custom call instruction, which all local devices share.
class CallState {
 public:
  explicit CallState(Call call) : call_(std::move(call)) {}

  const Call& call() const { return call_; }
  const Ready* FindReady(int32_t device);
  bool HasBeenReady();  // on some device
  void SetReady(int32_t device, Ready ready);

 private:
  const Call call_;
  std::mutex mutex_;
  std::map<int32_t, Ready> ready_;  // by device ordinal
};

// Agrees with the other ranks on a workspace, found or created. `ranks` are those that the device
// holds.
xla::ffi::ErrorOr<Ready> MakeReady(const Call& call, int32_t device, void* communicator,
                                   const xla::ffi::RemainingArgs& args,
                                   const std::vector<int>& ranks, PeerExchange& exchange);

// The error of a stage that XLA calls on a device where the call is not ready.
xla::ffi::Error NotReady(const char* stage, int32_t device);

}  // namespace jax_gemma_arf
