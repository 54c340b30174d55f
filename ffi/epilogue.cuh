// What becomes of a reduced row while it is in registers: see Tail in kernels.h.
//
// A row is spread over the threads of a block, or of a cluster of blocks, 16 bytes of partial sums
// a thread. Gemma norms first and then adds the residual; the kernels that other models use compute
// rmsnorm(row + residual), which is a different function.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "slots.cuh"

namespace jax_gemma_arf {

// Calls `visit` with a zero of the C++ type of dtype.
template <typename Visit>
__device__ __forceinline__ void VisitDtype(Dtype dtype, Visit visit) {
  switch (dtype) {
    case Dtype::kBFloat16: return visit(__nv_bfloat16{});
    case Dtype::kFloat16: return visit(__half{});
    case Dtype::kFloat32: return visit(float{});
  }
}

// How many words `kCount` elements of type S are.
template <typename S, int kCount>
inline constexpr int kWordsOf = kCount * sizeof(S) / 4;

// The values of `kCount` elements of type S, as float32.
template <typename S, int kCount>
__device__ __forceinline__ void Widen(const Words<kWordsOf<S, kCount>>& row,
                                      float (&values)[kCount]) {
#pragma unroll
  for (int w = 0; w < kWordsOf<S, kCount>; ++w) {
    const uint32_t word = row.word[w];
    if constexpr (std::is_same_v<S, float>) {
      values[w] = __uint_as_float(word);
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
      values[2 * w] = __uint_as_float(word << 16);
      values[2 * w + 1] = __uint_as_float(word & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
      values[2 * w] = pair.x;
      values[2 * w + 1] = pair.y;
    }
  }
}

// `values` rounded to S. Two at a time: a conversion of one takes a unit of a quarter of the rate.
template <typename S, int kCount>
__device__ __forceinline__ Words<kWordsOf<S, kCount>> Round(const float (&values)[kCount]) {
  Words<kWordsOf<S, kCount>> row;
#pragma unroll
  for (int w = 0; w < kWordsOf<S, kCount>; ++w) {
    if constexpr (std::is_same_v<S, float>) {
      row.word[w] = __float_as_uint(values[w]);
    } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * w], values[2 * w + 1]);
      row.word[w] = reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * w], values[2 * w + 1]);
      row.word[w] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  return row;
}

// `kCount` elements of an operand as they are in memory. Loads are issued first and converted
// later: a conversion waits for its load, and the latencies of a small call must overlap.
template <int kCount>
struct Raw {
  Words<kCount / 2> low;   // all of them, if they have two bytes each
  Words<kCount / 2> high;  // the second half, if they have four
};

template <int kCount>
__device__ __forceinline__ Raw<kCount> LoadRaw(const Operand& operand, int64_t index) {
  using Half = Words<kCount / 2>;
  const int size = ItemSize(operand.dtype);
  const auto* from =
      reinterpret_cast<const Half*>(static_cast<const char*>(operand.data) + index * size);
  Raw<kCount> raw;
  raw.low = from[0];
  if (size == 4) raw.high = from[1];
  return raw;
}

template <typename S, int kCount>
__device__ __forceinline__ void Widen(const Raw<kCount>& raw, float (&values)[kCount]) {
  Words<kWordsOf<S, kCount>> row;
#pragma unroll
  for (int w = 0; w < kWordsOf<S, kCount>; ++w) {
    row.word[w] = w < kCount / 2 ? raw.low.word[w] : raw.high.word[w - kCount / 2];
  }
  Widen<S>(row, values);
}

// Rounds once, to `dtype`, and writes at element `index`. `values` is then what was written. `also`
// gets the words.
template <int kCount, typename Also>
__device__ __forceinline__ void Write(void* data, Dtype dtype, int64_t index,
                                      float (&values)[kCount], Also also) {
  VisitDtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    const auto row = Round<S>(values);
    also(row);
    *reinterpret_cast<Words<kWordsOf<S, kCount>>*>(static_cast<S*>(data) + index) = row;
    Widen<S>(row, values);
  });
}

template <int kCount>
__device__ __forceinline__ void Write(void* data, Dtype dtype, int64_t index,
                                      float (&values)[kCount]) {
  Write(data, dtype, index, values, [](const auto&) {});
}

