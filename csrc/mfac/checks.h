// What the ops of M-FAC expect, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "common/checks.h"
#include "common/sizes.h"
#include "common/types.h"
#include "mfac/device_rows.h"

namespace mfac_kernels {

// A matrix with contiguous rows
struct Rows {
  char* data;
  DType dtype;
  int64_t rows, dim, stride, item;

  Rows(const char* op, const char* name, const Tensor& t)
      : data(static_cast<char*>(t.data_ptr())),
        dtype(dtype_of(op, name, t)),
        rows(t.size(0)),
        dim(t.size(1)),
        stride(t.stride(0)),
        item(static_cast<int64_t>(t.element_size())) {}
  Rows(const void* data, DType dtype, int64_t rows, int64_t dim, int64_t stride)
      : data(static_cast<char*>(const_cast<void*>(data))), dtype(dtype), rows(rows), dim(dim), stride(stride), item(element_size(dtype)) {}
  DeviceRows on_device() const { return {data, dtype, rows, dim, stride}; }
  char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * item; }
};

inline void check_block_size(const char* op, int64_t block_size) {
  check(block_size > 0, op, ": block_size: expected at least 1, got ", block_size);
}
// No more than there are columns; all of them where none is given
inline int64_t block_width(const char* op, const std::optional<int64_t>& block_size, int64_t columns) {
  const int64_t all = std::max<int64_t>(1, columns);
  if (!block_size) return all;
  check_block_size(op, *block_size);
  return std::min(*block_size, all);
}

inline void check_positive(const char* op, const char* name, double value) {
  check(value > 0 && std::isfinite(value), op, ": ", name, ": expected a positive finite number, got ", value);
}

// ---- sliding window ---------------------------------------------------------------------------------------------------------------

// Returns the columns of a block.
inline int64_t check_window_dots(const char* op, const Tensor& window, const Tensor& x, const std::optional<int64_t>& block_size) {
  check_rows(op, "window", window);
  check_rows(op, "x", x);
  check(x.size(1) == window.size(1), op, ": x: expected ", window.size(1), " columns, as window has, got ", x.size(1));
  return block_width(op, block_size, window.size(1));
}

// Returns g (d) as a contiguous row (1, d).
inline Tensor check_window_insert(const char* op, const Tensor& window, const Tensor& state, const Tensor& g) {
  check_rows(op, "window", window);
  check(window.numel() > 0, op, ": window: expected at least one row and one column, got shape ", shape(window));
  check_state(op, "state", state, ScalarType::Long, {2});
  check_shape(op, "g", g, {window.size(1)});
  const Tensor row = torch::stable::reshape(g, {1, g.size(0)});
  return row.size(1) > 1 && row.stride(1) != 1 ? torch::stable::contiguous(row) : row;
}

// Returns the columns of a block.
inline int64_t check_window_combine(const char* op, const Tensor& window, const Tensor& coefficients,
                                    const std::optional<int64_t>& block_size, const std::optional<Tensor>& x) {
  check_rows(op, "window", window);
  const int64_t dim = window.size(1), width = block_width(op, block_size, dim), blocks = block_count(dim, width);
  check(coefficients.dim() == 3, op, ": coefficients: expected 3 dimensions, got shape ", shape(coefficients));
  check_state(op, "coefficients", coefficients, ScalarType::Double, {blocks, coefficients.size(1), window.size(0)});
  if (x) {
    check_rows(op, "x", *x);
    check_shape(op, "x", *x, {coefficients.size(1), dim});
  }
  return width;
}

// Gradients seen so far. On a device nobody looks: the kernels assert it.
inline int64_t seen_of(const char* op, const Tensor& state) {
  const int64_t seen = *static_cast<const int64_t*>(state.const_data_ptr());
  check(seen >= 0 && seen < std::numeric_limits<int64_t>::max(), op, ": state: expected a count of gradients, got ", seen);
  return seen;
}

// Returns m.
inline int64_t check_core(const char* op, const Tensor& factor, const Tensor& state, double shift) {
  check(factor.dim() == 2 && factor.size(0) > 0, op, ": factor: expected shape (m, m) with m >= 1, got ", shape(factor));
  const int64_t m = factor.size(0);
  check_state(op, "factor", factor, ScalarType::Double, {m, m});
  check_state(op, "state", state, ScalarType::Long, {2});
  check_positive(op, "shift", shift);
  return m;
}

// b (k, m)
inline void check_core_solve(const char* op, const Tensor& b, int64_t m) {
  check(b.dim() == 2, op, ": b: expected 2 dimensions, got shape ", shape(b));
  check_state(op, "b", b, ScalarType::Double, {b.size(0), m});
}

// ---- fixed gradients --------------------------------------------------------------------------------------------------------------

// g (m, d)
inline Rows check_gradients(const char* op, const Tensor& g) {
  check_rows(op, "g", g);
  return Rows(op, "g", g);
}

// What inverses of a Fisher matrix are stored in
inline ScalarType inverse_type(DType gradients) { return gradients == DType::f64 ? ScalarType::Double : ScalarType::Float; }

inline Rows check_inverse_diagonal(const char* op, const Tensor& g, const Tensor& transform, double damping) {
  const Rows rows = check_gradients(op, g);
  check_state(op, "transform", transform, ScalarType::Double, {rows.rows, rows.rows});
  check_positive(op, "damping", damping);
  return rows;
}

inline Rows check_block_inverse(const char* op, const Tensor& g, int64_t block_size, double count) {
  const Rows rows = check_gradients(op, g);
  check_block_size(op, block_size);
  check_positive(op, "count", count);
  return rows;
}

}  // namespace mfac_kernels
