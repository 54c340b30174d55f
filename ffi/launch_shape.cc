#include "launch_shape.h"

#include <algorithm>

namespace jax_gemma_arf {
namespace {

// 672 threads hold a bfloat16 row of 31B (D = 5376) in one block. They are 21 warps, six of them on
// one quarter of a multiprocessor, whose 16384 registers give each thread 80: the limit that the
// build sets (CMakeLists.txt), so that every instantiation can launch.
constexpr int kMaxThreads = 672;

// A row is 16 bytes a thread: one block if it fits, else a cluster of 2, 4 or 8. The choice depends
// on width and the dtype alone, and with it the order of the float32 row sum.
struct RowShape {
  int threads;
  int cluster;
};

RowShape ShapeOfRow(Dtype dtype, int width) {
  const int threads = width * ItemSize(dtype) / kVectorBytes;
  int cluster = 1;
  while (threads / cluster > kMaxThreads) cluster *= 2;
  return {threads / cluster, cluster};
}

// Shared memory of a block: the scales of its norms (Epilogue).
int SharedBytes(const KernelKind& kind, int threads, int next_norms) {
  const int scales = OwnScales(kind.branches) + next_norms;
  return scales * threads * (kVectorBytes / ItemSize(kind.dtype)) * static_cast<int>(sizeof(float));
}

}  // namespace

cudaLaunchAttribute ClusterAttribute(int cluster) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  return attribute;
}

Grid GridOf(const Launch& launch) {
  const RowShape shape = ShapeOfRow(launch.kind.dtype, launch.width);
  const bool one_shot = launch.kind.algorithm == Algorithm::kOneShot;
  const int units =
      one_shot ? launch.tokens : (launch.tokens + launch.kind.nranks - 1) / launch.kind.nranks;
  return {std::min(units, launch.max_ctas / shape.cluster) * shape.cluster, shape.threads,
          shape.cluster, SharedBytes(launch.kind, shape.threads, launch.tail.next_norms)};
}

cudaError_t Preload() {
  cudaError_t error = PreloadHelpers();
  for (const Algorithm algorithm : {Algorithm::kOneShot, Algorithm::kTwoShot}) {
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      for (const int nranks : kRankCounts) {
        for (int branches = 1; branches <= kImplementation.max_branches; ++branches) {
          if (error != cudaSuccess) return error;
          const KernelKind kind{algorithm, dtype, nranks, branches};
          // Setting an attribute loads the kernel.
          error = cudaFuncSetAttribute(KernelOf(kind), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       SharedBytes(kind, kMaxThreads, kMaxNextNorms));
        }
      }
    }
  }
  return error;
}

cudaError_t ResidentCtas(const KernelKind& kind, int width, int next_norms, int* ctas) {
  const RowShape shape = ShapeOfRow(kind.dtype, width);
  const int shared = SharedBytes(kind, shape.threads, next_norms);
  if (shape.cluster > 1) {
    cudaLaunchAttribute cluster = ClusterAttribute(shape.cluster);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(shape.cluster);
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shared;
    config.attrs = &cluster;
    config.numAttrs = 1;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(ctas, KernelOf(kind), &config);
    *ctas *= shape.cluster;
    return error;
  }
  int device = 0, multiprocessors = 0;
  cudaError_t error =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(ctas, KernelOf(kind), shape.threads, shared);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  *ctas *= multiprocessors;
  return error;
}

}  // namespace jax_gemma_arf
