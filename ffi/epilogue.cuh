// What becomes of a reduced row while it is in registers: see Tail in kernels.h.
//
// A row is spread over the threads of a block, or of a cluster of blocks, 16 bytes of partial sums
// a thread. Gemma norms first and then adds the residual; the kernels that other models use compute
// rmsnorm(row + residual), which is a different function.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "exchange.cuh"
#include "kernels.h"

namespace jax_gemma_arf {

inline constexpr int kVectorBytes = 16;

// Calls `visit` with a zero of the C++ type of dtype.
template <typename Visit>
__device__ __forceinline__ void VisitDtype(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::kBFloat16: return visit(__nv_bfloat16{});
    case Dtype::kFloat16: return visit(__half{});
    case Dtype::kFloat32: return visit(float{});
  }
}

// `kCount` elements of type S as words, and their values.
template <typename S, int kCount>
union Packed {
  static constexpr int kWords = kCount * sizeof(S) / 4;
  Words<kWords> words;
  S elements[kCount];

  __device__ __forceinline__ Packed() {}
};

// Reads `kCount` consecutive elements, element `index` first, as float32.
template <int kCount>
__device__ __forceinline__ void LoadAsFloat(float (&values)[kCount], const Operand& operand,
                                            int64_t index) {
  VisitDtype(operand.dtype, [&](auto zero) {
    using S = decltype(zero);
    using Row = Packed<S, kCount>;
    Row row;
    row.words =
        *reinterpret_cast<const Words<Row::kWords>*>(static_cast<const S*>(operand.data) + index);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(row.elements[i]);
  });
}

// Rounds once, to `dtype`, and writes at element `index`. `values` is then what was written. `also`
// gets the words.
template <int kCount, typename Also>
__device__ __forceinline__ void Write(void* data, Dtype dtype, int64_t index,
                                      float (&values)[kCount], Also also) {
  VisitDtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    using Row = Packed<S, kCount>;
    Row row;
#pragma unroll
    for (int i = 0; i < kCount; ++i) row.elements[i] = static_cast<S>(values[i]);
    also(row.words);
    *reinterpret_cast<Words<Row::kWords>*>(static_cast<S*>(data) + index) = row.words;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = static_cast<float>(row.elements[i]);
  });
}

template <int kCount>
__device__ __forceinline__ void Write(void* data, Dtype dtype, int64_t index,
                                      float (&values)[kCount]) {
  Write(data, dtype, index, values, [](const auto&) {});
}

__device__ __forceinline__ float LoadScalar(const Operand& operand) {
  float value = 0.f;
  VisitDtype(operand.dtype, [&](auto zero) {
    value = static_cast<float>(*static_cast<const decltype(zero)*>(operand.data));
  });
  return value;
}

// Sums over the threads that hold one row: one block, or a cluster of blocks.
//
// The order of the additions depends on hidden and the dtype alone, so a row's result does not
// depend on how many rows share the launch, on its place among them, or on the algorithm. The
// partial sums are double buffered: one barrier a sum is enough, since a buffer is written again
// only after the barrier of the sum in between.
template <int kMaxSums>
class RowSum {
 public:
  template <int kSums>
  __device__ __forceinline__ void operator()(float (&values)[kSums]) {
    static_assert(kSums <= kMaxSums);
    __shared__ float warp_sums[2][kMaxSums][32];
    __shared__ float block_sum[2][kMaxSums];
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warps = (blockDim.x + 31) / 32;
    const int lanes = min(32, static_cast<int>(blockDim.x) - warp * 32);
    const unsigned mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        // The last warp may be partial; a lane that is not there must not contribute.
        const float other = __shfl_down_sync(mask, values[s], offset);
        if (lane + offset < lanes) values[s] += other;
      }
      if (lane == 0) warp_sums[parity_][s][warp] = values[s];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (blockDim.x % 32 == 0) {  // every warp has a lane for every warp's sum
        values[s] = lane < warps ? warp_sums[parity_][s][lane] : 0.f;
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) {
          values[s] += __shfl_xor_sync(mask, values[s], offset);
        }
      } else {
        values[s] = 0.f;
        for (int w = 0; w < warps; ++w) values[s] += warp_sums[parity_][s][w];
      }
    }
    auto cluster = cooperative_groups::this_cluster();
    if (cluster.num_blocks() > 1) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        if (threadIdx.x == 0) block_sum[parity_][s] = values[s];
      }
      cluster.sync();
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        values[s] = 0.f;
        for (unsigned b = 0; b < cluster.num_blocks(); ++b) {
          values[s] += *cluster.map_shared_rank(&block_sum[parity_][s], b);
        }
      }
    }
    parity_ ^= 1;
  }

  // A block must not exit while a block of its cluster can still read its shared memory.
  __device__ __forceinline__ ~RowSum() {
    auto cluster = cooperative_groups::this_cluster();
    if (cluster.num_blocks() > 1) cluster.sync();
  }

 private:
  int parity_ = 0;
};

