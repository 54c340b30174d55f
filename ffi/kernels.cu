// The kernels, one for each algorithm, and their launch.
#include "kernels.h"

#include <algorithm>

#include "dispatch.h"
#include "epilogue.cuh"
#include "launch_shape.h"
#include "slots.cuh"

// The kernels as nvcc embeds them in this object file: code for every architecture. nvcc declares
// the same symbol behind this file; it is a local label of the assembler.
extern "C" const unsigned long long fatbinData[];

namespace jax_gemma_arf {
namespace {

// What fatbinData begins with.
struct FatbinHeader {
  uint32_t magic;
  uint16_t version;
  uint16_t header_bytes;
  uint64_t bytes;  // of what follows the header
};
constexpr uint32_t kFatbinMagic = 0xba55ed50u;

// One thread's slice of a row, and the rows that its block (or cluster of blocks) works on.
template <typename T>
struct Slice {
  int column;   // its first element of a row
  int vector;   // its place among the 16-byte vectors of a row
  int vectors;  // of a row
  int first;    // row (one-shot) or stripe (two-shot) to begin with
  int step;     // and from one to the next

  __device__ __forceinline__ Slice() {
    auto cluster = cooperative_groups::this_cluster();
    vector = cluster.block_rank() * blockDim.x + threadIdx.x;
    vectors = cluster.num_blocks() * blockDim.x;
    column = vector * (kVectorBytes / sizeof(T));
    first = __clusterIdx().x;
    step = __clusterGridDimInClusters().x;
  }
};

// This thread's 16 bytes of a row of partial sums.
template <typename T>
__device__ __forceinline__ const char* XOf(const void* x, int64_t row, const Slice<T>& slice) {
  return static_cast<const char*>(x) + (row * slice.vectors + slice.vector) * kVectorBytes;
}

// The counter of a workspace's calls, which SlotMap makes this call's number of. A call adds
// kCounted to it, all its blocks together; a block that has not yet added its share gets the number
// by dividing.
__device__ __forceinline__ uint32_t ReadCounter(const Control* control) {
  return *static_cast<const volatile uint32_t*>(&control->counter);
}

// After it, no thread of the block may read the counter. Long before the end of a kernel, which
// would wait for it.
__device__ __forceinline__ void CountBlock(Control* control) {
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&control->counter, blockIdx.x == 0 ? kCounted - gridDim.x + 1 : 1u);
  }
}

// Kernels are launched programmatically: a grid may start while its predecessors still run. Waits
// until all predecessors have completed and their writes are visible. Any operand may be the output
// of a predecessor, and the counter and the slots belong to the call before, which may be a
// predecessor itself, so only the launch's parameters are read earlier. Every thread waits: that
// this grid has completed must imply that its predecessors have.
//
// There is no early trigger (griddepcontrol.launch_dependents): a successor starts when all blocks
// have exited. XLA's kernels wait too, but before they wait they may load what they take for
// constant, which are the outputs of all kernels but XLA's own matmuls with a trigger.
__device__ __forceinline__ void AwaitPredecessors() { cudaGridDependencySynchronize(); }

// Sums the ranks' shares of a row, in float32 in rank order, and rounds once to T. `slot` is where
// source 0's share arrives in this rank's memory, `own` where this rank's is. kInFlight shares are
// on their way at a time: as many as there are registers for.
template <typename T, int kRanks, int kInFlight>
__device__ __forceinline__ Words<4> Reduce(const Launch& launch, char* slot, int64_t source_bytes,
                                           const char* own) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  float sum[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] = 0.f;
#pragma unroll 1
  for (int begin = 0; begin < kRanks; begin += kInFlight) {
    Words<4> shares[kInFlight];
#pragma unroll
    for (int s = 0; s < kInFlight; ++s) {
      const int r = begin + s;
      shares[s] = LoadRelaxed<4>(r == launch.rank ? own : slot + r * source_bytes);
    }
#pragma unroll
    for (int s = 0; s < kInFlight; ++s) {
      const int r = begin + s;
      if (r != launch.rank) shares[s] = Receive(slot + r * source_bytes, shares[s], launch, r);
      float share[kCount];
      Widen<T>(shares[s], share);
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum[i] += share[i];
    }
  }
  return Round<T>(sum);
}

}  // namespace

// Outside the unnamed namespace: a runtime that loads the image finds the kernels by name.
template <typename T, int kRanks, int kBranches>
__global__ void FusedTailOneShot(const __grid_constant__ Launch launch) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  extern __shared__ Words<4> shared[];
  const Slice<T> slice;
  AwaitPredecessors();
  Words<4> own[kBranches];
