// The bound on how long a kernel waits for a peer, and what the user hears when it is reached.
//
// A kernel that gives up writes one word of host memory and stops its GPU with an error, which XLA
// raises from the run. A thread here reads the word and says which rank waited for which, in what
// call; the run's error cannot.
#pragma once

#include <cstdint>
#include <string>

namespace jax_gemma_arf {

// How long kernels enqueued from now on wait for a peer, in seconds; 0: no bound.
void SetTimeout(double seconds);
uint64_t TimeoutNanoseconds();

// A new id, by which a kernel can report a call that was described so.
uint32_t NewCallId(const std::string& description);

// A word for the kernels of one rank to write to on the current device, as that device sees it;
// `owner` describes the rank. Returns "" or what failed.
std::string NewFailureWord(const std::string& owner, uint64_t** word);

}  // namespace jax_gemma_arf