// One element, of which the first `ItemSize` bytes count.
__device__ __forceinline__ uint32_t LoadRawScalar(const Operand& operand) {
  return ItemSize(operand.dtype) == 4 ? *static_cast<const uint32_t*>(operand.data)
                                      : *static_cast<const uint16_t*>(operand.data);
}

__device__ __forceinline__ float WidenScalar(uint32_t raw, Dtype dtype) {
  float value = 0.f;
  VisitDtype(dtype, [&](auto zero) {
    using S = decltype(zero);
    constexpr int kCount = 4 / sizeof(S);
    float values[kCount];
    Widen<S>(Words<1>{raw}, values);
    value = values[0];
  });
  return value;
}

// Sums over the threads that hold one row: one block, or a cluster of blocks.
//
// The order of the additions depends on width and the dtype alone, so a row's result does not
// depend on how many rows share the launch, on its place among them, or on the algorithm. The
// partial sums are double buffered: one barrier a sum is enough, since a buffer is written again
// only after the barrier of the sum in between.
template <int kMaxSums>
class RowSum {
 public:
  template <int kSums>
  __device__ __forceinline__ void operator()(float (&values)[kSums]) {
    static_assert(kSums <= kMaxSums);
    __shared__ float warp_sums[2 * kMaxSums * 32];
    __shared__ float block_sum[2][kMaxSums];
    float* const sums = warp_sums + parity_ * (kMaxSums * 32);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warps = (blockDim.x + 31) / 32;
    const bool whole = blockDim.x % 32 == 0;  // no warp has fewer than 32 lanes
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (whole) {
        SumWarp(values[s]);
      } else {
        SumPartialWarp(values[s], lane, min(32, static_cast<int>(blockDim.x) - warp * 32));
      }
      if (lane == 0) sums[s * 32 + warp] = values[s];
    }
    __syncthreads();
#pragma unroll
    for (int s = 0; s < kSums; ++s) {
      if (whole) {  // every warp has a lane for every warp's sum
        values[s] = lane < warps ? sums[s * 32 + lane] : 0.f;
        SumWarp(values[s]);
      } else {
        values[s] = 0.f;
#pragma unroll 1
        for (int w = 0; w < warps; ++w) values[s] += sums[s * 32 + w];
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
  __device__ __forceinline__ void SumWarp(float& value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, offset);
    }
  }
  // A lane that is not there must not contribute.
  __device__ __forceinline__ void SumPartialWarp(float& value, int lane, int lanes) {
    const unsigned mask = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
#pragma unroll 1
    for (int offset = 16; offset > 0; offset /= 2) {
      const float other = __shfl_down_sync(mask, value, offset);
      if (lane + offset < lanes) value += other;
    }
  }

  int parity_ = 0;
};

// The epilogue of one thread. All members are called by all threads of a row together.
template <typename T, int kBranches>
class Epilogue {
 public:
  static constexpr int kCount = kVectorBytes / sizeof(T);
  static constexpr int kOwnScales = OwnScales(kBranches);

  // Starts to read what all rows share. `column` is this thread's first element of a row. `shared`
  // is memory for as many rows of the block's elements, as float32, as the tail has scales: in
  // registers they would spill.
  __device__ __forceinline__ Epilogue(const Tail& tail, int column, void* shared)
      : tail_(tail), scales_(static_cast<Half*>(shared)) {
#pragma unroll 1
    for (int n = 0; n < kOwnScales + tail.next_norms; ++n) StartScale(n, column);
    __pipeline_commit();
    if (tail.layer_scalar.data != nullptr) raw_scalar_ = LoadRawScalar(tail.layer_scalar);
  }

  // Waits for it. Before the first Finish or NextNorms.
  __device__ __forceinline__ void Await() {
    if (tail_.layer_scalar.data != nullptr) {
      layer_scalar_ = WidenScalar(raw_scalar_, tail_.layer_scalar.dtype);
    }
    __pipeline_wait_prior(0);  // a thread reads only what it has copied itself
  }

  // Starts to read the residual at `index`, the thread's first element of its row in
  // [tokens, width].
  __device__ __forceinline__ void Prefetch(int64_t index) {
    if (tail_.residual.data != nullptr) residual_ = LoadRaw<kCount>(tail_.residual, index);
  }

