// What the host code may ask of the kernels: what one rank's launch needs, and how it is shaped.
//
// Two implementations of this interface are built into extension modules of their own: kernels.cu,
// and flashinfer/kernels.cu with FlashInfer's protocol. All other host code is the same.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "call_limits.h"

namespace jax_gemma_arf {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__host__ __device__ constexpr int ItemSize(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// kOneShot: every rank pushes its partial sums to every peer, and all compute every row.
// kTwoShot: every row has one owner, which all ranks push to; it computes the row and pushes the
// result to all.
enum class Algorithm : int32_t { kOneShot = 0, kTwoShot = 1 };

constexpr const char* Name(Algorithm algorithm) {
  return algorithm == Algorithm::kOneShot ? "one_shot" : "two_shot";
}

// A thread holds this much of a row of partial sums.
inline constexpr int kVectorBytes = 16;

// One class of kernel: everything that selects an instantiation.
struct KernelKind {
  Algorithm algorithm;
  Dtype dtype;   // of the partial sums
  int nranks;    // one of kRankCounts
  int branches;  // partial sums per token: 1, or 2 (dense and experts)
};

// How many scales a tail has, without the scales of next norms: one for each branch if there are
// several, and one for out.
__host__ __device__ constexpr int OwnScales(int branches) {
  return branches == 1 ? 1 : 1 + branches;
}

// What an implementation is called, and what it can do.
struct Implementation {
  const char* mesh_target;  // names of the custom calls, and of the FFI types of their states
  const char* loopback_target;
  const char* mesh_call_type;
  const char* loopback_call_type;
  bool programmatic;        // may be launched programmatically, and recorded into graphs
  bool slots_by_item_size;  // a workspace serves partial sums of one element size alone
  int max_branches;
  int max_ctas;  // of a rank
};
extern const Implementation kImplementation;

struct Operand {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// What becomes of a reduced row. With one branch:
//
//     out = (rmsnorm(row) * scale + residual) * layer_scalar
//     normed[i] = rmsnorm(out) * next_scale[i]
//
// With two, the sum of rmsnorm(row[i]) * branch_scale[i] takes the place of row. To every scale
// scale_offset is added; no residual is 0, no layer_scalar is 1.
struct Tail {
  // [width] each: scale; with two branches then branch_scale; then next_scale.
  Operand scales[OwnScales(kMaxBranches) + kMaxNextNorms];
  Operand residual;      // [tokens, width], or data == nullptr
  Operand layer_scalar;  // one element, or data == nullptr
  int next_norms;
  Dtype out_dtype;
  void* out;                    // [tokens, width]
  void* normed[kMaxNextNorms];  // [tokens, width] each
  float eps;
  float scale_offset;
  float inverse_width;  // 1 / width: no kernel should divide
};

// Device memory of one rank that tells one call on a workspace from the next: see ReadCounter. The
// counter runs over after an even number of calls, and no grid has kCounted blocks.
struct Control {
  uint32_t counter;
};
inline constexpr uint32_t kCounted = 2048;
static_assert(kMaxCtas < kCounted);

// One rank's view of a workspace (workspace.h).
struct Peers {
  char* slots[kMaxRanks];  // of every rank, mapped here
  int64_t capacity;        // bytes of the largest message
  Control* control;        // this rank's own
  uint64_t* failure;       // host memory: 0, or what EncodeFailure makes of a wait that ended
};

struct Launch {
  KernelKind kind;
  int rank;
  int tokens;
  int width;
  int max_ctas;                 // upper bound on thread blocks; at least kMinCtas
  uint32_t call_id;             // for a failure
  uint64_t timeout_ns;          // how long to wait for a peer; 0: no bound
  const void* x[kMaxBranches];  // [tokens, width] partial sums of this rank
  Tail tail;
  Peers peers;
};

// A wait that ended, in the one word that a kernel can write without tearing.
struct Failure {
  int rank;
  int source;  // the rank that did not come
  uint32_t call_id;
};
__host__ __device__ constexpr uint64_t EncodeFailure(const Failure& failure) {
  return uint64_t{1} << 63 | uint64_t{failure.call_id} << 16 |
         static_cast<uint64_t>(failure.rank) << 8 | static_cast<uint64_t>(failure.source);
}
constexpr Failure DecodeFailure(uint64_t word) {
  return {static_cast<int>(word >> 8 & 0xff), static_cast<int>(word & 0xff),
          static_cast<uint32_t>(word >> 16)};
}

// What fills a slot that nothing has arrived in: every bit set, a NaN in all three dtypes.
inline constexpr int kEmptyByte = 0xff;

// The slots of one rank's workspace: the memory that its peers write to.
struct SlotSpec {
  Algorithm algorithm;
  int nranks;
  int64_t capacity;  // bytes of the largest message
  int item_size;     // bytes of an element; 0: slots serve all element sizes
};

int64_t SlotBytes(const SlotSpec& spec);

// Enqueues what makes `slots` empty, on the device that holds them.
cudaError_t FillSlots(const SlotSpec& spec, char* slots, cudaStream_t stream);

// Tells this rank's slots where the slots of all ranks are, mapped here. Synchronises.
cudaError_t ConnectSlots(const SlotSpec& spec, int rank, char* const* slots);

// Enqueues exactly one kernel. Neither allocates nor synchronises, so it can be captured.
// programmatic: the kernel may start before the kernel in front of it in the stream has ended.
cudaError_t Enqueue(const Launch& launch, bool programmatic, cudaStream_t stream);

// The code of one kernel of a programmatic implementation, for a runtime that launches it itself: a
// Launch is the only argument.
struct KernelCode {
  const char* name;   // mangled, in the image
  const void* image;  // fat binary of all kernels, for every architecture
  int64_t image_bytes;
  void* function;  // CUfunction, loaded on the current device
};
cudaError_t FindCode(const KernelKind& kind, KernelCode* code);

// The kernel of a kind: it takes a Launch, or what Enqueue makes of one.
const void* KernelOf(const KernelKind& kind);

// Loads all other kernels of this implementation on the current device.
cudaError_t PreloadHelpers();

}  // namespace jax_gemma_arf
