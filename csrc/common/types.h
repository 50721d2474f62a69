// Element types of the kernels. 16-bit types are opaque bit patterns: they are widened on load and rounded on store, never computed with.
#pragma once
#include <cstdint>

namespace mfac_kernels {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The order is that of every dispatch table: table[static_cast<int>(dtype)].
enum class DType : int { f32, f64, bf16, fp16 };
constexpr int kDTypes = 4;

constexpr int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// body(T()) for the type of dtype
template <class Body>
auto for_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(float());
    case DType::f64: return body(double());
    case DType::bf16: return body(bf16());
    default: return body(fp16());
  }
}

}  // namespace mfac_kernels
