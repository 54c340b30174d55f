// Gemma epilogues for FlashInfer's fused all-reduce kernels.
//
// FlashInfer separates the communication (one-shot Lamport, two-shot barrier) from what happens to
// a reduced row, `FusedOp<Pattern, T>`. The specialisation below makes that
//
//     out = (rmsnorm(row) * (scale_offset + norm_scale) + residual) * layer_scalar
//
// where FlashInfer's own patterns compute rmsnorm(row + residual), which is a different function.
#pragma once

#include <cooperative_groups.h>

#include "flashinfer/comm/trtllm_allreduce_fusion.cuh"
#include "kernels.h"

namespace jax_gemma_arf {

// nvcc 13.0 writes a host stub that does not compile for a pattern that is no enumerator, so the
// epilogue takes over one that this library has no other use for. Symbols are hidden, so no other
// FlashInfer in the process can meet this specialisation.
inline constexpr auto kGemmaPattern = flashinfer::trtllm_allreduce_fusion::AllReduceFusionPattern::
    kARResidualRMSNormOutDynamicFP8Quant;

template <typename T>
using FusionParams = flashinfer::trtllm_allreduce_fusion::AllReduceFusionParams<T>;

// Where the epilogue's arguments travel in FlashInfer's parameter struct. The kernels pass the
// struct through unread, except for rank, size, hidden_dim, workspace and allreduce_in.
template <typename T>
inline void SetEpilogue(FusionParams<T>& params, const Epilogue& epilogue) {
  params.residual_in = const_cast<void*>(epilogue.residual.data);
  params.rms_gamma = const_cast<void*>(epilogue.norm_scale.data);
  params.quant_out = const_cast<void*>(epilogue.layer_scalar.data);
  params.norm_out = epilogue.out;
  params.rms_eps = epilogue.eps;
  params.weight_bias = epilogue.scale_offset;
  params.block_quant_group_size = static_cast<int>(epilogue.residual.dtype) |
                                  static_cast<int>(epilogue.norm_scale.dtype) << 8 |
                                  static_cast<int>(epilogue.layer_scalar.dtype) << 16;
}

template <typename T>
__device__ __forceinline__ Dtype ResidualDtype(const FusionParams<T>& params) {
  return static_cast<Dtype>(params.block_quant_group_size & 0xff);
}
template <typename T>
__device__ __forceinline__ Dtype NormScaleDtype(const FusionParams<T>& params) {
  return static_cast<Dtype>((params.block_quant_group_size >> 8) & 0xff);
}
template <typename T>
__device__ __forceinline__ Dtype LayerScalarDtype(const FusionParams<T>& params) {
  return static_cast<Dtype>((params.block_quant_group_size >> 16) & 0xff);
}

// Reads `kCount` consecutive elements, element `index` first, as float32.
template <int kCount>
__device__ __forceinline__ void LoadAsFloat(float (&values)[kCount], const void* data, Dtype dtype,
                                            int64_t index) {
  const auto load = [&](auto zero) {
    using S = decltype(zero);
    flashinfer::vec_t<S, kCount> vec;
    vec.load(static_cast<const S*>(data) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(vec[i]);
  };
  switch (dtype) {
    case Dtype::kBFloat16: return load(__nv_bfloat16{});
    case Dtype::kFloat16: return load(__half{});
    case Dtype::kFloat32: return load(float{});
  }
}

// Rounds once, to `dtype`, and writes.
template <int kCount>
__device__ __forceinline__ void StoreFromFloat(const float (&values)[kCount], void* data,
                                               Dtype dtype, int64_t index) {
  const auto store = [&](auto zero) {
    using S = decltype(zero);
    flashinfer::vec_t<S, kCount> vec;
#pragma unroll
    for (int i = 0; i < kCount; ++i) vec[i] = static_cast<S>(values[i]);
    vec.store(static_cast<S*>(data) + index);
  };
  switch (dtype) {
    case Dtype::kBFloat16: return store(__nv_bfloat16{});
    case Dtype::kFloat16: return store(__half{});
    case Dtype::kFloat32: return store(float{});
  }
}

// Sum over the threads that hold one row: one block, or a cluster of blocks.
//
// The order of the additions depends on hidden_dim and T alone, so a row's result does not depend
// on how many rows share the launch, on its place among them, or on one-shot versus two-shot. The
// partial sums are double buffered: one barrier a row is enough, since a buffer is written again
// only after the barrier of the row in between.
class RowSum {
 public:
  __device__ __forceinline__ float operator()(float value) {
    __shared__ float warp_sums[2][32];
    __shared__ float block_sum[2];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warps = (blockDim.x + 31) / 32;
    const int lanes = min(32, static_cast<int>(blockDim.x) - warp * 32);
    const unsigned mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      // The last warp may be partial; a lane that is not there must not contribute.
      const float other = __shfl_down_sync(mask, value, offset);
      if (lane + offset < lanes) value += other;
    }
    if (lane == 0) warp_sums[parity_][warp] = value;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < warps; ++w) sum += warp_sums[parity_][w];

    auto cluster = cooperative_groups::this_cluster();
    if (cluster.num_blocks() > 1) {
      if (threadIdx.x == 0) block_sum[parity_] = sum;
      cluster.sync();
      sum = 0.f;
      for (unsigned b = 0; b < cluster.num_blocks(); ++b) {
        sum += *cluster.map_shared_rank(&block_sum[parity_], b);
      }
    }
    parity_ ^= 1;
    return sum;
  }

