// Glue of the window passes: checks, allocation, and the split of the columns over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "mfac/mfac.h"

namespace mfac_kernels {
namespace {

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
  char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * item; }
  const WindowKernels& kernels() const { return window_kernels(dtype); }
};

// Chunks are dealt to a number of segments that depends on the shape alone, never on the thread count: sums over the columns are the
// same bit for bit whatever the number of threads.
struct Segments {
  int64_t chunks, count, grain;

  Segments(int64_t dim, int64_t work_per_column)
      : chunks((dim + kWindowChunk - 1) / kWindowChunk), count(std::min<int64_t>(chunks, 64)) {
    constexpr int64_t kWorthAThread = 1 << 15;
    const int64_t work_per_segment = std::max<int64_t>(1, dim / std::max<int64_t>(1, count) * work_per_column);
    grain = std::max<int64_t>(1, kWorthAThread / work_per_segment);
  }

  // body(segment, column, columns) for each chunk of each segment
  template <class Body>
  void for_each_chunk(int64_t dim, const Body& body) const {
    parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s)
        for (int64_t c = s * chunks / count; c < (s + 1) * chunks / count; ++c)
          body(s, c * kWindowChunk, std::min(kWindowChunk, dim - c * kWindowChunk));
    });
  }
};

double* scratch(size_t doubles) {
  thread_local std::vector<double> buffer;
  if (buffer.size() < doubles) buffer.resize(doubles);
  return buffer.data();
}

void sum_segments(const std::vector<double>& partial, int64_t segments, int64_t n, double* out) {
  std::fill_n(out, n, 0.0);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t i = 0; i < n; ++i) out[i] += partial[s * n + i];
}

// Widens n columns of one row and pads the chunk with zeros.
void widen_chunk(const WindowKernels& kernels, const void* src, int64_t n, double* out) {
  kernels.widen(src, n, out);
  std::fill(out + n, out + kWindowChunk, 0.0);
}

// Vectors per pass: their chunks fill at most half of a common L2 cache.
constexpr int64_t kMaxVectors = 64;

Tensor window_dots(const Tensor& window, const Tensor& x) {
  constexpr const char* op = "window_dots";
  check_rows(op, "window", window);
  check_rows(op, "x", x);
  check(x.size(1) == window.size(1), op, ": x: expected ", window.size(1), " columns, as window has, got ", x.size(1));
  const Rows g(op, "window", window), v(op, "x", x);
  Tensor dots = torch::stable::new_zeros(window, {v.rows, g.rows}, ScalarType::Double);
  double* out = static_cast<double*>(dots.mutable_data_ptr());
  for (int64_t first = 0; first < v.rows; first += kMaxVectors) {
    const int64_t k = std::min(kMaxVectors, v.rows - first);
    const Segments segments(g.dim, g.rows * k);
    std::vector<double> partial(segments.count * k * g.rows, 0.0);
    segments.for_each_chunk(g.dim, [&](int64_t s, int64_t column, int64_t n) {
      double* chunk = scratch(k * kWindowChunk);
      for (int64_t i = 0; i < k; ++i) widen_chunk(v.kernels(), v.at(first + i, column), n, chunk + i * kWindowChunk);
      g.kernels().dots(g.at(0, column), g.stride, g.rows, n, chunk, k, partial.data() + s * k * g.rows);
    });
    sum_segments(partial, segments.count, k * g.rows, out + first * g.rows);
  }
  return dots;
}

// The sum of squares of g after rounding to the window's type: finite exactly if every dot product with it will be.
double rounded_square_sum(const Rows& g, const Rows& window) {
  const Segments segments(g.dim, 1);
  std::vector<double> partial(segments.count, 0.0);
  segments.for_each_chunk(g.dim, [&](int64_t s, int64_t column, int64_t n) {
    alignas(64) double chunk[kWindowChunk];
    alignas(64) char rounded[kWindowChunk * sizeof(double)];
    g.kernels().widen(g.at(0, column), n, chunk);
    window.kernels().narrow(chunk, n, rounded);
    window.kernels().widen(rounded, n, chunk);
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += chunk[j] * chunk[j];
    partial[s] += sum;
  });
  double sum;
  sum_segments(partial, segments.count, 1, &sum);
  return sum;
}

