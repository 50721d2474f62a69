/* A library of its own on the kernels, in C: the damped inverse of a layer's factor, straight from its inputs.

   cc -shared -fPIC -I $(get_include) c_interface.c $(get_library) -Wl,-rpath,$(its folder) -o layer.so        (see c_interface.py) */
#include <mfac_kernels.h>

/* inverse = ((1 / rows) sum_r x_r x_r^T + damping I)^-1 for x (rows, columns), float32, contiguous. Returns 0, or what has failed. */
int32_t layer_inverse(int64_t rows, int64_t columns, const float* x, double damping, float* inverse) {
  int32_t info = 0;
  if (mfac_c_version() < MFAC_KERNELS_C_VERSION) return -2;
  int32_t status = mfac_linear_factor(MFAC_FLOAT32, rows, columns, x, columns, 0, 0.0, 1.0 / (double)rows, inverse);
  if (status == MFAC_OK) status = mfac_cholesky_inverse(MFAC_FLOAT32, 1, columns, inverse, damping, inverse, &info);
  return status == MFAC_OK ? info : status;
}
