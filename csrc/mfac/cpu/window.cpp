// Glue of the window passes: checks, allocation, and the split of the columns over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "common/cpu/parallel.h"
#include "common/cpu/tasks.h"
#include "common/new_tensor.h"
#include "mfac/cpu/passes.h"
#include "mfac/cpu/window_kernels.h"

namespace mfac_kernels {
namespace {

const WindowKernels& kernels_of(const Rows& rows) { return window_kernels(rows.dtype); }

// How the columns are cut: into blocks (independent curvature blocks; one block is the usual case), each block into chunks, and the chunks
// of a block into segments whose sums are added in order. The cut depends on the shape alone, never on the thread count: results are the
// same bit for bit whatever the number of threads.
struct Columns {
  int64_t dim, block_size, blocks, chunks, segments;  // chunks and segments of one block

  Columns(int64_t dim, int64_t block_size)
      : dim(dim),
        block_size(block_size),
        blocks(block_count(dim, block_size)),
        chunks((std::min(block_size, dim) + kWindowChunk - 1) / kWindowChunk),
        segments(std::clamp<int64_t>(64 / std::max<int64_t>(1, blocks), 1, std::max<int64_t>(1, chunks))) {}

  // body(block, segment of all segments, column, columns) for every chunk; segments run in parallel
  template <class Body>
  void for_each_chunk(int64_t work_per_column, const Body& body) const {
    constexpr int64_t kWorthAThread = 1 << 15;
    const int64_t all = blocks * segments;
    const int64_t work = std::max<int64_t>(1, dim / std::max<int64_t>(1, all) * work_per_column);
    parallel_for(0, all, std::max<int64_t>(1, kWorthAThread / work), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) {
        const int64_t block = s / segments, segment = s % segments, last = std::min((block + 1) * block_size, dim);
        for (int64_t c = segment * chunks / segments; c < (segment + 1) * chunks / segments; ++c) {
          const int64_t column = block * block_size + c * kWindowChunk;
          if (column < last) body(block, s, column, std::min(kWindowChunk, last - column));
        }
      }
    });
  }
  // out[block, :n] = sum over the block's segments of partial[segment, :n]
  void sum_segments(const std::vector<double>& partial, int64_t n, double* out) const {
    for (int64_t s = 0; s < blocks * segments; ++s) {
      double* sum = out + s / segments * n;
      if (s % segments == 0) std::fill_n(sum, n, 0.0);
      for (int64_t i = 0; i < n; ++i) sum[i] += partial[s * n + i];
    }
  }
};

double* doubles(int64_t n) { return static_cast<double*>(scratch(n * sizeof(double))); }

// What the kernels read of a chunk of n columns
int64_t padded(int64_t n) { return std::min(kWindowChunk, n + kWindowPad); }

// Widens n columns of one row and pads them with zeros.
void widen_chunk(const WindowKernels& kernels, const void* src, int64_t n, double* out) {
  kernels.widen(src, n, out);
  std::fill(out + n, out + padded(n), 0.0);
}

// Vectors per pass: their chunks, 64 KiB each, fill half of a 2 MiB L2 cache.
constexpr int64_t kMaxVectors = 16;

}  // namespace

void window_dots(const Rows& g, const Rows& v, int64_t block_size, double* out) {
  const Columns columns(g.dim, block_size);
  const int64_t most = std::min(kMaxVectors, v.rows);
  std::vector<double> partial(columns.blocks * columns.segments * most * g.rows), sums(columns.blocks * most * g.rows);
  for (int64_t first = 0; first < v.rows; first += kMaxVectors) {
    const int64_t k = std::min(kMaxVectors, v.rows - first), n = k * g.rows;
    std::fill(partial.begin(), partial.end(), 0.0);
    columns.for_each_chunk(n, [&](int64_t, int64_t segment, int64_t column, int64_t width) {
      double* chunk = doubles(k * kWindowChunk);
      for (int64_t i = 0; i < k; ++i) widen_chunk(kernels_of(v), v.at(first + i, column), width, chunk + i * kWindowChunk);
      kernels_of(g).dots(g.at(0, column), g.stride, g.rows, width, chunk, k, partial.data() + segment * n);
    });
    columns.sum_segments(partial, n, sums.data());
    for (int64_t block = 0; block < columns.blocks; ++block)
      std::copy_n(sums.data() + block * n, n, out + (block * v.rows + first) * g.rows);
  }
}