Tensor window_insert_(const Tensor& window, const Tensor& state, const Tensor& gradient) {
  constexpr const char* op = "window_insert_";
  check_rows(op, "window", window);
  check(window.size(0) > 0, op, ": window: expected at least one row, got shape ", shape(window));
  check_state(op, "state", state, ScalarType::Long, {2});
  check_shape(op, "g", gradient, {window.size(1)});
  Tensor row = torch::stable::reshape(gradient, {1, gradient.size(0)});
  if (row.size(1) > 1 && row.stride(1) != 1) row = torch::stable::contiguous(row);
  const Rows w(op, "window", window), g(op, "g", row);
  Tensor dots = torch::stable::new_empty(window, {w.rows}, ScalarType::Double);
  double* out = static_cast<double*>(dots.mutable_data_ptr());

  const double square_sum = rounded_square_sum(g, w);
  if (!std::isfinite(square_sum)) {
    std::fill_n(out, w.rows, std::numeric_limits<double>::quiet_NaN());
    return dots;
  }
  const int64_t seen = *static_cast<const int64_t*>(state.const_data_ptr());
  const int64_t slot = seen % w.rows, filled = std::min(seen + 1, w.rows);
  const Segments segments(w.dim, filled);
  std::vector<double> partial(segments.count * w.rows, 0.0);
  // One pass: each chunk of the new row is rounded, stored, and met by every row, itself included.
  segments.for_each_chunk(w.dim, [&](int64_t s, int64_t column, int64_t n) {
    double* chunk = scratch(kWindowChunk);
    g.kernels().widen(g.at(0, column), n, chunk);
    w.kernels().narrow(chunk, n, w.at(slot, column));
    widen_chunk(w.kernels(), w.at(slot, column), n, chunk);
    w.kernels().dots(w.at(0, column), w.stride, filled, n, chunk, 1, partial.data() + s * w.rows);
  });
  sum_segments(partial, segments.count, w.rows, out);
  return dots;
}

Tensor window_combine(const Tensor& window, const Tensor& coefficients, double beta, const std::optional<Tensor>& x, double alpha,
                      ScalarType dtype) {
  constexpr const char* op = "window_combine";
  check_rows(op, "window", window);
  check(coefficients.dim() == 2, op, ": coefficients: expected 2 dimensions, got shape ", shape(coefficients));
  check_state(op, "coefficients", coefficients, ScalarType::Double, {coefficients.size(0), window.size(0)});
  const Rows g(op, "window", window), c(op, "coefficients", coefficients);
  if (x) {
    check_rows(op, "x", *x);
    check_shape(op, "x", *x, {c.rows, g.dim});
  }
  const std::optional<Rows> v = x ? std::optional<Rows>(Rows(op, "x", *x)) : std::nullopt;
  Tensor result = torch::stable::new_empty(window, {c.rows, g.dim}, dtype);
  const Rows out(op, "dtype", result);
  const auto* weights = static_cast<const double*>(coefficients.const_data_ptr());
  for (int64_t first = 0; first < c.rows; first += kMaxVectors) {
    const int64_t k = std::min(kMaxVectors, c.rows - first);
    Segments(g.dim, g.rows * k).for_each_chunk(g.dim, [&](int64_t, int64_t column, int64_t n) {
      double* y = scratch((k + 1) * kWindowChunk);
      double* input = y + k * kWindowChunk;
      std::fill_n(y, k * kWindowChunk, 0.0);
      g.kernels().combine(g.at(0, column), g.stride, g.rows, n, weights + first * g.rows, k, y);
      for (int64_t i = 0; i < k; ++i) {
        double* yi = y + i * kWindowChunk;
        if (v) {
          v->kernels().widen(v->at(first + i, column), n, input);
          for (int64_t j = 0; j < n; ++j) yi[j] = alpha * input[j] + beta * yi[j];
        } else {
          for (int64_t j = 0; j < n; ++j) yi[j] *= beta;
        }
        out.kernels().narrow(yi, n, out.at(first + i, column));
      }
    });
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("window_dots", TORCH_BOX(&window_dots));
  m.impl("window_insert_", TORCH_BOX(&window_insert_));
  m.impl("window_combine", TORCH_BOX(&window_combine));
}

}  // namespace mfac_kernels
