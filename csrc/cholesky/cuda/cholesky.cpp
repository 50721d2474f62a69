// Glue of the ops on symmetric positive definite blocks on the device: checks, allocation, launch.
#include "cholesky/cuda/cholesky_kernels.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cholesky/checks.h"
#include "common/cuda/glue.h"

namespace mfac_kernels {
namespace {

// Matrices of two tensors (..., rows, columns) whose batch dimensions agree, one stride apart; flat counts matrices.
struct Run {
  int64_t count, first_a, first_b, flat, stride_a, stride_b, flat_stride;
};

// The batch as runs: along its longest dimension, once dimensions that one stride spans are merged. body(run)
template <class Body>
void for_each_run(const Tensor& a, const Tensor& b, const Body& body) {
  struct Dim {
    int64_t size, a, b, flat;
  };
  std::vector<Dim> dims;  // the last one first
  int64_t count = 1;
  for (int64_t d = a.dim() - 3; d >= 0; --d) {
    const Dim dim = {a.size(d), a.stride(d), b.stride(d), count};
    count *= dim.size;
    if (dim.size == 1) continue;
    if (!dims.empty() && dim.a == dims.back().size * dims.back().a && dim.b == dims.back().size * dims.back().b)
      dims.back().size *= dim.size;
    else
      dims.push_back(dim);
  }
  if (count == 0) return;
  if (dims.empty()) dims.push_back({1, 0, 0, 0});
  std::iter_swap(dims.begin(), std::max_element(dims.begin(), dims.end(), [](const Dim& x, const Dim& y) { return x.size < y.size; }));
  for (int64_t i = 0; i < count / dims[0].size; ++i) {
    Run run = {dims[0].size, 0, 0, 0, dims[0].a, dims[0].b, dims[0].flat};
    int64_t rest = i;
    for (size_t d = 1; d < dims.size(); ++d) {
      const int64_t at = rest % dims[d].size;
      rest /= dims[d].size;
      run.first_a += at * dims[d].a;
      run.first_b += at * dims[d].b;
      run.flat += at * dims[d].flat;
    }
    body(run);
  }
}

void* element(const Tensor& t, int64_t offset) { return static_cast<char*>(t.data_ptr()) + offset * t.element_size(); }

BlockStrides strides_of(const Tensor& t, int64_t batch) { return {batch, t.stride(-2), t.stride(-1)}; }

// A batch of matrices (n, n), n > 0, from its first element, and where the next elements lie
struct View {
  void* data;
  BlockStrides strides;
};
View view_of(const Tensor& t, int64_t first, int64_t batch) { return {element(t, first), strides_of(t, batch)}; }

View transposed(const View& view) { return {view.data, {view.strides.batch, view.strides.column, view.strides.row}}; }

// J x J, with J the reversal of indices
View reversed(const View& view, int64_t n, int64_t item) {
  const int64_t last = (n - 1) * (view.strides.row + view.strides.column);
  return {static_cast<char*>(view.data) + last * item, {view.strides.batch, -view.strides.row, -view.strides.column}};
}

// Of upper triangular results: the kernels' are lower triangular. With J H J = L L^T, H^-1 = U^T U for U = J L^-1 J, and the lower triangle
// of J H J is that of H, transposed and reversed; of a triangle U, U^-1 = J (J U J)^-1 J.
enum class Order { as_it_is, reversed };

Tensor cholesky(const char* op, CholeskyResult result, Order order, const std::vector<DampedBatch>& batches, const std::vector<Tensor>& out,
                const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping, const std::optional<Tensor>& only) {
  check(!blocks.empty(), op, ": blocks: expected at least one tensor");
  const DeviceOf device(op, blocks[0]);
  for (size_t i = 0; i < blocks.size(); ++i) {
    device.check_same("blocks", blocks[i]);
    device.check_same("out", out[i]);
  }
  for (const Tensor& shift : damping) device.check_same("damping", shift);
  if (only) device.check_same("only", *only);
  Tensor info = uninitialised(blocks[0], {block_count(batches)}, ScalarType::Int);
  if (std::any_of(batches.begin(), batches.end(), [](const DampedBatch& batch) { return batch.blocks.rows == 0; }))
    torch::stable::zero_(info);
  auto* const codes = static_cast<int32_t*>(info.mutable_data_ptr());
  const auto* const chosen = only ? static_cast<const int32_t*>(only->const_data_ptr()) : nullptr;
  std::optional<Tensor> none;  // the damping of all, where there is none
  if (damping.empty()) {
    none = uninitialised(blocks[0], {1}, ScalarType::Double);
    torch::stable::zero_(*none);
  }

  for (const DType dtype : {DType::f32, DType::f64}) {
    std::vector<DeviceBlocks> list;
    for (size_t i = 0; i < blocks.size(); ++i) {
      const DampedBatch& batch = batches[i];
      if (batch.out.dtype != dtype || batch.blocks.rows == 0) continue;
      for_each_run(out[i], blocks[i], [&](const Run& run) {
        View from = view_of(blocks[i], run.first_b, run.stride_b), to = view_of(out[i], run.first_a, run.stride_a);
        if (order == Order::reversed) {
          if (result == CholeskyResult::inverse_factor) from = transposed(from);
          from = reversed(from, batch.blocks.rows, batch.blocks.item);
          to = reversed(to, batch.blocks.rows, batch.out.item);
        }
        const int64_t first = batch.first + run.flat;
        const double* const shift = none ? doubles_of(*none) : batch.damping + run.flat * batch.damping_stride;
        list.push_back({from.data, to.data, shift, chosen ? chosen + first : nullptr, codes + first, from.strides, to.strides,
                        run.flat_stride, run.flat_stride * batch.damping_stride, run.count, static_cast<int32_t>(batch.blocks.rows),
                        batch.blocks.dtype});
      });
    }
    // The largest first: they take longest.
    std::stable_sort(list.begin(), list.end(), [](const DeviceBlocks& x, const DeviceBlocks& y) { return x.n > y.n; });
    const auto count = static_cast<int64_t>(list.size());
    const Tensor work = uninitialised(blocks[0], {cholesky_work(dtype, list.data(), count)}, ScalarType::Byte);
    device.check_launched(cholesky_blocks(result, dtype, list.data(), count, work.data_ptr(), device.stream()));
  }
  return info;
}

Tensor damped(const char* op, CholeskyResult result, Order order, const std::vector<Tensor>& out, const std::vector<Tensor>& blocks,
              const std::vector<Tensor>& damping, const std::optional<Tensor>& only) {
  return cholesky(op, result, order, check_damped_batches(op, out, blocks, damping, only), out, blocks, damping, only);
}

Tensor cholesky_inverse_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                             const std::optional<Tensor>& only) {
  return damped("cholesky_inverse_", CholeskyResult::inverse, Order::as_it_is, out, blocks, damping, only);
}

Tensor cholesky_factor_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                            const std::optional<Tensor>& only) {
  return damped("cholesky_factor_", CholeskyResult::factor, Order::as_it_is, out, blocks, damping, only);
}

