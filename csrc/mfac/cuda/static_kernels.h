// The kernels of a fixed set of gradients G (m, d) on the device, without torch; every pointer is a device pointer. See gram_kernels.cu,
// inverse_diagonal_kernels.cu, block_inverse_kernels.cu. How the work is cut depends on shapes alone: results are the same bit for bit on
// every device.
#pragma once
#include "common/cuda/launch.h"
#include "mfac/device_rows.h"

namespace mfac_kernels {

// Parts of a block's columns, whose Gram matrices are added in order.
int64_t gram_segments(const DeviceRows& g, int64_t block_size);

// grams (blocks, m, m), of products in float64 if asked, or else in float32 but for float64 gradients.  partial: as many times segments, or
// grams itself if there is one segment
cudaError_t gram(const DeviceRows& g, int64_t block_size, bool double_precision, double* partial, double* grams, cudaStream_t);

// Parts of the rows of T, whose sums of squares are added in order.
int64_t inverse_diagonal_splits(const DeviceRows& g);

// diagonal (d), float64 for float64 gradients and float32 otherwise.  transform (m, m); partial: splits times d
cudaError_t inverse_diagonal(const DeviceRows& g, const double* transform, double damping, double* partial, void* diagonal, cudaStream_t);

// products (blocks, block_size, block_size) = G_b^T G_b / count, float64 for float64 gradients and float32 otherwise. Only the lower
// triangles are written, and of a ragged last block only what it has.
cudaError_t block_products(const DeviceRows& g, int64_t block_size, double count, void* products, cudaStream_t);

}  // namespace mfac_kernels
