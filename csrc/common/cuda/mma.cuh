// Tensor cores: D (16, 8) += A (16, k) B (k, 8), a warp together, in registers; and the loads of such registers from shared memory.
// k = 32 bytes' worth of elements: 8 of float32, of which TF32 is used (8 bits of exponent, 10 of mantissa), 16 of bfloat16 or float16.
// Products are exact and accumulated in float32, cut towards zero: a long sum of positive products comes out low, by up to about 2^-24 of
// it for each. sm_80 and later.
//
// With g = lane / 4, t = lane % 4 and n = 4 / sizeof(T) elements in a register (the first in the low bits), element h of register i is
//
//   a, 4 registers    A[g + 8 (i % 2), n (t + 4 (i / 2)) + h]
//   b, 2 registers    B[n (t + 4 i) + h, g]
//   d, 4 floats       D[g + 8 (i / 2), 2 t + i % 2]
//
// float64 in the same places, an element where a register is, k = 8: every sum is rounded to nearest. sm_80 takes 4 instructions for what
// is 1 on sm_90.
//
// Source: PTX ISA, "Matrix fragments for mma.m8n8k4", ".m16n8k8" and ".m16n8k16", ldmatrix.
#pragma once
#include "common/cuda/launch.h"
#include "common/types.h"

namespace mfac_kernels {

template <class T>  // float, bf16, fp16, double
constexpr int kMmaDepth = sizeof(T) == 8 ? 8 : 32 / sizeof(T);
template <class T>
constexpr int kMmaPerRegister = sizeof(T) == 8 ? 1 : 4 / sizeof(T);

struct Position {
  int row, column;
};
template <class T>
__host__ __device__ constexpr Position fragment_of_a(int lane, int i, int h) {
  return {lane / 4 + 8 * (i % 2), kMmaPerRegister<T> * (lane % 4 + 4 * (i / 2)) + h};
}
template <class T>
__host__ __device__ constexpr Position fragment_of_b(int lane, int i, int h) {
  return {kMmaPerRegister<T> * (lane % 4 + 4 * i) + h, lane / 4};
}
__host__ __device__ constexpr Position fragment_of_d(int lane, int i) { return {lane / 4 + 8 * (i / 2), 2 * (lane % 4) + i % 2}; }

}  // namespace mfac_kernels

#if defined(MFAC_KERNELS_SIMT)
#include "common/simt/mma.h"
#elif defined(__CUDACC__)

namespace mfac_kernels {

// x as TF32, to nearest, halves away from zero. The tensor core itself drops the low bits: up to twice the error, and a bias.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// D += A B. Every lane of the warp must call it.
template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define MFAC_MMA(T, instruction)                                                                          \
  template <>                                                                                             \
  __device__ __forceinline__ void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                     \
  }
MFAC_MMA(float, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32")
MFAC_MMA(bf16, "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
MFAC_MMA(fp16, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
#undef MFAC_MMA

__device__ __forceinline__ void mma(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
               : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int i = 0; i < 4; ++i)  // rows g + 8 (i % 2), depth t + 4 (i / 2)
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[i % 2 * 2]), "+d"(d[i % 2 * 2 + 1])
                 : "d"(a[i]), "d"(b[i / 2]));
#endif
}

// n = 1, 2 or 4 matrices of 8 rows of 16 bytes, M_j in registers[j]: lane l gives `row`, the address of row l % 8 of M_(l / 8) (lanes from
// 8 n on are not asked) and gets M_j[l / 4, l % 4] in words of 4 bytes. Transposed, for 16-bit elements: M_j[2 (l % 4) + h, l / 4]. Every
// lane of the warp must call it; rows begin at multiples of 16 bytes.
//
// What to give, from matrices in shared memory row by row (transposed: 16-bit elements):
//
//   a of A (16, k)       n = 4                row l % 16, from byte 16 (l / 16)
//   b of B^T (8, k)      n = 2                row l % 8, from byte 16 (l / 8 % 2)
//   a of A^T (k, 16)     n = 4, transposed    row 8 (l / 16) + l % 8, from element 8 (l / 8 % 2)
//   b of B (k, 8)        n = 2, transposed    row l % 16
template <bool kTransposed = false, int n, class T>
__device__ __forceinline__ void load_matrices(uint32_t (&registers)[n], Shared<T> row) {
  static_assert((n == 1 || n == 2 || n == 4) && (!kTransposed || sizeof(T) == 2));
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
#define MFAC_LDMATRIX(shape, names, ...)                                                                   \
  if constexpr (kTransposed)                                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".trans.shared.b16 {" names : __VA_ARGS__ : "r"(at)); \
  else                                                                                                     \
    asm volatile("ldmatrix.sync.aligned.m8n8." shape ".shared.b16 {" names : __VA_ARGS__ : "r"(at))
  if constexpr (n == 1)
    MFAC_LDMATRIX("x1", "%0}, [%1];", "=r"(registers[0]));
  else if constexpr (n == 2)
    MFAC_LDMATRIX("x2", "%0, %1}, [%2];", "=r"(registers[0]), "=r"(registers[1]));
  else
    MFAC_LDMATRIX("x4", "%0, %1, %2, %3}, [%4];", "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]));
#undef MFAC_LDMATRIX
}

}  // namespace mfac_kernels

#endif
