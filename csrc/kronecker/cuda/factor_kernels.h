// Kronecker factors on the device, without torch. Every pointer is a device pointer. See factor_kernels.cu.
#pragma once
#include "common/cuda/launch.h"
#include "kronecker/patches.h"

namespace mfac_kernels {

// The rows whose products are summed: those of a patch matrix (its channels are those of one group), with a bias behind them.
struct FactorRows {
  Patches patches;
  double bias = 1, bias_square = -1;  // its entry in every row; the sum of its squares, if that is no sum over the rows
  const void* weights = nullptr;      // one per row, of the factor's type
  bool allow_tf32 = false;            // may float32 rows be rounded to TF32?
  // Rows that are pixels weigh as much as the part of the kernel's offsets that meet them.
  bool by_visits = false;
  Axis visited[Patches::kAxes] = {};
  // (groups + 1), int32 if narrow, else int64: group g of the factor takes the rows [offsets[g], offsets[g + 1]) of a matrix
  const void* offsets = nullptr;
  bool narrow_offsets = false;
};

// factor <- beta factor + alpha sum of the rows' products; unchanged, with refused = 1, if refused is given and the sum is not finite. With
// offsets, refused, beta and alpha are of each group.
struct FactorJob {
  FactorRows rows;
  Factor factor;
  Scale beta, alpha;
  int32_t* refused;
};

// Bytes, which depend on shapes alone, as does how sums are cut: results are the same bit for bit on every device.
int64_t factor_workspace(const FactorJob* jobs, int64_t count);
int64_t cross_workspace(const Patches& x, const Patches& y);

// Several share their launches; rows of such jobs are not weighted by visits, and each factor has the bits that it has alone.
cudaError_t factor_accumulate(const FactorJob* jobs, int64_t count, void* workspace, cudaStream_t);

// out (x.channels, y.channels) = sum over rows of w x y^T
cudaError_t cross_products(const Patches& x, const Patches& y, const void* weights, void* out, void* workspace, cudaStream_t);

// out (samples, channels, offsets) = sum over the positions of each sample's patches; float32, or float64 for float64
cudaError_t sum_patches(const Patches& patches, void* out, cudaStream_t);

}  // namespace mfac_kernels
