// FlashInfer's all-reduce kernels with the Gemma epilogue: the other implementation of kernels.h.
//
// FlashInfer (descended from TensorRT-LLM) separates the communication, one-shot Lamport or
// two-shot with barriers, from what happens to a reduced row, `FusedOp<Pattern, T>`. The
// specialisation below makes that the epilogue of our own kernels, where FlashInfer's patterns
// compute rmsnorm(row + residual), which is a different function. Waits have no bound here.
#include "flashinfer/comm/trtllm_allreduce_fusion.cuh"

#include <array>
#include <type_traits>
#include <vector>

#include "../dispatch.h"
#include "../epilogue.cuh"
#include "../kernels.h"
#include "../launch_shape.h"

namespace jax_gemma_arf {
namespace {

namespace fi = flashinfer::trtllm_allreduce_fusion;

static_assert(fi::details::kBytesPerAccess == kVectorBytes, "both give a thread as much of a row");

// An enumerator that this library has no other use for: nvcc 13.0 writes a host stub that does not
// compile for a value that is none. Symbols are hidden, so that no other FlashInfer in the process
// meets this specialisation.
constexpr auto kGemmaPattern = fi::AllReduceFusionPattern::kARResidualRMSNormOutDynamicFP8Quant;

// What FlashInfer's kernels read of their parameters, and the tail.
struct GemmaParams {
  int rank;
  int size;  // elements
  int hidden_dim;
  void** workspace;
  void* allreduce_in;
  Tail tail;
};

}  // namespace
}  // namespace jax_gemma_arf

namespace flashinfer::trtllm_allreduce_fusion {

template <>
struct AllReduceFusionParams<float> : jax_gemma_arf::GemmaParams {};
template <>
struct AllReduceFusionParams<__half> : jax_gemma_arf::GemmaParams {};
template <>
struct AllReduceFusionParams<__nv_bfloat16> : jax_gemma_arf::GemmaParams {};

// A kernel constructs one for each thread, calls update(index) before it waits for a row, and the
// call operator with the 16 bytes of that row that are the thread's.
template <typename T>
class FusedOp<jax_gemma_arf::kGemmaPattern, T> {
  static constexpr int kCount = details::kBytesPerAccess / sizeof(T);

 public:
  __device__ __forceinline__ FusedOp(const AllReduceFusionParams<T>& params, int access_id,
                                     int access_id_in_token)
      : tail_(params.tail),
        access_id_(access_id),
        epilogue_(params.tail, access_id_in_token * kCount, SharedMemory()) {
    epilogue_.Prefetch(Index());
  }

  __device__ __forceinline__ void update(int access_id) {
    if (access_id == access_id_) return;
    access_id_ = access_id;
    epilogue_.Prefetch(Index());
  }

  __device__ __forceinline__ void operator()(vec_t<T, kCount> row, int /*token*/) {
    epilogue_.Await();
    const jax_gemma_arf::Words<4> reduced[1] = {
        reinterpret_cast<const jax_gemma_arf::Words<4>&>(row)};
    float out[kCount];
    epilogue_.Finish(reduced, out);
    jax_gemma_arf::Write(tail_.out, tail_.out_dtype, Index(), out);
    epilogue_.NextNorms(out, Index());
  }

 private:
  __device__ __forceinline__ int64_t Index() const { return int64_t{access_id_} * kCount; }
  static __device__ __forceinline__ void* SharedMemory() {
    extern __shared__ jax_gemma_arf::Words<4> shared[];
    return shared;
  }

  const jax_gemma_arf::Tail& tail_;
  int access_id_;
  jax_gemma_arf::Epilogue<T, 1> epilogue_;
};

}  // namespace flashinfer::trtllm_allreduce_fusion

namespace jax_gemma_arf {
namespace {

// The slots of one rank. FlashInfer finds everything through the table: data, flags and Lamport
// buffers of every rank, then this rank's control words.
struct Layout {
  int64_t control = 0;
  int64_t table;
  int64_t flags;
  int64_t data;
  int64_t total;

  explicit Layout(const SlotSpec& spec) {
    const auto align = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
    const bool one_shot = spec.algorithm == Algorithm::kOneShot;
    table = align(5 * sizeof(int32_t));
    flags = table + align((3 * spec.nranks + 1) * sizeof(void*));
    data = flags + align(fi::details::kBarrierFlagCount * spec.nranks * sizeof(int32_t));
    // Lamport: three generations of a message from every rank. Two-shot: a message and its sum.
    total = data + (one_shot ? 3 * spec.nranks : 2) * spec.capacity;
  }
};

__global__ void FillWords(uint32_t* words, int64_t count, uint32_t word) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    words[i] = word;
  }
}