  // From the reduced rows to out, in float32. Uses what Prefetch has read.
  __device__ __forceinline__ void Finish(const Words<4> (&reduced)[kBranches],
                                         float (&out)[kCount]) {
    float rows[kBranches][kCount], inverse_rms[kBranches];
#pragma unroll
    for (int b = 0; b < kBranches; ++b) Widen<T>(reduced[b], rows[b]);
    Norm(rows, kBranches > 1 ? 1 : 0, inverse_rms);
    if constexpr (kBranches > 1) {
      float sum[1][kCount], sum_inverse_rms[1];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum[0][i] = fmaf(rows[1][i], inverse_rms[1], rows[0][i] * inverse_rms[0]);
      }
      Norm(sum, 0, sum_inverse_rms);
      inverse_rms[0] = sum_inverse_rms[0];
#pragma unroll
      for (int i = 0; i < kCount; ++i) rows[0][i] = sum[0][i];
    }
    VisitDtype(tail_.residual.dtype, [&](auto zero) { Widen<decltype(zero)>(residual_, out); });
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      out[i] = fmaf(rows[0][i], inverse_rms[0], out[i]) * layer_scalar_;
    }
  }

  // The norms that the next layers start with, of the row as it was rounded: what they would read.
  __device__ __forceinline__ void NextNorms(const float (&out)[kCount], int64_t index) {
    if (tail_.next_norms == 0) return;
    float normed[1][kCount], inverse_rms[1];
#pragma unroll
    for (int i = 0; i < kCount; ++i) normed[0][i] = out[i];
    Norm(normed, kOwnScales, inverse_rms);
    for (int n = 0;;) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) normed[0][i] *= inverse_rms[0];
      Write(tail_.normed[n], tail_.out_dtype, index, normed[0]);
      if (++n == tail_.next_norms) break;
#pragma unroll
      for (int i = 0; i < kCount; ++i) normed[0][i] = out[i];
      Scale(normed[0], kOwnScales + n);
    }
  }

 private:
  using Half = Words<kCount / 2>;  // of a Raw

  // An RMSNorm of each row, but for its last multiplication, with `inverse_rms`. The scales, from
  // number `scale` on, are multiplied while the sums are on their way.
  template <int kRows>
  __device__ __forceinline__ void Norm(float (&rows)[kRows][kCount], int scale,
                                       float (&inverse_rms)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      inverse_rms[r] = 0.f;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        inverse_rms[r] = fmaf(rows[r][i], rows[r][i], inverse_rms[r]);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) Scale(rows[r], scale + r);
    row_sum_(inverse_rms);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      inverse_rms[r] = rsqrtf(fmaf(inverse_rms[r], tail_.inverse_width, tail_.eps));
    }
  }

  // values *= scale n.
  __device__ __forceinline__ void Scale(float (&values)[kCount], int n) {
    VisitDtype(tail_.scales[n].dtype, [&](auto zero) {
      using S = decltype(zero);
      Raw<kCount> raw;
      raw.low = *KeptScale(n, 0);
      if constexpr (sizeof(S) == 4) raw.high = *KeptScale(n, 1);
      float scale[kCount];
      Widen<S>(raw, scale);
#pragma unroll
      for (int i = 0; i < kCount; ++i) values[i] *= scale[i] + tail_.scale_offset;
    });
  }

  // Starts to copy this thread's part of scale n, as it is.
  __device__ __forceinline__ void StartScale(int n, int column) {
    const Operand& scale = tail_.scales[n];
    const int size = ItemSize(scale.dtype);
    const auto* from = static_cast<const char*>(scale.data) + column * size;
    __pipeline_memcpy_async(KeptScale(n, 0), from, sizeof(Half));
    if (size == 4) __pipeline_memcpy_async(KeptScale(n, 1), from + sizeof(Half), sizeof(Half));
  }
  // Where the two halves are kept: neighbouring threads' halves side by side.
  __device__ __forceinline__ Half* KeptScale(int n, int half) {
    return &scales_[(2 * n + half) * blockDim.x + threadIdx.x];
  }

  const Tail& tail_;
  Half* scales_;
  Raw<kCount> residual_ = {};  // zeros, where there is none
  uint32_t raw_scalar_ = 0;
  float layer_scalar_ = 1.f;
  RowSum<kBranches> row_sum_;
};

}  // namespace jax_gemma_arf
