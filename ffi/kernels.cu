// Instantiations of FlashInfer's all-reduce kernels with the Gemma epilogue, and their launch.
#include "kernels.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "epilogue.cuh"

namespace jax_gemma_arf {
namespace {

namespace fi = flashinfer::trtllm_allreduce_fusion;

// 672 threads hold a bfloat16 row of 31B (D = 5376) in one block. They are 21 warps, six of them on
// one quarter of a multiprocessor, whose 16384 registers give each thread 80: the limit that the
// build sets (CMakeLists.txt), so that every instantiation can launch.
constexpr int kMaxThreads = 672;

static_assert(kMaxCtas == fi::details::kBarrierFlagCount,
              "FlashInfer's barrier writes as many flags as it counts, whatever the grid");

// A row is 16 bytes a thread: one block if it fits, else a cluster of 2, 4 or 8. The choice depends
// on hidden and the dtype alone, and with it the order of the float32 row sum.
struct RowShape {
  int threads;
  int cluster;
};

RowShape ShapeOfRow(Dtype dtype, int hidden) {
  const int threads = hidden * ItemSize(dtype) / fi::details::kBytesPerAccess;
  int cluster = 1;
  while (threads / cluster > kMaxThreads) cluster *= 2;
  return {threads / cluster, cluster};
}

cudaLaunchAttribute ClusterAttribute(const RowShape& shape) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  return attribute;
}

template <typename T, int kRanks>
const void* KernelAs(Algorithm algorithm) {
  constexpr bool kFloatSum = !std::is_same_v<T, float>;  // float is summed in float anyway
  return algorithm == Algorithm::kOneShot
             ? reinterpret_cast<const void*>(
                   fi::allreduce_fusion_kernel_oneshot_lamport<kGemmaPattern, T, kRanks, kFloatSum>)
             : reinterpret_cast<const void*>(
                   fi::allreduce_fusion_kernel_twoshot_sync<kGemmaPattern, T, kRanks, kFloatSum>);
}

template <typename T, int kRanks>
cudaError_t EnqueueAs(const Launch& launch, cudaStream_t stream) {
  const RowShape shape = ShapeOfRow(launch.kind.dtype, launch.hidden);
  FusionParams<T> params{};
  params.nranks = kRanks;
  params.rank = launch.rank;
  params.size = launch.tokens * launch.hidden;
  params.hidden_dim = launch.hidden;
  params.workspace = launch.workspace;
  params.allreduce_in = const_cast<void*>(launch.x);
  SetEpilogue(params, launch.epilogue);

  // Two-shot: rank r reduces tokens [begin[r], begin[r] + count[r]).
  std::array<int, kRanks> begin{}, count{};
  int rows = launch.tokens;
  void* args[] = {&params, &begin, &count};
  if (launch.kind.algorithm == Algorithm::kTwoShot) {
    rows = (launch.tokens + kRanks - 1) / kRanks;
    for (int r = 0, next = 0; r < kRanks; ++r) {
      begin[r] = next;
      count[r] = launch.tokens / kRanks + (r < launch.tokens % kRanks ? 1 : 0);
      next += count[r];
    }
  }

  cudaLaunchAttribute cluster = ClusterAttribute(shape);
  cudaLaunchConfig_t config{};
  const int clusters = std::min(rows, std::min(launch.max_ctas, kMaxCtas) / shape.cluster);
  config.gridDim = dim3(clusters * shape.cluster);
  config.blockDim = dim3(shape.threads);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelExC(&config, KernelAs<T, kRanks>(launch.kind.algorithm), args);
}

// Calls `visit` with a T and an integral constant for the ranks.
template <typename Visit>
auto Dispatch(const KernelKind& kind, Visit visit) {
  const auto ranks = [&](auto t) {
    switch (kind.nranks) {
      case 2: return visit(t, std::integral_constant<int, 2>{});
      case 4: return visit(t, std::integral_constant<int, 4>{});
      default: return visit(t, std::integral_constant<int, 8>{});
    }
  };
  switch (kind.dtype) {
    case Dtype::kBFloat16: return ranks(__nv_bfloat16{});
    case Dtype::kFloat16: return ranks(__half{});
    default: return ranks(float{});
  }
}

const void* KernelOf(const KernelKind& kind) {
  return Dispatch(kind, [&](auto t, auto ranks) {
    return KernelAs<decltype(t), decltype(ranks)::value>(kind.algorithm);
  });
}

__global__ void FillNegativeZeroKernel(uint32_t* words, int64_t count, uint32_t pattern) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    words[i] = pattern;
  }
}

}  // namespace

cudaError_t Enqueue(const Launch& launch, cudaStream_t stream) {
  return Dispatch(launch.kind, [&](auto t, auto ranks) {
    return EnqueueAs<decltype(t), decltype(ranks)::value>(launch, stream);
  });
}

cudaError_t Preload() {
  cudaFuncAttributes attributes;  // asking for them loads a kernel
  cudaError_t error = cudaFuncGetAttributes(&attributes, FillNegativeZeroKernel);
  for (const Algorithm algorithm : {Algorithm::kOneShot, Algorithm::kTwoShot}) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (const int nranks : {2, 4, 8}) {
        if (error != cudaSuccess) return error;
        error = cudaFuncGetAttributes(&attributes, KernelOf({algorithm, dtype, nranks}));
      }
    }
  }
  return error;
}

cudaError_t ResidentCtas(const KernelKind& kind, int hidden, int* ctas) {
  const RowShape shape = ShapeOfRow(kind.dtype, hidden);
  if (shape.cluster > 1) {
    cudaLaunchAttribute cluster = ClusterAttribute(shape);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.cluster);
    config.blockDim = dim3(shape.threads);
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(ctas, KernelOf(kind), &config);
    *ctas *= shape.cluster;
    return error;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, KernelOf(kind), shape.threads, 0);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *ctas *= multiprocessors;
  return error;
}

cudaError_t FillNegativeZero(void* buffer, int64_t bytes, int item_size, cudaStream_t stream) {
  const uint32_t pattern = item_size == 4 ? 0x80000000u : 0x80008000u;
  FillNegativeZeroKernel<<<256, 256, 0, stream>>>(static_cast<uint32_t*>(buffer), bytes / 4,
                                                  pattern);
  return cudaGetLastError();
}

}  // namespace jax_gemma_arf
