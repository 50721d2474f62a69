// Elements of any type to and from arithmetic types, on the device. The rounding is to nearest even, 16-bit types by way of float32, as
// on the CPU; NaN stays NaN.
#pragma once
#include "common/cuda/launch.h"
#include "common/types.h"
#if defined(__CUDACC__)
#include <cuda_fp16.h>
#else
#include <bit>
#endif

namespace mfac_kernels {

// The float32 that an element is exactly
__device__ __forceinline__ float float_of(float x) { return x; }
__device__ __forceinline__ float float_of(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
__device__ __forceinline__ float float_of(fp16 x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  return static_cast<float>(std::bit_cast<_Float16>(x.bits));
#endif
}

__device__ __forceinline__ double widen(double x) { return x; }
template <class T>
__device__ __forceinline__ double widen(T x) {
  return static_cast<double>(float_of(x));
}

__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(double x, float& out) { out = static_cast<float>(x); }
__device__ __forceinline__ void narrow(double x, bf16& out) {
  const float single = static_cast<float>(x);
  const uint32_t bits = __float_as_uint(single);
  out.bits = static_cast<uint16_t>(single == single ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}
__device__ __forceinline__ void narrow(double x, fp16& out) {
#if defined(__CUDACC__)
  out.bits = __half_as_ushort(__float2half_rn(static_cast<float>(x)));
#else
  out.bits = std::bit_cast<uint16_t>(static_cast<_Float16>(static_cast<float>(x)));
#endif
}

// An element whose type is known at run time: for operands that are small beside the window.
__device__ __forceinline__ double load_as(DType dtype, const void* data, int64_t i) {
  switch (dtype) {
    case DType::f32: return widen(static_cast<const float*>(data)[i]);
    case DType::f64: return static_cast<const double*>(data)[i];
    case DType::bf16: return widen(static_cast<const bf16*>(data)[i]);
    default: return widen(static_cast<const fp16*>(data)[i]);
  }
}
__device__ __forceinline__ void store_as(DType dtype, double x, void* data, int64_t i) {
  switch (dtype) {
    case DType::f32: return narrow(x, static_cast<float*>(data)[i]);
    case DType::f64: return narrow(x, static_cast<double*>(data)[i]);
    case DType::bf16: return narrow(x, static_cast<bf16*>(data)[i]);
    default: return narrow(x, static_cast<fp16*>(data)[i]);
  }
}

// n neighbours, read or written by one instruction: at most 16 bytes, whose address is a multiple of their size.
template <class T, int n>
struct alignas(n * sizeof(T)) Pack {
  static_assert(n * sizeof(T) <= 16);
  T values[n];
};
template <class T, int n>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p) {
  Pack<T, n> pack;
  if constexpr (sizeof(pack) == 16) {
    const uint4 words = *reinterpret_cast<const uint4*>(p);
    memcpy(&pack, &words, sizeof(pack));
  } else {
    static_assert(sizeof(pack) == 8);
    const uint2 words = *reinterpret_cast<const uint2*>(p);
    memcpy(&pack, &words, sizeof(pack));
  }
  return pack;
}
template <class T, int n>
__device__ __forceinline__ void store_pack(const Pack<T, n>& pack, T* p) {
  static_assert(sizeof(pack) == 16);
  uint4 words;
  memcpy(&words, &pack, sizeof(pack));
  *reinterpret_cast<uint4*>(p) = words;
}
#if defined(MFAC_KERNELS_SIMT)
template <class T, int n>
Pack<T, n> load_pack(Shared<T> p, simt::Location where = simt::Location::current()) {
  return load_pack<T, n>(p.together(n, where));
}
#endif

}  // namespace mfac_kernels
