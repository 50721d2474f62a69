// The kernels of a sliding window, without torch: raw pointers, sizes, one function per chunk of work. window.cpp splits the work over
// threads, core.cpp runs on one.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace mfac_kernels {

// Columns that a window pass handles at a time. Its float64 accumulators (64 KiB a vector) stay in L2 while the rows stream past; shorter
// runs of a row leave the hardware prefetcher no time (of what torch.mv reads, measured: 1024 columns 70%, 4096 80%, 8192 95%).
constexpr int64_t kWindowChunk = 8192;
// Columns past the last one that may be read: as many as a vector has
constexpr int64_t kWindowPad = 8;

// The two passes over a window G (rows, dim), float32 or narrower storage, float64 arithmetic. See window_impl.h.
struct WindowKernels {
  // out[i] = float64(src[i])
  void (*widen)(const void* src, int64_t n, double* out);
  // out[i] = dtype(src[i]), to nearest even
  void (*narrow)(const double* src, int64_t n, void* out);
  // dots[v, i] += sum_j G[i, j] x[v, j] for j < n;  x (k, kWindowChunk), zero in the pad past n;  dots (k, rows)
  void (*dots)(const void* window, int64_t stride, int64_t rows, int64_t n, const double* x, int64_t k, double* dots);
  // y[v, j] += sum_i c[v, i] G[i, j] for j < n;  c (k, rows);  y (k, kWindowChunk)
  void (*combine)(const void* window, int64_t stride, int64_t rows, int64_t n, const double* c, int64_t k, double* y);
};
const WindowKernels& window_kernels(DType);

// The m x m core: the Cholesky factor of K = shift I + S in the order of age. See core_impl.h.
struct CoreKernels {
  // Replaces the gradient in `slot` (absent: a zero row) by one with Gram row `dots`. `older` slots before it hold gradients.
  // With drop_oldest the slot held the oldest gradient, which leaves the factor. work: 2 m doubles.
  void (*replace)(double* factor, int64_t m, int64_t slot, int64_t older, bool drop_oldest, const double* dots, double shift, double* work);
  // x <- K^-1 x over the `count` slots that start at `oldest`; other entries become x / shift (their rows are zero).
  void (*solve)(const double* factor, int64_t m, int64_t oldest, int64_t count, double shift, double* x);
  // x <- K^-1 e_newest
  void (*solve_newest)(const double* factor, int64_t m, int64_t oldest, int64_t count, double* x);
};
const CoreKernels& core_kernels();

}  // namespace mfac_kernels
