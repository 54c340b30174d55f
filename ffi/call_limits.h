// The limits of a call. C++ writes each of them here alone. Python writes what it needs of them
// once more (support.py); test_limits_agree compares the two through the extension module.
#pragma once

#include <cstdint>
#include <iterator>

namespace jax_gemma_arf {

inline constexpr int kRankCounts[] = {2, 4, 8};  // of a replica group
inline constexpr int kMaxRanks = kRankCounts[std::size(kRankCounts) - 1];

inline constexpr int kWidthMultiple = 64;
inline constexpr int kMinWidth = 256;
inline constexpr int kMaxWidth = 16384;

inline constexpr int kMaxBranches = 2;
inline constexpr int kMaxNextNorms = 3;

// The largest message, the partial sums of one rank, that a call may reduce. One-shot keeps two
// messages of every rank, and is for small ones.
inline constexpr int64_t kMaxMessageBytes = int64_t{256} << 20;
inline constexpr int64_t kMaxOneShotBytes = int64_t{64} << 20;

// Thread blocks of a rank. The least are the largest cluster: no grid may be limited to less.
inline constexpr int kMinCtas = 8;
inline constexpr int kMaxCtas = 1024;

}  // namespace jax_gemma_arf
