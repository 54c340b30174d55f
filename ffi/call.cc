#include "call.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <sstream>
#include <string>
#include <tuple>

#include "errors.h"

namespace jax_gemma_arf {
namespace {

namespace ffi = ::xla::ffi;
using ffi::AnyBuffer;
using ffi::Error;
using ffi::ErrorOr;

bool IsRankCount(int64_t count) {
  return std::find(std::begin(kRankCounts), std::end(kRankCounts), count) != std::end(kRankCounts);
}

// "2, 4 or 8".
std::string RankCounts() {
  std::string text;
  for (const int count : kRankCounts) {
    if (!text.empty()) text += count == kMaxRanks ? " or " : ", ";
    text += std::to_string(count);
  }
  return text;
}

ErrorOr<Dtype> DtypeOf(const AnyBuffer& buffer, const std::string& name) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32: return Dtype::kFloat32;
    case ffi::DataType::BF16: return Dtype::kBFloat16;
    case ffi::DataType::F16: return Dtype::kFloat16;
    default:
      return Invalid(name + " must be bfloat16, float16 or float32, got XLA type " +
                     std::to_string(static_cast<int>(buffer.element_type())));
  }
}

ErrorOr<Operand> OperandOf(const AnyBuffer& buffer, const std::string& name, int64_t elements) {
  if (static_cast<int64_t>(buffer.element_count()) != elements) {
    return Invalid(name + " must have " + std::to_string(elements) + " elements, got " +
                   std::to_string(buffer.element_count()));
  }
  ErrorOr<Dtype> dtype = DtypeOf(buffer, name);
  if (dtype.has_error()) return dtype.error();
  if (elements > 1 && reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
    return Invalid(name + " must be aligned to 16 bytes");  // read 16 bytes at once
  }
  return Operand{buffer.untyped_data(), *dtype};
}

}  // namespace

ErrorOr<Call> CallOf(const CallAttributes& attributes) {
  Call call;
  if (attributes.algorithm == "one_shot") {
    call.algorithm = Algorithm::kOneShot;
  } else if (attributes.algorithm == "two_shot") {
    call.algorithm = Algorithm::kTwoShot;
  } else {
    return Invalid("algorithm must be one_shot or two_shot, got " +
                   std::string(attributes.algorithm));
  }
  const int64_t axis_size = attributes.axis_size;
  if (!IsRankCount(axis_size)) {
    return Invalid("axis_size must be " + RankCounts() + ", got " + std::to_string(axis_size));
  }
  const auto& ids = attributes.replica_groups;
  if (ids.size() == 0 || ids.size() % axis_size != 0) {
    return Invalid("replica_groups must hold whole groups of " + std::to_string(axis_size) +
                   ", got " + std::to_string(ids.size()) + " ids");
  }
  if (!(attributes.eps > 0) || !std::isfinite(attributes.eps) ||
      !std::isfinite(attributes.scale_offset)) {
    std::ostringstream numbers;
    numbers << attributes.eps << " and " << attributes.scale_offset;
    return Invalid("eps must be positive and finite and scale_offset finite, got " + numbers.str());
  }
  if (attributes.max_ctas != 0 &&
      (attributes.max_ctas < kMinCtas || attributes.max_ctas > kMaxCtas)) {
    return Invalid("max_ctas must be 0 or from " + std::to_string(kMinCtas) + " to " +
                   std::to_string(kMaxCtas) + ", got " + std::to_string(attributes.max_ctas));
  }
  if (attributes.branches < 1 || attributes.branches > kImplementation.max_branches) {
    return Invalid("branches must be from 1 to " + std::to_string(kImplementation.max_branches) +
                   ", got " + std::to_string(attributes.branches));
  }
  if (attributes.next_norms < 0 || attributes.next_norms > kMaxNextNorms) {
    return Invalid("next_norms must be from 0 to " + std::to_string(kMaxNextNorms) + ", got " +
                   std::to_string(attributes.next_norms));
  }
  call.nranks = static_cast<int>(axis_size);
  for (auto id = ids.begin(); id != ids.end(); id += axis_size) {
    call.replica_groups.emplace_back(id, id + axis_size);
  }
  call.eps = attributes.eps;
  call.scale_offset = attributes.scale_offset;
  call.max_ctas = static_cast<int>(attributes.max_ctas);
  call.branches = static_cast<int>(attributes.branches);
  call.has_residual = attributes.has_residual;
  call.has_layer_scalar = attributes.has_layer_scalar;
  call.next_norms = static_cast<int>(attributes.next_norms);
  return call;
}

bool CallShape::operator==(const CallShape& other) const {
  const auto all = [](const CallShape& call) {
    return std::make_tuple(call.kind.algorithm, call.kind.dtype, call.kind.nranks,
                           call.kind.branches, call.tokens, call.width, call.next_norms,
                           call.out_dtype);
  };
  return all(*this) == all(other);
}

