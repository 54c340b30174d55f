// FlashInfer's all-reduce kernels for bfloat16, launched as its own launcher launches them, and the
// wire: the least that any all-reduce must send.
#include "kernels.h"

#include <algorithm>
#include <array>

#include "flashinfer/comm/trtllm_allreduce_fusion.cuh"

namespace rivals {
namespace {

namespace fi = flashinfer::trtllm_allreduce_fusion;
using T = __nv_bfloat16;
using Pattern = fi::AllReduceFusionPattern;

constexpr int kElements = 16 / sizeof(T);  // of one access
constexpr int kWireThreads = 512;

// One launch of FlashInfer. allreduce_fusion_kernel_launcher is followed step by step but not
// called: in loopback it would start more blocks than can be resident together. Without
// programmatic dependent launch, which has no neighbour to overlap with in XLA's graphs.
template <Pattern kPattern, int kRanks>
cudaError_t EnqueueFlashInfer(const Launch& launch, cudaStream_t stream) {
  fi::AllReduceFusionParams<T> params{};
  params.nranks = kRanks;
  params.rank = launch.rank;
  params.size = launch.tokens * launch.width;
  params.hidden_dim = launch.width;
  params.workspace = launch.table;
  params.allreduce_in = const_cast<void*>(launch.x);
  params.allreduce_out = launch.out;
  params.residual_in = const_cast<void*>(launch.residual);
  params.residual_out = launch.sum;
  params.norm_out = launch.out;
  params.rms_gamma = const_cast<void*>(launch.norm_scale);
  params.rms_eps = launch.eps;

  const void* kernel =
      launch.one_shot ? reinterpret_cast<const void*>(
                            fi::allreduce_fusion_kernel_oneshot_lamport<kPattern, T, kRanks, true>)
                      : reinterpret_cast<const void*>(
                            fi::allreduce_fusion_kernel_twoshot_sync<kPattern, T, kRanks, true>);
  std::array<int, kRanks> begin{}, count{};
  int rows = launch.tokens;
  if (!launch.one_shot) {
    rows = (launch.tokens + kRanks - 1) / kRanks;
    for (int r = 0, next = 0; r < kRanks; ++r) {
      begin[r] = next;
      count[r] = launch.tokens / kRanks + (r < launch.tokens % kRanks ? 1 : 0);
      next += count[r];
    }
  }
  void* args[] = {&params, &begin, &count};

  cudaFuncAttributes attributes;
  int device = 0, multiprocessors = 0, registers = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&registers, cudaDevAttrMaxRegistersPerBlock, device);
  }
  if (error != cudaSuccess) return error;

  int cluster = 8;
  int threads = launch.width / kElements;
  while (threads % cluster != 0) cluster /= 2;
  threads /= cluster;
  while (threads < 128 && cluster >= 2) threads *= 2, cluster /= 2;
  const int most_threads = std::min(registers / attributes.numRegs, 1024);
  while (rows * cluster > multiprocessors && cluster > 1 && threads <= most_threads / 2) {
    threads *= 2, cluster /= 2;
  }

  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int blocks = std::min(multiprocessors, rows * cluster);
  if (launch.sharing > 1) {
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess) return error;
    blocks = std::min(blocks, clusters * cluster / launch.sharing);
  }
  config.gridDim = dim3(blocks / cluster * cluster);
  return cudaLaunchKernelExC(&config, kernel, args);
}

template <int kRanks>
cudaError_t EnqueueRanks(const Launch& launch, cudaStream_t stream) {
  return launch.kind == Kind::kAllReduce
             ? EnqueueFlashInfer<Pattern::kAllReduce, kRanks>(launch, stream)
             : EnqueueFlashInfer<Pattern::kARResidualRMSNorm, kRanks>(launch, stream);
}

// Every block sends its share to all peers, then tells their blocks of the same index and waits for
// them. All blocks of all ranks must be resident together.
__global__ void __launch_bounds__(kWireThreads)
    WireKernel(Wire wire, int rank, int ranks, const uint4* x, int64_t vectors) {
  constexpr int kUnroll = 4;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int step = 1; step < ranks; ++step) {
    const int peer = (rank + step) % ranks;
    auto* slot = reinterpret_cast<uint4*>(wire.mailbox[peer] + rank * wire.slot_bytes);
    for (int64_t i = first; i < vectors; i += kUnroll * stride) {
      uint4 values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * stride < vectors) values[u] = x[i + u * stride];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (i + u * stride < vectors) slot[i + u * stride] = values[u];
      }
    }
  }
  __shared__ uint32_t epoch;
  if (threadIdx.x == 0) epoch = ++wire.epochs[blockIdx.x];
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer < ranks && peer != rank) {
    uint32_t* theirs = wire.flags[peer] + blockIdx.x * ranks + rank;
    const uint32_t* mine = wire.flags[rank] + blockIdx.x * ranks + peer;
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(theirs), "r"(epoch) : "memory");
    uint32_t seen;
    do {
      asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(mine) : "memory");
    } while (static_cast<int32_t>(seen - epoch) < 0);
  }
}

cudaError_t EnqueueWire(const Launch& launch, cudaStream_t stream) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  const int64_t message = int64_t{launch.tokens} * launch.width * int64_t{sizeof(T)};
  const int64_t vectors = WireBytes(message, launch.ranks) / 16;
  const int64_t most = std::min(multiprocessors / launch.sharing, kMaxBlocks);
  const auto blocks = std::min((vectors + kWireThreads - 1) / kWireThreads, most);
  WireKernel<<<static_cast<int>(blocks), kWireThreads, 0, stream>>>(
      launch.wire, launch.rank, launch.ranks, static_cast<const uint4*>(launch.x), vectors);
  return cudaGetLastError();
}

__global__ void FillNegativeZeroKernel(uint32_t* words, int64_t count) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
    words[i] = 0x80008000u;
  }
}

template <int kRanks>
cudaError_t PreloadRanks() {
  cudaFuncAttributes attributes;  // asking for them loads a kernel
  for (const void* kernel :
       {reinterpret_cast<const void*>(
            fi::allreduce_fusion_kernel_oneshot_lamport<Pattern::kAllReduce, T, kRanks, true>),
        reinterpret_cast<const void*>(
            fi::allreduce_fusion_kernel_twoshot_sync<Pattern::kAllReduce, T, kRanks, true>),
        reinterpret_cast<const void*>(fi::allreduce_fusion_kernel_oneshot_lamport<
                                      Pattern::kARResidualRMSNorm, T, kRanks, true>),
        reinterpret_cast<const void*>(fi::allreduce_fusion_kernel_twoshot_sync<
                                      Pattern::kARResidualRMSNorm, T, kRanks, true>)}) {
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t Enqueue(const Launch& launch, cudaStream_t stream) {
  if (launch.kind == Kind::kWire) return EnqueueWire(launch, stream);
  switch (launch.ranks) {
    case 2: return EnqueueRanks<2>(launch, stream);
    case 4: return EnqueueRanks<4>(launch, stream);
    default: return EnqueueRanks<8>(launch, stream);
  }
}

cudaError_t Preload() {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, WireKernel);
  if (error == cudaSuccess) error = PreloadRanks<2>();
  if (error == cudaSuccess) error = PreloadRanks<4>();
  if (error == cudaSuccess) error = PreloadRanks<8>();
  return error;
}

cudaError_t FillNegativeZero(void* buffer, int64_t bytes) {
  FillNegativeZeroKernel<<<256, 256>>>(static_cast<uint32_t*>(buffer), bytes / 4);
  return cudaGetLastError();
}

}  // namespace rivals