void window_combine(const Rows& g, const double* coefficients, int64_t block_size, double beta, const std::optional<Rows>& v, double alpha,
                    const Rows& out) {
  const Columns columns(g.dim, block_size);
  const int64_t vectors = out.rows;
  for (int64_t first = 0; first < vectors; first += kMaxVectors) {
    const int64_t k = std::min(kMaxVectors, vectors - first);
    columns.for_each_chunk(g.rows * k, [&](int64_t block, int64_t, int64_t column, int64_t n) {
      double* y = doubles((k + 1) * kWindowChunk);
      double* input = y + k * kWindowChunk;
      for (int64_t i = 0; i < k; ++i) std::fill_n(y + i * kWindowChunk, padded(n), 0.0);
      kernels_of(g).combine(g.at(0, column), g.stride, g.rows, n, coefficients + (block * vectors + first) * g.rows, k, y);
      for (int64_t i = 0; i < k; ++i) {
        double* yi = y + i * kWindowChunk;
        if (v) {
          kernels_of(*v).widen(v->at(first + i, column), n, input);
          for (int64_t j = 0; j < n; ++j) yi[j] = alpha * input[j] + beta * yi[j];
        } else {
          for (int64_t j = 0; j < n; ++j) yi[j] *= beta;
        }
        kernels_of(out).narrow(yi, n, out.at(first + i, column));
      }
    });
  }
}

namespace {

Tensor dots_of_window(const Tensor& window, const Tensor& x, const std::optional<int64_t>& block_size) {
  constexpr const char* op = "window_dots";
  const int64_t width = check_window_dots(op, window, x, block_size);
  const Rows g(op, "window", window), v(op, "x", x);
  Tensor dots = new_tensor(window, {block_count(g.dim, width), v.rows, g.rows}, ScalarType::Double);
  window_dots(g, v, width, static_cast<double*>(dots.mutable_data_ptr()));
  return dots;
}

// The sum of squares of g after rounding to the window's type: finite exactly if every dot product with it will be.
double rounded_square_sum(const Rows& g, const Rows& window) {
  const Columns columns(g.dim, g.dim);
  std::vector<double> partial(columns.segments, 0.0);
  columns.for_each_chunk(1, [&](int64_t, int64_t segment, int64_t column, int64_t n) {
    double *chunk = doubles(2 * kWindowChunk), *rounded = chunk + kWindowChunk;
    kernels_of(g).widen(g.at(0, column), n, chunk);
    kernels_of(window).narrow(chunk, n, rounded);
    kernels_of(window).widen(rounded, n, chunk);
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += chunk[j] * chunk[j];
    partial[segment] += sum;
  });
  double sum = 0;
  columns.sum_segments(partial, 1, &sum);
  return sum;
}

Tensor window_insert_(const Tensor& window, const Tensor& state, const Tensor& gradient) {
  constexpr const char* op = "window_insert_";
  const Tensor row = check_window_insert(op, window, state, gradient);
  const Rows w(op, "window", window), g(op, "g", row);
  Tensor dots = new_tensor(window, {w.rows}, ScalarType::Double);
  double* out = static_cast<double*>(dots.mutable_data_ptr());

  const double square_sum = rounded_square_sum(g, w);
  if (!std::isfinite(square_sum)) {
    std::fill_n(out, w.rows, std::numeric_limits<double>::quiet_NaN());
    return dots;
  }
  const int64_t seen = seen_of(op, state);
  const int64_t slot = seen % w.rows, filled = std::min(seen + 1, w.rows);
  const Columns columns(w.dim, w.dim);
  std::vector<double> partial(columns.segments * w.rows, 0.0);
  // One pass: each chunk of the new row is rounded, stored, and met by every row, itself included.
  columns.for_each_chunk(filled, [&](int64_t, int64_t segment, int64_t column, int64_t n) {
    double* chunk = doubles(kWindowChunk);
    kernels_of(g).widen(g.at(0, column), n, chunk);
    kernels_of(w).narrow(chunk, n, w.at(slot, column));
    widen_chunk(kernels_of(w), w.at(slot, column), n, chunk);
    kernels_of(w).dots(w.at(0, column), w.stride, filled, n, chunk, 1, partial.data() + segment * w.rows);
  });
  columns.sum_segments(partial, w.rows, out);
  return dots;
}

Tensor combination_of_window(const Tensor& window, const Tensor& coefficients, const std::optional<int64_t>& block_size, double beta,
                             const std::optional<Tensor>& x, double alpha, ScalarType dtype) {
  constexpr const char* op = "window_combine";
  const int64_t width = check_window_combine(op, window, coefficients, block_size, x);
  const Rows g(op, "window", window);
  const std::optional<Rows> v = x ? std::optional<Rows>(Rows(op, "x", *x)) : std::nullopt;
  Tensor result = new_tensor(window, {coefficients.size(1), g.dim}, dtype);
  window_combine(g, static_cast<const double*>(coefficients.const_data_ptr()), width, beta, v, alpha, Rows(op, "dtype", result));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("window_dots", TORCH_BOX(&dots_of_window));
  m.impl("window_insert_", TORCH_BOX(&window_insert_));
  m.impl("window_combine", TORCH_BOX(&combination_of_window));
}

}  // namespace mfac_kernels
