// Argument checks of the glue. A message names the op, the argument, what was expected and what came; the fake implementations in
// mfac_kernels/ops check the same with the same words.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <concepts>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "common/types.h"

namespace mfac_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A message in the making. A stream would bring locales along, of which there are two where a compiler links libstdc++ statically: the
// first number that is written then ends the process.
class Text {
 public:
  Text& operator<<(std::string_view words) {
    text_ += words;
    return *this;
  }
  Text& operator<<(char letter) { return *this << std::string_view(&letter, 1); }
  Text& operator<<(double number) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", number);
    return *this << std::string_view(digits);
  }
  template <std::integral T>
  Text& operator<<(T number) {
    return *this << std::string_view(std::to_string(number));
  }
  const std::string& string() const { return text_; }

 private:
  std::string text_;
};

// STD_TORCH_CHECK puts the source's path in front of every message; users want the message.
template <class... Args>
void check(bool condition, const Args&... message) {
  if (condition) [[likely]]
    return;
  Text text;
  (text << ... << message);
  throw std::runtime_error(text.string());
}

// Sizes, printed as (2, 3), and only if a check fails.
template <class SizeOf>
Text& print_sizes(Text& text, int64_t count, const SizeOf& size_of) {
  text << '(';
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "") << size_of(i);
  return text << (count == 1 ? ",)" : ")");
}
struct shape {
  const Tensor& tensor;
  explicit shape(const Tensor& t) : tensor(t) {}
};
inline Text& operator<<(Text& text, const shape& of) {
  return print_sizes(text, of.tensor.dim(), [&](int64_t i) { return of.tensor.size(i); });
}
struct sizes {
  const std::initializer_list<int64_t>& list;
};
inline Text& operator<<(Text& text, const sizes& of) {
  return print_sizes(text, static_cast<int64_t>(of.list.size()), [&](int64_t i) { return of.list.begin()[i]; });
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
  int64_t i = 0;
  for (int64_t size : expected) same = same && t.size(i++) == size;
  check(same, op, ": ", name, ": expected shape ", sizes{expected}, ", got ", shape(t));
}

inline void check_state(const char* op, const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> expected) {
  check(t.scalar_type() == dtype, op, ": ", name, ": expected ", torch::headeronly::toString(dtype), ", got ",
        torch::headeronly::toString(t.scalar_type()));
  check_shape(op, name, t, expected);
  check(t.is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
}

}  // namespace mfac_kernels
