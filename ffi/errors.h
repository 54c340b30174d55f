// One way to turn what failed into an FFI error.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

inline xla::ffi::Error Invalid(const std::string& message) {
  return xla::ffi::Error::InvalidArgument("jax_gemma_arf: " + message);
}

inline xla::ffi::Error Internal(const std::string& message) {
  return xla::ffi::Error::Internal("jax_gemma_arf: " + message);
}

// "" or what failed. Resets the last error, which is reported here, for CUDA's next caller.
inline std::string Describe(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();
  return what + ": " + cudaGetErrorString(error);
}

}  // namespace jax_gemma_arf
