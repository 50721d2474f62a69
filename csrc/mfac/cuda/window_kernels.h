// The window passes on the device, without torch. Sizes are in elements; every pointer is a device pointer. See window_dots_kernels.cu and
// window_combine_kernels.cu.
#pragma once
#include "common/cuda/launch.h"
#include "mfac/device_rows.h"

namespace mfac_kernels {

// Independent blocks of columns, each cut into segments, whose partial sums are added in order. The cut depends on the shape alone:
// results are the same bit for bit on every device.
struct WindowCut {
  int64_t blocks, segments;  // segments of one block
};
WindowCut window_cut(int64_t dim, int64_t block_size, int64_t vectors);

// dots (blocks, x.rows, window.rows).  partial: as many times segments
cudaError_t window_dots(const DeviceRows& window, const DeviceRows& x, int64_t block_size, double* partial, double* dots, cudaStream_t);

// dots (window.rows).  partial: window.rows + 1 times the segments of window_cut(dim, dim, 1)
cudaError_t window_insert(const DeviceRows& window, const int64_t* state, const DeviceRows& g, double* partial, double* dots, cudaStream_t);

// out (vectors, dim) = alpha x + beta C G.  coefficients (blocks, vectors, window.rows); x may be null
cudaError_t window_combine(const DeviceRows& window, const double* coefficients, int64_t block_size, double beta, const DeviceRows* x,
                           double alpha, const DeviceRows& out, cudaStream_t);

}  // namespace mfac_kernels
