// What the rivals' host code may ask of their kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace rivals {

enum class Kind {
  kAllReduce,      // FlashInfer's all-reduce and nothing else
  kAllReduceNorm,  // FlashInfer's kARResidualRMSNorm: rmsnorm(psum(x) + residual) and the sum
  kWire,           // every rank pushes 2 / N of its message to every peer; one barrier
};

inline constexpr int kMaxRanks = 8;
inline constexpr int kMaxBlocks = 256;  // with a flag of their own, as in FlashInfer

// Where the wire kernel writes. Mailboxes hold a slot for each sender.
struct Wire {
  char* mailbox[kMaxRanks];
  uint32_t* flags[kMaxRanks];  // [kMaxBlocks][ranks]
  uint32_t* epochs;            // [kMaxBlocks], this rank's own
  int64_t slot_bytes;
};

struct Launch {
  Kind kind;
  bool one_shot;
  int ranks;
  int rank;
  int tokens;
  int width;
  int sharing;   // how many ranks this GPU holds: 1, or all of them in loopback
  void** table;  // FlashInfer's workspace pointers, on the device
  Wire wire;
  const void* x;  // [tokens, width], bfloat16, as all that follow
  const void* residual;
  const void* norm_scale;
  void* out;
  void* sum;
  float eps;
};

// Bytes that one rank sends to one peer in a perfect all-reduce of `bytes`: a reduce-scatter, then
// an all-gather, of 1 / ranks of the message each.
inline int64_t WireBytes(int64_t bytes, int ranks) { return (2 * bytes / ranks + 15) / 16 * 16; }

// Enqueues one kernel.
cudaError_t Enqueue(const Launch& launch, cudaStream_t stream);

// Loads every kernel on the current device, so that none is loaded while a peer spins.
cudaError_t Preload();

// FlashInfer's one-shot kernel reads -0.0 as "not arrived yet".
cudaError_t FillNegativeZero(void* buffer, int64_t bytes);

}  // namespace rivals
