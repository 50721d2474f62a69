// Glue of the inverses of primal blocks: checks, allocation, and the split of the blocks over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/cpu/tasks.h"
#include "common/new_tensor.h"
#include "mfac/checks.h"
#include "mfac/cpu/static_kernels.h"

namespace mfac_kernels {
namespace {

std::tuple<Tensor, Tensor> block_inverse(const Tensor& g, int64_t block_size, double damping, double count) {
  const Rows rows = check_block_inverse("block_inverse", g, block_size, count);
  const StaticKernels& kernels = static_kernels(rows.dtype);
  const int64_t blocks = block_count(rows.dim, block_size);
  Tensor inverse = new_tensor(g, {blocks, block_size, block_size}, inverse_type(rows.dtype));
  Tensor info = new_tensor(g, {blocks}, ScalarType::Int);
  auto* out = static_cast<char*>(inverse.mutable_data_ptr());
  auto* codes = static_cast<int32_t*>(info.mutable_data_ptr());
  const auto block_bytes = block_size * block_size * static_cast<int64_t>(inverse.element_size());
  const int64_t run = std::max<int64_t>(1, 512 / block_size);  // neighbours stay with one thread, which prefetches the next
  for_each_task(divide_up(blocks, run), [&](int64_t task) {
    for (int64_t b = task * run; b < std::min(blocks, (task + 1) * run); ++b) {
      const int64_t first = b * block_size, width = std::min(block_size, rows.dim - first);
      const int64_t ahead = std::min({rows.dim - first - width, ((task + 1) * run - b - 1) * block_size, block_size});
      if (width < block_size) std::memset(out + b * block_bytes, 0, block_bytes);
      codes[b] = kernels.block_inverse(rows.at(0, first), rows.stride, rows.rows, width, ahead, damping, count, out + b * block_bytes,
                                       block_size, scratch(kernels.block_inverse_work(width)));
    }
  });
  return {inverse, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("block_inverse", TORCH_BOX(&block_inverse)); }

}  // namespace mfac_kernels
