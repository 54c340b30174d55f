#include "launches.h"

#include <atomic>
#include <string>

#include "errors.h"
#include "watchdog.h"

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::Error;
using ffi::ErrorOr;

std::atomic<bool> record_enabled{false};
std::atomic<int64_t> enqueued{0};
std::atomic<int64_t> recorded{0};

}  // namespace

ErrorOr<std::vector<Launch>> LaunchesOf(const Call& call, const Ready& ready,
                                        const ffi::RemainingArgs& args,
                                        const ffi::RemainingRets& rets) {
  const Workspace& workspace = *ready.workspace;
  const int64_t ranks = workspace.size();
  ErrorOr<Arguments> arguments = ArgumentsOf(call, args, ranks);
  if (arguments.has_error()) return arguments.error();
  const int64_t capacity = workspace[0]->spec().capacity;
  const int64_t needed = CapacityFor(arguments->shape());
  if (needed > capacity) {
    return Internal("a message of " + std::to_string(needed) +
                    " bytes does not fit its workspace of " + std::to_string(capacity));
  }
  ErrorOr<Results> results = ResultsOf(*arguments, rets, ranks);
  if (results.has_error()) return results.error();

  const int64_t x_bytes = arguments->elements() * ItemSize(arguments->kind.dtype);
  const int64_t out_bytes = arguments->elements() * ItemSize(arguments->tail.out_dtype);
  std::vector<Launch> launches(ranks);
  for (int64_t i = 0; i < ranks; ++i) {
    const RankWorkspace& part = *workspace[i];
    Launch& launch = launches[i];
    launch.kind = arguments->kind;
    launch.rank = part.rank();
    launch.tokens = arguments->tokens;
    launch.width = arguments->width;
    launch.max_ctas = ready.max_ctas;
    launch.call_id = ready.call_id;
    launch.timeout_ns = TimeoutNanoseconds();
    for (int b = 0; b < call.branches; ++b) {
      launch.x[b] = static_cast<const char*>(arguments->x[b]) + i * x_bytes;
    }
    launch.tail = arguments->tail;
    launch.tail.out = (*results)[0] + i * out_bytes;
    for (int n = 0; n < call.next_norms; ++n) {
      launch.tail.normed[n] = (*results)[1 + n] + i * out_bytes;
    }
    launch.peers = part.peers();
  }
  return launches;
}

void SetRecord(bool enabled) { record_enabled = enabled; }

bool RecordEnabled() { return record_enabled; }

cudaError_t EnqueueAndCount(const Launch& launch, bool may_overlap, cudaStream_t stream) {
  const bool programmatic = kImplementation.programmatic && record_enabled && may_overlap;
  const cudaError_t error = Enqueue(launch, programmatic, stream);
  if (error == cudaSuccess) enqueued.fetch_add(1, std::memory_order_relaxed);
  return error;
}

Error LaunchError(cudaError_t error, const Launch& launch) {
  return Internal(Describe(error, "launching for " + std::to_string(launch.tokens) + " tokens of " +
                                      std::to_string(launch.width)));
}

void CountRecorded() {
  enqueued.fetch_add(1, std::memory_order_relaxed);
  recorded.fetch_add(1, std::memory_order_relaxed);
}

int64_t EnqueuedLaunches() { return enqueued.load(); }

int64_t RecordedLaunches() { return recorded.load(); }

}  // namespace jax_gemma_arf