  // A block must not exit while a block of its cluster can still read its shared memory.
  __device__ __forceinline__ ~RowSum() {
    auto cluster = cooperative_groups::this_cluster();
    if (cluster.num_blocks() > 1) cluster.sync();
  }

 private:
  int parity_ = 0;
};

}  // namespace jax_gemma_arf

namespace flashinfer::trtllm_allreduce_fusion {

// The kernels construct one FusedOp per thread after the grid dependency sync, call update(index)
// before they wait for a row's data, and operator() with the reduced 16 bytes of that row.
template <typename T>
class FusedOp<jax_gemma_arf::kGemmaPattern, T> {
  static constexpr int kCount = details::kBytesPerAccess / sizeof(T);

 public:
  __device__ __forceinline__ FusedOp(AllReduceFusionParams<T> const& params, int access_id,
                                     int access_id_in_token)
      : params_(params), access_id_(access_id) {
    using namespace jax_gemma_arf;
    LoadAsFloat(scale_, params.rms_gamma, NormScaleDtype(params), access_id_in_token * kCount);
#pragma unroll
    for (int i = 0; i < kCount; ++i) scale_[i] += params.weight_bias;
    if (params.quant_out != nullptr) {
      float scalar[1];
      LoadAsFloat(scalar, params.quant_out, LayerScalarDtype(params), 0);
      layer_scalar_ = scalar[0];
    }
    LoadResidual();
  }

  __device__ __forceinline__ void update(int access_id) {
    if (access_id == access_id_) return;
    access_id_ = access_id;
    LoadResidual();
  }

  __device__ __forceinline__ void operator()(vec_t<T, kCount> row, int /*token_id*/) {
    float values[kCount];
    float square_sum = 0.f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<float>(row[i]);
      square_sum += values[i] * values[i];
    }
    const float mean = row_sum_(square_sum) / params_.hidden_dim;
    const float inverse_rms = rsqrtf(mean + params_.rms_eps);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      values[i] = values[i] * inverse_rms * scale_[i] + residual_[i];
    }
    if (params_.quant_out != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] *= layer_scalar_;
    }
    jax_gemma_arf::StoreFromFloat(values, params_.norm_out, jax_gemma_arf::ResidualDtype(params_),
                                  static_cast<int64_t>(access_id_) * kCount);
  }

 private:
  __device__ __forceinline__ void LoadResidual() {
    jax_gemma_arf::LoadAsFloat(residual_, params_.residual_in,
                               jax_gemma_arf::ResidualDtype(params_),
                               static_cast<int64_t>(access_id_) * kCount);
  }

  AllReduceFusionParams<T> const& params_;
  int access_id_;
  float scale_[kCount];
  float residual_[kCount];
  float layer_scalar_ = 1.f;
  jax_gemma_arf::RowSum row_sum_;
};

}  // namespace flashinfer::trtllm_allreduce_fusion
