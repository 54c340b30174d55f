// From the kind of a kernel to the template arguments that its instantiation has.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <iterator>
#include <type_traits>

#include "call_limits.h"
#include "kernels.h"

namespace jax_gemma_arf {

// Calls `visit` with a zero of the C++ type of the partial sums, and the number of ranks as an
// integral constant.
template <typename Visit>
auto Dispatch(const KernelKind& kind, Visit visit) {
  const auto ranks = [&](auto zero) {
    static_assert(std::size(kRankCounts) == 3);
    switch (kind.nranks) {
      case kRankCounts[0]: return visit(zero, std::integral_constant<int, kRankCounts[0]>{});
      case kRankCounts[1]: return visit(zero, std::integral_constant<int, kRankCounts[1]>{});
      default: return visit(zero, std::integral_constant<int, kRankCounts[2]>{});
    }
  };
  switch (kind.dtype) {
    case Dtype::kBFloat16: return ranks(__nv_bfloat16{});
    case Dtype::kFloat16: return ranks(__half{});
    default: return ranks(float{});
  }
}

}  // namespace jax_gemma_arf