template <typename T, int kRanks>
cudaError_t EnqueueAs(const Launch& launch, cudaStream_t stream) {
  fi::AllReduceFusionParams<T> params{};
  params.rank = launch.rank;
  params.size = launch.tokens * launch.width;
  params.hidden_dim = launch.width;
  const Layout layout({launch.kind.algorithm, kRanks, launch.peers.capacity, sizeof(T)});
  params.workspace = reinterpret_cast<void**>(launch.peers.slots[launch.rank] + layout.table);
  params.allreduce_in = const_cast<void*>(launch.x[0]);
  params.tail = launch.tail;

  // Two-shot: rank r reduces the tokens [begin[r], begin[r] + count[r]).
  std::array<int, kRanks> begin{}, count{};
  for (int r = 0, next = 0; r < kRanks; ++r) {
    begin[r] = next;
    count[r] = launch.tokens / kRanks + (r < launch.tokens % kRanks ? 1 : 0);
    next += count[r];
  }
  void* args[] = {&params, &begin, &count};

  const Grid grid = GridOf(launch);
  cudaLaunchAttribute cluster = ClusterAttribute(grid.cluster);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelExC(&config, KernelOf(launch.kind), args);
}

}  // namespace

const void* KernelOf(const KernelKind& kind) {
  return Dispatch(kind, [&](auto zero, auto ranks) {
    using T = decltype(zero);
    constexpr int kRanks = decltype(ranks)::value;
    constexpr bool kFloatSum = !std::is_same_v<T, float>;  // float is summed in float anyway
    return kind.algorithm == Algorithm::kOneShot
               ? reinterpret_cast<const void*>(
                     fi::allreduce_fusion_kernel_oneshot_lamport<kGemmaPattern, T, kRanks,
                                                                 kFloatSum>)
               : reinterpret_cast<const void*>(
                     fi::allreduce_fusion_kernel_twoshot_sync<kGemmaPattern, T, kRanks, kFloatSum>);
  });
}

// Not programmatic: the kernels trigger their successors before all of their blocks have written,
// and XLA's kernels may read what they take for constant before they wait.
const Implementation kImplementation = {"jax_gemma_arf.flashinfer_tail",
                                        "jax_gemma_arf.flashinfer_loopback_tail",
                                        "jax_gemma_arf.FlashInferCall",
                                        "jax_gemma_arf.FlashInferLoopbackCall",
                                        /*programmatic=*/false,
                                        /*slots_by_item_size=*/true,
                                        /*max_branches=*/1,
                                        fi::details::kBarrierFlagCount};

int64_t SlotBytes(const SlotSpec& spec) { return Layout(spec).total; }

// A Lamport buffer is empty where it holds -0.0.
cudaError_t FillSlots(const SlotSpec& spec, char* slots, cudaStream_t stream) {
  const Layout layout(spec);
  cudaError_t error = cudaMemsetAsync(slots, 0, layout.data, stream);
  if (error != cudaSuccess || spec.algorithm == Algorithm::kTwoShot) return error;
  const uint32_t word = spec.item_size == 4 ? 0x80000000u : 0x80008000u;
  FillWords<<<256, 256, 0, stream>>>(reinterpret_cast<uint32_t*>(slots + layout.data),
                                     (layout.total - layout.data) / 4, word);
  return cudaGetLastError();
}

cudaError_t ConnectSlots(const SlotSpec& spec, int rank, char* const* slots) {
  const Layout layout(spec);
  const int n = spec.nranks;
  std::vector<void*> table(3 * n + 1);
  for (int r = 0; r < n; ++r) {
    table[r] = table[2 * n + r] = slots[r] + layout.data;
    table[n + r] = slots[r] + layout.flags;
  }
  table[3 * n] = slots[rank] + layout.control;
  // Blocks that have arrived, barrier flag, generation; bytes of a generation; elements to clear.
  const int32_t control[5] = {0, 0, 0, static_cast<int32_t>(n * spec.capacity), 0};
  cudaError_t error = cudaMemcpy(slots[rank] + layout.table, table.data(),
                                 table.size() * sizeof(void*), cudaMemcpyHostToDevice);
  if (error == cudaSuccess) {
    error =
        cudaMemcpy(slots[rank] + layout.control, control, sizeof(control), cudaMemcpyHostToDevice);
  }
  return error;
}

cudaError_t Enqueue(const Launch& launch, bool /*programmatic*/, cudaStream_t stream) {
  return Dispatch(launch.kind, [&](auto zero, auto ranks) {
    return EnqueueAs<decltype(zero), decltype(ranks)::value>(launch, stream);
  });
}

cudaError_t FindCode(const KernelKind&, KernelCode*) { return cudaErrorNotSupported; }

cudaError_t PreloadHelpers() {
  cudaFuncAttributes attributes;  // asking for them loads a kernel
  return cudaFuncGetAttributes(&attributes, FillWords);
}

}  // namespace jax_gemma_arf
