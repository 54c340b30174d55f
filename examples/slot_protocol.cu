// The slot protocol of ffi/slots.cuh in one file: an all-reduce between two ranks and an RMSNorm
// of the sum, in one kernel, without flags, fences or barriers between the ranks. Both ranks are
// streams of one GPU here; on two GPUs only the addresses of the peer's slots would differ.
//
//     nvcc -arch=native examples/slot_protocol.cu -o slot_protocol && ./slot_protocol
//
// The real kernels differ in four ways: a thread moves 16 bytes, there are up to 8 ranks, a counter
// in device memory replaces the argument `call` (so that CUDA graphs replay), and a two-shot
// variant sends large messages once.
#include <cmath>
#include <cstdint>
#include <cstdio>

constexpr int kRanks = 2, kTokens = 3, kHidden = 256, kCalls = 6;
constexpr int kElements = kTokens * kHidden;  // of a message: the partial sums of one rank
constexpr uint32_t kEmpty = 0xffffffffu;      // a NaN, so a word is its own flag

// Slots of one rank. Calls use the two generations in turn.
struct Slots {
  uint32_t word[2][kRanks][kElements];  // [generation][source]
};

__device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// A block finishes one row, a thread one element. `volatile` keeps the accesses to slots in order
// of the program and out of registers and L1.
__global__ void AllReduceNorm(int rank, int call, Slots* own, Slots* peer, const float* x,
                              float* out) {
  const int i = blockIdx.x * kHidden + threadIdx.x, generation = call % 2;

  // 1. Push this rank's partial sum into the peer's slot. Data of the pattern kEmpty, which is a
  //    NaN, travels as another NaN.
  const uint32_t mine = __float_as_uint(x[i]);
  *const_cast<volatile uint32_t*>(&peer->word[generation][rank][i]) =
      mine == kEmpty ? 0x7fffffffu : mine;

  // 2. Poll the slot that the peer fills, for at most 10 s.
  volatile uint32_t* const slot = &own->word[generation][1 - rank][i];
  const uint64_t start = Nanoseconds();
  uint32_t theirs;
  while ((theirs = *slot) == kEmpty) {
    if (Nanoseconds() - start > 10'000'000'000) __trap();
  }

  // 3. Empty the slot for the next call but one. The peer fills it again only after it has received
  //    this rank's partial sums of the next call, which a later kernel of this stream sends. By
  //    then this kernel has ended, so the peer's word never arrives before this one.
  *slot = kEmpty;

  // 4. Sum (more than two ranks: in rank order, so that all hold the same bits); finish the row.
  const float sum = x[i] + __uint_as_float(theirs);
  __shared__ float squares[kHidden];
  squares[threadIdx.x] = sum * sum;
  for (int half = kHidden / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) squares[threadIdx.x] += squares[threadIdx.x + half];
  }
  __syncthreads();
  out[i] = sum * rsqrtf(squares[0] / kHidden + 1e-6f);
}

int main() {
  Slots* slots;    // [kRanks]
  float *x, *out;  // [kCalls, kRanks, kElements]: every call has its own, so none hides another
  cudaStream_t streams[kRanks];
  constexpr int kCount = kCalls * kRanks * kElements;
  cudaMallocManaged(&slots, kRanks * sizeof(Slots));
  cudaMallocManaged(&x, kCount * sizeof(float));
  cudaMallocManaged(&out, kCount * sizeof(float));
  for (cudaStream_t& stream : streams) cudaStreamCreate(&stream);
  if (const cudaError_t error = cudaMemset(slots, 0xff, kRanks * sizeof(Slots))) {
    return printf("emptying the slots: %s\n", cudaGetErrorString(error)), 1;
  }
  cudaDeviceSynchronize();
  for (int n = 0; n < kCount; ++n) x[n] = static_cast<float>(sin(n));

  for (int call = 0; call < kCalls; ++call) {
    for (int rank = 0; rank < kRanks; ++rank) {
      const int begin = (call * kRanks + rank) * kElements;
      AllReduceNorm<<<kTokens, kHidden, 0, streams[rank]>>>(
          rank, call, &slots[rank], &slots[1 - rank], x + begin, out + begin);
    }
  }
  if (const cudaError_t error = cudaDeviceSynchronize()) {
    return printf("exchanging partial sums: %s\n", cudaGetErrorString(error)), 1;
  }

  double worst = 0;  // the largest error of any element on any rank
  bool equal = true, empty = true;
  for (int row = 0; row < kCalls * kTokens; ++row) {
    const int begin = (row / kTokens * kRanks * kTokens + row % kTokens) * kHidden;  // on rank 0
    const auto sum = [&](int i) { return double{x[i]} + x[i + kElements]; };
    double squares = 0;
    for (int i = begin; i < begin + kHidden; ++i) squares += sum(i) * sum(i);
    for (int i = begin; i < begin + kHidden; ++i) {
      worst = fmax(worst, fabs(out[i] - sum(i) / sqrt(squares / kHidden + 1e-6)));
      equal &= out[i] == out[i + kElements];
    }
  }
  for (int n = 0; n < 2 * kRanks * kElements; ++n) {
    for (int rank = 0; rank < kRanks; ++rank) empty &= (&slots[rank].word[0][0][0])[n] == kEmpty;
  }
  const bool right = worst < 1e-5 && equal && empty;
  printf("%d calls, %d ranks, %d rows of %d: largest error %.1e, ranks %s, slots %s: %s\n", kCalls,
         kRanks, kTokens, kHidden, worst, equal ? "equal" : "differ", empty ? "empty" : "not empty",
         right ? "right" : "wrong");
  return right ? 0 : 1;
}
