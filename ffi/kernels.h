// What the host code may ask of the kernels: what one rank's launch needs, and how it is shaped.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_gemma_arf {

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int ItemSize(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// kOneShot: every rank pushes its whole input to every peer (Lamport, no barrier).
// kTwoShot: reduce-scatter, then all-gather, between barriers.
enum class Algorithm : int32_t { kOneShot = 0, kTwoShot = 1 };

// One class of kernel: everything that selects an instantiation.
struct KernelKind {
  Algorithm algorithm;
  Dtype dtype;  // of the partial sums
  int nranks;   // 2, 4 or 8
};

struct Operand {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
};

// out = (rmsnorm(row) * (scale_offset + norm_scale) + residual) * layer_scalar
struct Epilogue {
  Operand residual;      // [tokens, hidden]
  Operand norm_scale;    // [hidden]
  Operand layer_scalar;  // one element, or data == nullptr for 1
  void* out;             // [tokens, hidden], residual's dtype
  float eps;
  float scale_offset;
};

struct Launch {
  KernelKind kind;
  int rank;
  int tokens;
  int hidden;        // a multiple of 64 from 256 to 16384
  int max_ctas;      // upper bound on thread blocks; at least 8
  void** workspace;  // device table, see workspace.h
  const void* x;     // [tokens, hidden] partial sums of this rank
  Epilogue epilogue;
};

// The most blocks of the two-shot kernel that have a barrier flag.
inline constexpr int kMaxCtas = 256;

// Enqueues exactly one kernel. Neither allocates nor synchronises, so it can be captured.
cudaError_t Enqueue(const Launch& launch, cudaStream_t stream);

// Loads every kernel of this library on the current device. CUDA otherwise loads a kernel at its
// first launch, which can need a device on which a peer's kernel already spins (hazard 29).
cudaError_t Preload();

// How many blocks of this kernel, for rows of `hidden` elements, the current device holds at once.
cudaError_t ResidentCtas(const KernelKind& kind, int hidden, int* ctas);

// Fills `bytes` (a multiple of 4) with -0.0, which the one-shot kernel reads as "not arrived yet".
cudaError_t FillNegativeZero(void* buffer, int64_t bytes, int item_size, cudaStream_t stream);

}  // namespace jax_gemma_arf