// One batch with one damping into new memory: result and codes.
std::tuple<Tensor, Tensor> of_one_batch(const char* op, CholeskyResult result, const Tensor& blocks, double damping) {
  const Tensor out = new_result(op, blocks);
  Tensor shift = uninitialised(blocks, {1}, ScalarType::Double);
  torch::stable::fill_(shift, damping);
  const Tensor info = damped(op, result, Order::as_it_is, {out}, {blocks}, {shift}, std::nullopt);
  const auto sizes = blocks.sizes();
  return {out, torch::stable::view(info, {sizes.data(), sizes.size() - 2})};
}

std::tuple<Tensor, Tensor> cholesky_inverse_ex_cuda(const Tensor& blocks, double damping) {
  return of_one_batch("cholesky_inverse_ex", CholeskyResult::inverse, blocks, damping);
}

std::tuple<Tensor, Tensor> cholesky_factor_ex_cuda(const Tensor& blocks, double damping) {
  return of_one_batch("cholesky_factor_ex", CholeskyResult::factor, blocks, damping);
}

Tensor cholesky_inverse_factor_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                                    bool upper, const std::optional<Tensor>& only) {
  const Order order = upper ? Order::reversed : Order::as_it_is;
  return damped("cholesky_inverse_factor_", CholeskyResult::inverse_factor, order, out, blocks, damping, only);
}

Tensor triangular_inverse_cuda(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, bool upper) {
  constexpr const char* op = "triangular_inverse_";
  const Order order = upper ? Order::reversed : Order::as_it_is;
  return cholesky(op, CholeskyResult::triangular_inverse, order, check_triangular_batches(op, out, blocks), out, blocks, {}, std::nullopt);
}

void cholesky_solve_cuda(const std::vector<Tensor>& x, const std::vector<Tensor>& factors) {
  constexpr const char* op = "cholesky_solve_";
  const std::vector<SolveBatch> batches = check_solve_batches(op, x, factors);
  if (x.empty()) return;
  const DeviceOf device(op, x[0]);
  for (size_t i = 0; i < x.size(); ++i) {
    device.check_same("x", x[i]);
    device.check_same("factors", factors[i]);
  }
  for (const DType dtype : {DType::f32, DType::f64}) {
    std::vector<DeviceSolve> list;
    for (size_t i = 0; i < x.size(); ++i) {
      const Batch& batch = batches[i].x;
      if (batch.dtype != dtype || batch.rows == 0) continue;
      for_each_run(x[i], factors[i], [&](const Run& run) {
        list.push_back({element(factors[i], run.first_b), element(x[i], run.first_a), strides_of(factors[i], run.stride_b),
                        strides_of(x[i], run.stride_a), run.count, batch.columns, static_cast<int32_t>(batch.rows)});
      });
    }
    std::stable_sort(list.begin(), list.end(), [](const DeviceSolve& a, const DeviceSolve& b) { return a.n > b.n; });
    device.check_launched(cholesky_solve(dtype, list.data(), static_cast<int64_t>(list.size()), device.stream()));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("cholesky_inverse_ex", TORCH_BOX(&cholesky_inverse_ex_cuda));
  m.impl("cholesky_factor_ex", TORCH_BOX(&cholesky_factor_ex_cuda));
  m.impl("cholesky_inverse_", TORCH_BOX(&cholesky_inverse_cuda));
  m.impl("cholesky_factor_", TORCH_BOX(&cholesky_factor_cuda));
  m.impl("cholesky_inverse_factor_", TORCH_BOX(&cholesky_inverse_factor_cuda));
  m.impl("triangular_inverse_", TORCH_BOX(&triangular_inverse_cuda));
  m.impl("cholesky_solve_", TORCH_BOX(&cholesky_solve_cuda));
}

}  // namespace mfac_kernels