// The epilogue of one thread. All members are called by all threads of a row together.
template <typename T, int kBranches>
class Epilogue {
 public:
  static constexpr int kCount = kVectorBytes / sizeof(T);

  static constexpr int kOwnScales = OwnScales(kBranches);

  // Reads what all rows share. `column` is this thread's first element of a row. `scales` is shared
  // memory for [kOwnScales + next_norms] rows of the block's elements: in registers they would
  // spill.
  __device__ __forceinline__ Epilogue(const Tail& tail, int hidden, int column, float4* scales)
      : tail_(tail), scales_(scales), mean_(1.f / static_cast<float>(hidden)) {
    KeepScale(0, tail.scale, column);
#pragma unroll
    for (int b = 1; b < kOwnScales; ++b) KeepScale(b, tail.branch_scale[b - 1], column);
    for (int n = 0; n < tail.next_norms; ++n) {
      KeepScale(kOwnScales + n, tail.next_scale[n], column);
    }
    if (tail.layer_scalar.data != nullptr) layer_scalar_ = LoadScalar(tail.layer_scalar);
  }

  // Reads the residual at `index`, the thread's first element of its row in [tokens, hidden].
  __device__ __forceinline__ void Prefetch(int64_t index) {
    if (tail_.residual.data != nullptr) LoadAsFloat(residual_, tail_.residual, index);
  }

  // From the reduced rows to hidden, in float32. Uses what Prefetch has read.
  __device__ __forceinline__ void Hidden(const Packed<T, kCount> (&reduced)[kBranches],
                                         float (&hidden)[kCount]) {
    float rows[kBranches][kCount], inverse_rms[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) rows[b][i] = static_cast<float>(reduced[b].elements[i]);
    }
    InverseRms(rows, inverse_rms);
    if constexpr (kBranches > 1) {
#pragma unroll
      for (int b = 0; b < kBranches; ++b) Scale(rows[b], inverse_rms[b], 1 + b);
#pragma unroll
      for (int i = 0; i < kCount; ++i) rows[0][i] += rows[1][i];
      float sum_inverse_rms[1];
      InverseRms(reinterpret_cast<float (&)[1][kCount]>(rows[0]), sum_inverse_rms);
      inverse_rms[0] = sum_inverse_rms[0];
    }
    Scale(rows[0], inverse_rms[0], 0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) hidden[i] = rows[0][i];
    if (tail_.residual.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) hidden[i] += residual_[i];
    }
    if (tail_.layer_scalar.data != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) hidden[i] *= layer_scalar_;
    }
  }

  // The norms that the next layers start with, of the row as it was rounded: what they would read.
  __device__ __forceinline__ void NextNorms(float (&hidden)[kCount], int64_t index) {
    if (tail_.next_norms == 0) return;
    float inverse_rms[1];
    InverseRms(reinterpret_cast<float (&)[1][kCount]>(hidden), inverse_rms);
    for (int n = 0; n < tail_.next_norms; ++n) {
      float normed[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) normed[i] = hidden[i];
      Scale(normed, inverse_rms[0], kOwnScales + n);
      Write(tail_.normed[n], tail_.out_dtype, index, normed);
    }
  }

 private:
  // values *= inverse_rms * scale n.
  __device__ __forceinline__ void Scale(float (&values)[kCount], float inverse_rms, int n) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 scale = KeptScale(n, i);
      values[i] *= inverse_rms * scale.x;
      values[i + 1] *= inverse_rms * scale.y;
      values[i + 2] *= inverse_rms * scale.z;
      values[i + 3] *= inverse_rms * scale.w;
    }
  }

  template <int kRows>
  __device__ __forceinline__ void InverseRms(const float (&rows)[kRows][kCount],
                                             float (&inverse_rms)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      inverse_rms[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) inverse_rms[r] += rows[r][i] * rows[r][i];
    }
    row_sum_(inverse_rms);
#pragma unroll
    for (int r = 0; r < kRows; ++r) inverse_rms[r] = rsqrtf(inverse_rms[r] * mean_ + tail_.eps);
  }

  __device__ __forceinline__ float4& KeptScale(int n, int i) {
    return scales_[(n * (kCount / 4) + i / 4) * blockDim.x + threadIdx.x];
  }
  __device__ __forceinline__ void KeepScale(int n, const Operand& operand, int column) {
    float scale[kCount];
    LoadAsFloat(scale, operand, column);
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      KeptScale(n, i) =
          make_float4(scale[i] + tail_.scale_offset, scale[i + 1] + tail_.scale_offset,
                      scale[i + 2] + tail_.scale_offset, scale[i + 3] + tail_.scale_offset);
    }
  }

  const Tail& tail_;
  float4* scales_;
  float mean_;
  float residual_[kCount];
  float layer_scalar_ = 1.f;
  RowSum<kBranches> row_sum_;
};

}  // namespace jax_gemma_arf
