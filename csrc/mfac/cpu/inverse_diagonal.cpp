// Glue of the inverse's diagonal: checks, allocation, and the split of the coordinates over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "common/cpu/tasks.h"
#include "common/new_tensor.h"
#include "mfac/checks.h"
#include "mfac/cpu/static_kernels.h"

namespace mfac_kernels {
namespace {

Tensor inverse_diagonal(const Tensor& g, const Tensor& transform, double damping) {
  const Rows rows = check_inverse_diagonal("inverse_diagonal", g, transform, damping);
  Tensor diagonal = new_tensor(g, {rows.dim}, inverse_type(rows.dtype));
  auto* out = static_cast<char*>(diagonal.mutable_data_ptr());
  const auto item = static_cast<int64_t>(diagonal.element_size());
  const auto& kernels = static_kernels(rows.dtype);
  const auto packed = std::make_unique_for_overwrite<char[]>(kernels.packed_transform_bytes(rows.rows));
  kernels.pack_transform(static_cast<const double*>(transform.const_data_ptr()), rows.rows, packed.get());
  constexpr int64_t kColumns = 512;  // per task
  for_each_task(divide_up(rows.dim, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns, n = std::min(kColumns, rows.dim - first);
    kernels.inverse_diagonal(rows.at(0, first), rows.stride, rows.rows, n, packed.get(), damping, out + first * item,
                             scratch(kernels.inverse_diagonal_work(rows.rows)));
  });
  return diagonal;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("inverse_diagonal", TORCH_BOX(&inverse_diagonal)); }

}  // namespace mfac_kernels
