// Argument checks of the glue. A message names the op, the argument, what was expected and what came; the fake implementations in
// mfac_kernels/ops check the same with the same words.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/types.h"

namespace mfac_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK puts the source's path in front of every message; users want the message.
template <class... Args>
void check(bool condition, const Args&... message) {
  if (condition) [[likely]]
    return;
  std::ostringstream text;
  (text << ... << message);
  throw std::runtime_error(text.str());
}

// Printed as (2, 3), and only if a check fails.
struct shape {
  const Tensor& tensor;
  explicit shape(const Tensor& t) : tensor(t) {}
};
inline std::ostream& operator<<(std::ostream& text, const shape& of) {
  text << '(';
  for (int64_t i = 0; i < of.tensor.dim(); ++i) text << (i ? ", " : "") << of.tensor.size(i);
  return text << (of.tensor.dim() == 1 ? ",)" : ")");
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::fp16;
    default:
      check(false, op, ": ", name, ": expected float32, float64, bfloat16 or float16, got ", torch::headeronly::toString(t.scalar_type()));
      return DType::f32;
  }
}

inline void check_rows(const char* op, const char* name, const Tensor& t) {
  check(t.dim() == 2, op, ": ", name, ": expected 2 dimensions, got shape ", shape(t));
  check(t.size(1) <= 1 || t.stride(1) == 1, op, ": ", name, ": expected contiguous rows, got stride ", t.stride(1));
}

inline void check_shape(const char* op, const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  std::ostringstream wanted;
  int64_t i = 0;
  for (int64_t size : expected) {
    wanted << (i ? ", " : "") << size;
    same = same && t.size(i) == size;
    ++i;
  }
  check(same, op, ": ", name, ": expected shape (", wanted.str(), expected.size() == 1 ? ",)" : ")", ", got ", shape(t));
}

inline void check_state(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> expected) {
  check(t.scalar_type() == dtype, op, ": ", name, ": expected ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  check_shape(op, name, t, expected);
  check(t.is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
}

}  // namespace mfac_kernels
