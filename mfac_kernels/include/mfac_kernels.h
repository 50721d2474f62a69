/* The CPU kernels of mfac_kernels for other libraries: C, no torch, no Python.

   Compile with mfac_kernels.get_include() and link with mfac_kernels.get_library(), which needs torch's libraries at run time:
   after `import torch` they are there. Matrices are row by row; a stride is the distance from row to row, in elements. Memory that
   is written overlaps no other. Work is shared out to torch's threads, and results are the same, bit for bit, for any number of them.

   A function that is here stays as it is: what it takes and what it does. New ones come with a higher version. */
#ifndef MFAC_KERNELS_H
#define MFAC_KERNELS_H

#include <stdint.h>

#define MFAC_KERNELS_C_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/* What a function returns. Where it is not MFAC_OK, nothing was written; after MFAC_FAILED, which no input is known to cause, some may be. */
enum { MFAC_OK = 0, MFAC_BAD_ARGUMENT = 1, MFAC_NO_MEMORY = 2, MFAC_FAILED = 3 };

/* Types of elements. */
enum { MFAC_FLOAT32 = 0, MFAC_FLOAT64 = 1, MFAC_BFLOAT16 = 2, MFAC_FLOAT16 = 3 };

/* MFAC_KERNELS_C_VERSION of the library that runs: at least that of the header, or functions are missing. */
int32_t mfac_c_version(void);

/* inverses[i] = (blocks[i] + damping I)^-1 for `count` blocks (n, n), float32 or float64, contiguous; of each the lower triangle is
   read. inverses may be blocks. info[i]: 0; or k > 0, the order of the first leading minor that is not positive; or -1, not finite:
   that inverse is NaN. */
int32_t mfac_cholesky_inverse(int32_t type, int64_t count, int64_t n, const void* blocks, double damping, void* inverses, int32_t* info);

/* factor = beta factor + alpha sum_r w_r x_r x_r^T for x (rows, columns) of any type; factor (columns, columns), contiguous, float32,
   or float64 for float64 x; beta = 0: it is not read. weights (rows), of the factor's type, or null: all 1. */
int32_t mfac_linear_factor(int32_t type, int64_t rows, int64_t columns, const void* x, int64_t stride, const void* weights, double beta,
                           double alpha, void* factor);

/* out (m, m) = g g^T in float64, for g (m, d) of any type. Products are in float32 for float32 and narrower, unless in_double. */
int32_t mfac_gram(int32_t type, int64_t m, int64_t d, const void* g, int64_t stride, int32_t in_double, double* out);

/* dots (k, m) = x window^T in float64, for window (m, d) and x (k, d) of one type. */
int32_t mfac_window_dots(int32_t type, int64_t m, int64_t d, const void* window, int64_t stride, int64_t k, const void* x, int64_t x_stride,
                         double* dots);

/* out (k, d) = alpha x + beta coefficients window, summed in float64 and rounded once; coefficients (k, m), contiguous; x (k, d), or
   null: none; out contiguous. window, x and out have one type. */
int32_t mfac_window_combine(int32_t type, int64_t m, int64_t d, const void* window, int64_t stride, int64_t k, const double* coefficients,
                            double beta, const void* x, int64_t x_stride, double alpha, void* out);

#ifdef __cplusplus
}
#endif

#endif
