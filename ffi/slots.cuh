// How partial sums and rows travel: slots in the peers' memory that are never read before they are
// full, without flags, fences or barriers.
//
// A slot holds 32-bit words. An empty word has every bit set, which is a NaN in float32 and two in
// bfloat16 and float16; a NaN of that very pattern is sent as another NaN. So a word is its own
// flag, as in NVIDIA's LL protocol (NCCL) and TensorRT-LLM's Lamport all-reduce: the reader polls
// until none of its words is empty, and empties them again for the next call but one.
//
// Slots for partial sums come in two generations, used by calls in turn. A peer fills a slot again
// two calls later, and only after it has received what this rank sent in the call in between, thus
// after this rank's kernel that emptied the slot has ended. All of this is relaxed: that the
// emptying is not seen after the filling rests on a kernel's end, which writes back to the memory
// where the peer's stores arrive later.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace jax_gemma_arf {

inline constexpr uint32_t kEmptyWord = 0xffffffffu;

// What one thread sends or receives at once.
template <int kWords>
struct alignas(kWords >= 4 ? 16 : 4 * kWords) Words {
  uint32_t word[kWords];
};

// Stores that peers see word by word, and loads that see theirs (PTX: relaxed, scope sys).
template <int kWords>
__device__ __forceinline__ void StoreRelaxed(char* slot, const Words<kWords>& w) {
  if constexpr (kWords == 2) {
    asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(slot), "r"(w.word[0]),
                 "r"(w.word[1])
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(slot + 4 * i),
                   "r"(w.word[i]), "r"(w.word[i + 1]), "r"(w.word[i + 2]), "r"(w.word[i + 3])
                   : "memory");
    }
  }
}

template <int kWords>
__device__ __forceinline__ Words<kWords> LoadRelaxed(const char* slot) {
  Words<kWords> w;
  if constexpr (kWords == 2) {
    asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];"
                 : "=r"(w.word[0]), "=r"(w.word[1])
                 : "l"(slot)
                 : "memory");
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w.word[i]), "=r"(w.word[i + 1]), "=r"(w.word[i + 2]), "=r"(w.word[i + 3])
                   : "l"(slot + 4 * i)
                   : "memory");
    }
  }
  return w;
}

template <int kWords>
__device__ __forceinline__ void Push(char* slot, Words<kWords> w) {
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if (w.word[i] == kEmptyWord) w.word[i] = 0x7fffffffu;  // still a NaN, or two
  }
  StoreRelaxed(slot, w);
}

template <int kWords>
__device__ __forceinline__ bool HasEmpty(const Words<kWords>& w) {
  bool empty = false;
#pragma unroll
  for (int i = 0; i < kWords; ++i) empty |= w.word[i] == kEmptyWord;
  return empty;
}

__device__ __forceinline__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Reports a peer that did not come, and ends the kernel with an error: results that lack a rank's
// share must not get out, and a kernel that waits without a bound takes the GPU with it.
__device__ __noinline__ void Fail(uint64_t* failure, Failure what) {
  *reinterpret_cast<volatile uint64_t*>(failure) = EncodeFailure(what);
  __threadfence_system();
  const uint64_t start = Nanoseconds();  // the host has this long to read it (watchdog.cc)
  while (Nanoseconds() - start < 500'000'000) {
  }
  __trap();
}

// Waits until the slots of a warp, of which `w` is a first look, are full; empties them, and
// returns their words. A warp leaves the loop together: lanes that left it one by one would go on
// apart. The clock is looked at only by those who have waited a thousand polls, so the bound is
// free.
template <int kWords>
__device__ __forceinline__ Words<kWords> Receive(char* slot, Words<kWords> w, const Launch& launch,
                                                 int source) {
  uint64_t since = 0;
  for (uint32_t polls = 1; __any_sync(0xffffffffu, HasEmpty(w)); ++polls) {
    w = LoadRelaxed<kWords>(slot);
    if (polls % 1024 == 0 && launch.timeout_ns != 0) {
      const uint64_t now = Nanoseconds();
      if (since == 0) since = now;
      if (now - since > launch.timeout_ns) {
        Fail(launch.peers.failure, {launch.rank, source, launch.call_id});
      }
    }
  }
  Words<kWords> empty;
#pragma unroll
  for (int i = 0; i < kWords; ++i) empty.word[i] = kEmptyWord;
  StoreRelaxed(slot, empty);
  return w;
}

// Where in every rank's memory the slots are (the same on all). One-shot: a whole message from
// every source, twice. Two-shot: from every source its share of the rows that the rank owns, twice;
// then the finished rows, once: a peer sends a row of the next call only after it has had this
// rank's partial sums of that call.
template <Algorithm kAlgorithm, int kRanks>
struct SlotMap {
  int64_t generation;    // offset of the partial sums of this call
  int64_t source_bytes;  // between two sources
  int64_t rows;          // two-shot: offset of the finished rows

  __device__ __forceinline__ SlotMap(int64_t capacity, uint32_t counter) {
    source_bytes = kAlgorithm == Algorithm::kOneShot ? capacity : capacity / kRanks;
    const int64_t sources = source_bytes * kRanks;
    generation = counter / kCounted % 2 * sources;
    rows = 2 * sources;
  }
};

}  // namespace jax_gemma_arf