#pragma unroll
  for (int b = 0; b < kBranches; ++b) own[b] = LoadRelaxed<4>(XOf(launch.x[b], slice.first, slice));
  const SlotMap<Algorithm::kOneShot, kRanks> map(launch.peers.capacity,
                                                 ReadCounter(launch.peers.control));
  const auto slot = [&](int owner, int source, int branch, int token) {
    const int64_t row = int64_t{branch} * launch.tokens + token;
    return launch.peers.slots[owner] + map.generation + source * map.source_bytes +
           (row * slice.vectors + slice.vector) * kVectorBytes;
  };

  for (int token = slice.first; token < launch.tokens; token += slice.step) {
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      if (token != slice.first) own[b] = LoadRelaxed<4>(XOf(launch.x[b], token, slice));
#pragma unroll 1
      for (int r = 0; r < kRanks; ++r) {
        if (r != launch.rank) Push(slot(r, launch.rank, b, token), own[b]);
      }
    }
  }
  // What the epilogue reads comes while the partial sums travel.
  Epilogue<T, kBranches> epilogue(launch.tail, slice.column, shared);
  epilogue.Prefetch(int64_t{slice.first} * launch.width + slice.column);
  epilogue.Await();
  CountBlock(launch.peers.control);
  for (int token = slice.first; token < launch.tokens; token += slice.step) {
    const int64_t index = int64_t{token} * launch.width + slice.column;
    if (token != slice.first) epilogue.Prefetch(index);
    Words<4> rows[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      rows[b] = Reduce<T, kRanks, kBranches == 1 ? std::min(kRanks, 4) : 2>(
          launch, slot(launch.rank, 0, b, token), map.source_bytes, XOf(launch.x[b], token, slice));
    }
    float out[kCount];
    epilogue.Finish(rows, out);
    Write(launch.tail.out, launch.tail.out_dtype, index, out);
    epilogue.NextNorms(out, index);
  }
}

// Rows go in stripes: row s * kRanks + r, of stripe s, is rank r's. A block sends the partial sums
// of one stripe, computes its own row of the stripe before and collects the other rows of the
// stripe before that, so that something is always on the wire.
template <typename T, int kRanks, int kBranches>
__global__ void FusedTailTwoShot(const __grid_constant__ Launch launch) {
  constexpr int kCount = kVectorBytes / sizeof(T);
  extern __shared__ Words<4> shared[];
  const Slice<T> slice;
  AwaitPredecessors();
  const uint32_t counter = ReadCounter(launch.peers.control);
  Epilogue<T, kBranches> epilogue(launch.tail, slice.column, shared);
  const SlotMap<Algorithm::kTwoShot, kRanks> map(launch.peers.capacity, counter);
  const int stripes = (launch.tokens + kRanks - 1) / kRanks;
  const auto share_slot = [&](int owner, int source, int branch, int stripe) {
    const int64_t row = int64_t{branch} * stripes + stripe;
    return launch.peers.slots[owner] + map.generation + source * map.source_bytes +
           (row * slice.vectors + slice.vector) * kVectorBytes;
  };
  const auto row_slot = [&](int receiver, int64_t index) {
    return launch.peers.slots[receiver] + map.rows + index * ItemSize(launch.tail.out_dtype);
  };

  const auto send = [&](int stripe) {
#pragma unroll 1
    for (int r = 0; r < kRanks; ++r) {
      const int token = stripe * kRanks + r;
      if (r == launch.rank || token >= launch.tokens) continue;
#pragma unroll 1
      for (int b = 0; b < kBranches; ++b) {
        Push(share_slot(r, launch.rank, b, stripe), LoadRelaxed<4>(XOf(launch.x[b], token, slice)));
      }
    }
  };

  const auto compute = [&](int stripe) {
    const int token = stripe * kRanks + launch.rank;
    if (token >= launch.tokens) return;
    const int64_t index = int64_t{token} * launch.width + slice.column;
    epilogue.Prefetch(index);
    Words<4> rows[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
      rows[b] = Reduce<T, kRanks, kBranches == 1 ? std::min(kRanks, 4) : 1>(
          launch, share_slot(launch.rank, 0, b, stripe), map.source_bytes,
          XOf(launch.x[b], token, slice));
    }
    float out[kCount];
    epilogue.Finish(rows, out);
    Write(launch.tail.out, launch.tail.out_dtype, index, out, [&](const auto& words) {
#pragma unroll 1
      for (int r = 0; r < kRanks; ++r) {
        if (r != launch.rank) Push(row_slot(r, index), words);
      }
    });
    epilogue.NextNorms(out, index);
  };

  const auto collect = [&](int stripe) {
    for (int r = 0; r < kRanks; ++r) {
      const int token = stripe * kRanks + r;
      if (r == launch.rank || token >= launch.tokens) continue;
      const int64_t index = int64_t{token} * launch.width + slice.column;
      float out[kCount];
      VisitDtype(launch.tail.out_dtype, [&](auto zero) {
        using S = decltype(zero);
        constexpr int kWords = kWordsOf<S, kCount>;
        char* const slot = row_slot(launch.rank, index);
        const auto row = Receive(slot, LoadRelaxed<kWords>(slot), launch, r);
        *reinterpret_cast<Words<kWords>*>(static_cast<S*>(launch.tail.out) + index) = row;
        Widen<S>(row, out);
      });
      epilogue.NextNorms(out, index);
    }
  };

  send(slice.first);
  epilogue.Await();
  CountBlock(launch.peers.control);
  for (int stripe = slice.first; stripe < stripes + slice.step; stripe += slice.step) {
    const int sent = stripe + slice.step, collected = stripe - slice.step;
    if (sent < stripes) send(sent);
    if (stripe < stripes) compute(stripe);
    if (collected >= 0) collect(collected);
  }
}