std::string CallShape::Describe() const {
  const char* const dtypes[] = {"float32", "bfloat16", "float16"};
  return std::string(Name(kind.algorithm)) + ", " + std::to_string(kind.branches) + " x [" +
         std::to_string(tokens) + ", " + std::to_string(width) + "] " +
         dtypes[static_cast<int>(kind.dtype)] + " over " + std::to_string(kind.nranks) +
         " ranks, " + std::to_string(next_norms) + " next norms, to " +
         dtypes[static_cast<int>(out_dtype)];
}

ErrorOr<Arguments> ArgumentsOf(const Call& call, const ffi::RemainingArgs& args, int64_t ranks) {
  const int own_scales = OwnScales(call.branches);
  const size_t expected =
      call.branches + own_scales + call.has_residual + call.has_layer_scalar + call.next_norms;
  if (args.size() != expected) {
    return Invalid("expected " + std::to_string(expected) + " operands, got " +
                   std::to_string(args.size()));
  }
  ErrorOr<AnyBuffer> x = args.get<AnyBuffer>(0);
  if (x.has_error()) return x.error();
  ErrorOr<Dtype> dtype = DtypeOf(*x, "x");
  if (dtype.has_error()) return dtype.error();
  const auto dims = x->dimensions();
  const int64_t width = dims.size() == 0 ? 0 : dims.back();
  const int64_t elements = static_cast<int64_t>(x->element_count());
  if (width % kWidthMultiple != 0 || width < kMinWidth || width > kMaxWidth) {
    return Invalid("the last dimension of x must be a multiple of " +
                   std::to_string(kWidthMultiple) + " from " + std::to_string(kMinWidth) + " to " +
                   std::to_string(kMaxWidth) + ", got " + std::to_string(width));
  }
  if (elements == 0 || elements % (width * ranks) != 0) {
    return Invalid("x must hold " + std::to_string(ranks) + " x [tokens, " + std::to_string(width) +
                   "], got " + std::to_string(elements) + " elements");
  }
  const int64_t bytes = elements / ranks * call.branches * ItemSize(*dtype);
  const int64_t limit = call.algorithm == Algorithm::kOneShot ? kMaxOneShotBytes : kMaxMessageBytes;
  if (bytes > limit) {
    return Invalid("x must have at most " + std::to_string(limit) + " bytes a rank, got " +
                   std::to_string(bytes) + "; use fewer tokens a call");
  }

  Arguments parsed = {};
  parsed.kind = {call.algorithm, *dtype, call.nranks, call.branches};
  parsed.tokens = static_cast<int>(elements / ranks / width);
  parsed.width = static_cast<int>(width);
  size_t index = 0;
  Error error = Error::Success();
  const auto next = [&](const char* name, int64_t count) -> Operand {
    if (error.failure()) return {};
    ErrorOr<AnyBuffer> buffer = args.get<AnyBuffer>(index++);
    if (buffer.has_error()) {
      error = buffer.error();
      return {};
    }
    ErrorOr<Operand> operand = OperandOf(*buffer, name, count);
    if (operand.has_error()) {
      error = operand.error();
      return {};
    }
    return *operand;
  };
  for (int b = 0; b < call.branches; ++b) {
    const Operand sums = next("x", elements);
    if (error.success() && sums.dtype != *dtype) error = Invalid("all x must have one type");
    parsed.x[b] = sums.data;
  }
  for (int n = 1; n < own_scales; ++n) parsed.tail.scales[n] = next("branch norm_scale", width);
  parsed.tail.scales[0] = next("norm_scale", width);
  parsed.tail.out_dtype = *dtype;
  if (call.has_residual) {
    parsed.tail.residual = next("residual", parsed.elements());
    parsed.tail.out_dtype = parsed.tail.residual.dtype;
  }
  if (call.has_layer_scalar) parsed.tail.layer_scalar = next("layer_scalar", 1);
  for (int n = 0; n < call.next_norms; ++n) {
    parsed.tail.scales[own_scales + n] = next("next_norm_scale", width);
  }
  if (error.failure()) return error;
  parsed.tail.next_norms = call.next_norms;
  parsed.tail.eps = call.eps;
  parsed.tail.scale_offset = call.scale_offset;
  parsed.tail.inverse_width = 1.f / static_cast<float>(width);
  return parsed;
}

ErrorOr<Results> ResultsOf(const Arguments& arguments, const ffi::RemainingRets& rets,
                           int64_t ranks) {
  const size_t expected = 1 + arguments.tail.next_norms;
  if (rets.size() != expected) {
    return Invalid("expected " + std::to_string(expected) + " results, got " +
                   std::to_string(rets.size()));
  }
  Results results = {};
  for (size_t i = 0; i < rets.size(); ++i) {
    ErrorOr<ffi::Result<AnyBuffer>> buffer = rets.get<AnyBuffer>(i);
    if (buffer.has_error()) return buffer.error();
    ErrorOr<Operand> result = OperandOf(**buffer, "a result", arguments.elements() * ranks);
    if (result.has_error()) return result.error();
    if (result->dtype != arguments.tail.out_dtype) {
      return Invalid("the results must have residual's type, or x's without a residual");
    }
    results[i] = static_cast<char*>((*buffer)->untyped_data());
  }
  return results;
}

}  // namespace jax_gemma_arf
