// The description of a call: its attributes, operands and results, checked.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "call_limits.h"
#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace jax_gemma_arf {

// The attributes of every custom call (ffi_attributes in lowering.py).
struct CallAttributes {
  std::string_view algorithm;
  int64_t axis_size;
  xla::ffi::Span<const int64_t> replica_groups;
  float eps;
  float scale_offset;
  int64_t max_ctas;
  int64_t branches;
  bool has_residual;
  bool has_layer_scalar;
  int64_t next_norms;
};

}  // namespace jax_gemma_arf

// The members of CallAttributes in order, as XLA decodes them. A target that has more attributes
// lists its own behind these.
#define JAX_GEMMA_ARF_CALL_ATTRIBUTES                                                  \
  StructMember<std::string_view>("algorithm"), StructMember<int64_t>("axis_size"),     \
      StructMember<Span<const int64_t>>("replica_groups"), StructMember<float>("eps"), \
      StructMember<float>("scale_offset"), StructMember<int64_t>("max_ctas"),          \
      StructMember<int64_t>("branches"), StructMember<bool>("has_residual"),           \
      StructMember<bool>("has_layer_scalar"), StructMember<int64_t>("next_norms")

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_gemma_arf::CallAttributes, JAX_GEMMA_ARF_CALL_ATTRIBUTES);

namespace jax_gemma_arf {

using ReplicaGroups = std::vector<std::vector<int64_t>>;

// One custom call instruction, the same on all devices.
struct Call {
  Algorithm algorithm;
  int nranks;
  ReplicaGroups replica_groups;
  float eps;
  float scale_offset;
  int max_ctas;  // 0: as many as the device holds
  int branches;
  bool has_residual;
  bool has_layer_scalar;
  int next_norms;
};

xla::ffi::ErrorOr<Call> CallOf(const CallAttributes& attributes);

// What all ranks of a call must have in common.
struct CallShape {
  KernelKind kind;
  int tokens;
  int width;
  int next_norms;
  Dtype out_dtype;

  bool operator==(const CallShape& other) const;
  std::string Describe() const;
};

// The operands of a call on one device. Operands with a part for each rank that the device holds
// point at the part of the first.
struct Arguments {
  KernelKind kind;
  int tokens;
  int width;
  const void* x[kMaxBranches];
  Tail tail;  // but for the results

  int64_t elements() const { return int64_t{tokens} * width; }
  CallShape shape() const { return {kind, tokens, width, tail.next_norms, tail.out_dtype}; }
};

// `ranks` is how many of the call's ranks the device holds.
xla::ffi::ErrorOr<Arguments> ArgumentsOf(const Call& call, const xla::ffi::RemainingArgs& args,
                                         int64_t ranks);

// The results of a call on one device, the row and then its next norms, likewise.
using Results = std::array<char*, 1 + kMaxNextNorms>;
xla::ffi::ErrorOr<Results> ResultsOf(const Arguments& arguments,
                                     const xla::ffi::RemainingRets& rets, int64_t ranks);

}  // namespace jax_gemma_arf