namespace {

cudaLaunchAttribute ProgrammaticAttribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <typename T, int kRanks, int kBranches>
const void* KernelAs(Algorithm algorithm) {
  return algorithm == Algorithm::kOneShot
             ? reinterpret_cast<const void*>(FusedTailOneShot<T, kRanks, kBranches>)
             : reinterpret_cast<const void*>(FusedTailTwoShot<T, kRanks, kBranches>);
}

}  // namespace

const void* KernelOf(const KernelKind& kind) {
  return Dispatch(kind, [&](auto zero, auto ranks) {
    using T = decltype(zero);
    constexpr int kRanks = decltype(ranks)::value;
    return kind.branches == 1 ? KernelAs<T, kRanks, 1>(kind.algorithm)
                              : KernelAs<T, kRanks, 2>(kind.algorithm);
  });
}

const Implementation kImplementation = {"jax_gemma_arf.tail",
                                        "jax_gemma_arf.loopback_tail",
                                        "jax_gemma_arf.Call",
                                        "jax_gemma_arf.LoopbackCall",
                                        /*programmatic=*/true,
                                        /*slots_by_item_size=*/false,
                                        kMaxBranches,
                                        kMaxCtas};

// One-shot keeps two messages of every rank; two-shot two messages and the finished rows.
int64_t SlotBytes(const SlotSpec& spec) {
  return (spec.algorithm == Algorithm::kOneShot ? 2 * spec.nranks : 3) * spec.capacity;
}

cudaError_t FillSlots(const SlotSpec& spec, char* slots, cudaStream_t stream) {
  return cudaMemsetAsync(slots, kEmptyByte, SlotBytes(spec), stream);
}

cudaError_t ConnectSlots(const SlotSpec&, int, char* const*) { return cudaSuccess; }

cudaError_t Enqueue(const Launch& launch, bool programmatic, cudaStream_t stream) {
  const Grid grid = GridOf(launch);
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (grid.cluster > 1) attributes[config.numAttrs++] = ClusterAttribute(grid.cluster);
  if (programmatic) attributes[config.numAttrs++] = ProgrammaticAttribute();
  void* args[] = {const_cast<Launch*>(&launch)};
  return cudaLaunchKernelExC(&config, KernelOf(launch.kind), args);
}

cudaError_t FindCode(const KernelKind& kind, KernelCode* code) {
  const auto* header = reinterpret_cast<const FatbinHeader*>(fatbinData);
  if (header->magic != kFatbinMagic) return cudaErrorInvalidKernelImage;
  code->image = fatbinData;
  code->image_bytes = header->header_bytes + header->bytes;
  cudaError_t error = cudaFuncGetName(&code->name, KernelOf(kind));
  cudaFunction_t function = nullptr;
  if (error == cudaSuccess) error = cudaGetFuncBySymbol(&function, KernelOf(kind));
  code->function = function;
  return error;
}

cudaError_t PreloadHelpers() { return cudaSuccess; }

}  // namespace jax_gemma_arf
