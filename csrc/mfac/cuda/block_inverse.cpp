// Glue of the inverses of primal blocks on the device: checks, allocation, launch. The blocks are formed where their inverses will be, and
// inverted in place by the batched Cholesky op.
#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

// blocks <- (blocks + damping I)^-1; the codes of all of them
Tensor cholesky_inverse(const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack = {from(blocks), from(blocks), from(damping), from(std::optional<Tensor>())};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mfac_kernels::cholesky_inverse_", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor> block_inverse_cuda(const Tensor& g, int64_t block_size, double damping, double count) {
  constexpr const char* op = "block_inverse";
  const Rows rows = check_block_inverse(op, g, block_size, count);
  const DeviceOf device(op, g);
  const int64_t blocks = block_count(rows.dim, block_size), whole = rows.dim / block_size, rest = rows.dim % block_size;
  Tensor inverse = uninitialised(g, {blocks, block_size, block_size}, inverse_type(rows.dtype));
  std::vector<Tensor> batches;
  if (whole > 0) batches.push_back(torch::stable::narrow(inverse, 0, 0, whole));
  if (rest > 0) {
    Tensor last = torch::stable::narrow(inverse, 0, whole, 1);
    torch::stable::zero_(last);
    for (const int64_t dim : {1, 2}) last = torch::stable::narrow(last, dim, 0, rest);
    batches.push_back(last);
  }
  if (batches.empty()) return {inverse, new_tensor(g, {0}, ScalarType::Int)};
  device.check_launched(block_products(rows.on_device(), block_size, count, inverse.data_ptr(), device.stream()));
  Tensor one_damping = new_tensor(g, {1}, ScalarType::Double);
  torch::stable::fill_(one_damping, damping);
  return {inverse, cholesky_inverse(batches, std::vector<Tensor>(batches.size(), one_damping))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("block_inverse", TORCH_BOX(&block_inverse_cuda)); }

}  // namespace mfac_kernels
