// Glue of the Gram matrices on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

void gram_of_blocks(const char* op, const Tensor& g, const DeviceRows& rows, int64_t block_size, bool double_precision,
                    const Tensor& grams) {
  const DeviceOf device(op, g);
  const int64_t segments = gram_segments(rows, block_size);
  const Tensor partial = segments > 1 ? uninitialised(g, {segments * grams.numel()}, ScalarType::Double) : grams;
  device.check_launched(gram(rows, block_size, double_precision, doubles_of(partial), doubles_of(grams), device.stream()));
}

Tensor gram_cuda(const Tensor& g, bool double_precision) {
  const Rows rows = check_gradients("gram", g);
  Tensor result = uninitialised(g, {rows.rows, rows.rows}, ScalarType::Double);
  if (rows.dim == 0)
    torch::stable::zero_(result);
  else
    gram_of_blocks("gram", g, rows.on_device(), rows.dim, double_precision, result);
  return result;
}

Tensor block_gram_cuda(const Tensor& g, int64_t block_size, bool double_precision) {
  const Rows rows = check_gradients("block_gram", g);
  const int64_t width = block_width("block_gram", block_size, rows.dim);
  Tensor result = uninitialised(g, {block_count(rows.dim, width), rows.rows, rows.rows}, ScalarType::Double);
  gram_of_blocks("block_gram", g, rows.on_device(), width, double_precision, result);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("gram", TORCH_BOX(&gram_cuda));
  m.impl("block_gram", TORCH_BOX(&block_gram_cuda));
}

}  // namespace mfac_kernels
