#include "ready.h"

#include <algorithm>
#include <sstream>
#include <string>

#include "errors.h"
#include "registry.h"
#include "watchdog.h"

namespace jax_gemma_arf {
namespace {

using ::xla::ffi::Error;
using ::xla::ffi::ErrorOr;

std::string Summary(const Call& call, const CallShape& shape) {
  std::ostringstream text;
  text << shape.Describe() << "; groups";
  for (const std::vector<int64_t>& group : call.replica_groups) {
    for (size_t i = 0; i < group.size(); ++i) text << (i == 0 ? " [" : ", ") << group[i];
    text << "]";
  }
  return text.str();
}

}  // namespace

const Ready* CallState::FindReady(int32_t device) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = ready_.find(device);
  return found == ready_.end() ? nullptr : &found->second;
}

bool CallState::HasBeenReady() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !ready_.empty();
}

void CallState::SetReady(int32_t device, Ready ready) {
  const std::lock_guard<std::mutex> lock(mutex_);
  ready.call_id =
      ready_.empty() ? NewCallId(Summary(call_, ready.shape)) : ready_.begin()->second.call_id;
  ready_[device] = ready;
}

ErrorOr<Ready> MakeReady(const Call& call, int32_t device, void* communicator,
                         const xla::ffi::RemainingArgs& args, const std::vector<int>& ranks,
                         PeerExchange& exchange) {
  ErrorOr<Arguments> arguments = ArgumentsOf(call, args, ranks.size());
  if (arguments.has_error()) return arguments.error();
  const CallShape shape = arguments->shape();
  const WorkspaceSpec spec(shape.kind, CapacityFor(shape));
  const RegistryKey key(communicator, device, spec.key());
  const Workspace* workspace = FindWorkspace(key);
  ErrorOr<Agreement> agreement = Agree(spec, shape, ranks, workspace, exchange);
  if (agreement.has_error()) return agreement.error();
  if (!agreement->created.empty()) {
    workspace = RegisterWorkspace(key, std::move(agreement->created));
  }

  // All blocks of all ranks on a device must be resident together: they wait for each other.
  int max_ctas = std::min<int>(agreement->resident_ctas / ranks.size(), kImplementation.max_ctas);
  if (call.max_ctas > 0) max_ctas = std::min(max_ctas, call.max_ctas);
  if (max_ctas < kMinCtas) {
    return Internal("the device holds " + std::to_string(agreement->resident_ctas) +
                    " blocks of this kernel, too few for " + std::to_string(ranks.size()) +
                    " ranks of at least " + std::to_string(kMinCtas));
  }
  KernelCode code = {};
  if (kImplementation.programmatic) {
    const cudaError_t error = FindCode(shape.kind, &code);
    if (error != cudaSuccess) return Internal(Describe(error, "finding the kernel's code"));
  }
  return Ready{workspace, shape, max_ctas, code};
}

Error NotReady(const char* stage, int32_t device) {
  return Internal(std::string(stage) + " before Initialize on device " + std::to_string(device));
}

}  // namespace jax_gemma_arf
