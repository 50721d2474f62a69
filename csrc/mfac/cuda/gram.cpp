// Glue of the Gram matrices on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

Tensor gram_of_blocks(const char* op, const Tensor& g, const DeviceRows& rows, int64_t block_size, bool double_precision) {
  const DeviceOf device(op, g);
  const int64_t segments = gram_segments(rows, block_size);
  const Tensor grams = uninitialised(g, {block_count(rows.dim, block_size), rows.rows, rows.rows}, ScalarType::Double);
  const Tensor partial = segments > 1 ? uninitialised(g, {segments * grams.numel()}, ScalarType::Double) : grams;
  device.check_launched(gram(rows, block_size, double_precision, doubles_of(partial), doubles_of(grams), device.stream()));
  return grams;
}

Tensor gram_cuda(const Tensor& g, bool double_precision) {
  const Rows rows = check_gradients("gram", g);
  if (rows.dim == 0) return torch::stable::new_zeros(g, {rows.rows, rows.rows}, ScalarType::Double);
  return torch::stable::select(gram_of_blocks("gram", g, rows.on_device(), rows.dim, double_precision), 0, 0);
}

Tensor block_gram_cuda(const Tensor& g, int64_t block_size, bool double_precision) {
  const Rows rows = check_gradients("block_gram", g);
  check_block_size("block_gram", block_size);
  return gram_of_blocks("block_gram", g, rows.on_device(), block_size, double_precision);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("block_gram", TORCH_BOX(&block_gram_cuda));
}

}  // namespace mfac_kernels
