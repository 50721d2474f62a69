// mfac_kernels.h: checks, and the same passes as the ops'. No exception leaves a function.
#include <mfac_kernels.h>

#include <algorithm>
#include <new>
#include <optional>

#include "cholesky/cpu/cholesky_kernels.h"
#include "common/cpu/tasks.h"
#include "kronecker/cpu/factor.h"
#include "mfac/cpu/passes.h"

namespace mfac_kernels {
namespace {

std::optional<DType> dtype_of_code(int32_t type) {
  if (type < MFAC_FLOAT32 || type > MFAC_FLOAT16) return std::nullopt;
  return static_cast<DType>(type);  // the same order
}

// rows (n, columns) that are `stride` apart
bool is_matrix(const void* data, int64_t n, int64_t columns, int64_t stride) {
  return n >= 0 && columns >= 0 && (stride >= columns || n <= 1) && (data || n == 0 || columns == 0);
}

template <class Body>
int32_t status_of(bool valid, const Body& body) {
  if (!valid) return MFAC_BAD_ARGUMENT;
  try {
    body();
    return MFAC_OK;
  } catch (const std::bad_alloc&) {
    return MFAC_NO_MEMORY;
  } catch (...) {  // of torch's threads
    return MFAC_FAILED;
  }
}

// Blocks of one size, in the groups that the op makes of them.
void invert(DType dtype, int64_t count, int64_t n, const char* blocks, double damping, char* inverses, int32_t* info) {
  const CholeskyKernels& kernels = cholesky_kernels(dtype);
  const int64_t lanes = kernels.group_size(n, count), bytes = n * n * element_size(dtype);
  const auto job = [&](int64_t i) {
    return Job{{const_cast<char*>(blocks) + i * bytes, dtype, n, 1}, {inverses + i * bytes, dtype, n, 1}, damping, info + i};
  };
  for_each_task(divide_up(count, lanes), [&](int64_t task) {
    const int64_t first = task * lanes;
    info[first] = 0;
    if (lanes == 1) return kernels.inverse.run(job(first), n, scratch(kernels.inverse.work(job(first), n)), nullptr);
    Job jobs[kMaxLanes];
    for (int64_t i = 0; i < kMaxLanes; ++i) {
      const int64_t at = first + i < std::min(count, first + lanes) ? first + i : first;
      jobs[i] = job(at);
      info[at] = 0;
    }
    kernels.inverse.run_lanes(jobs, n, scratch(kernels.lanes_work(n)));
  });
}

}  // namespace
}  // namespace mfac_kernels

using namespace mfac_kernels;

#define MFAC_EXPORT extern "C" __attribute__((visibility("default")))

MFAC_EXPORT int32_t mfac_c_version(void) { return MFAC_KERNELS_C_VERSION; }

MFAC_EXPORT int32_t mfac_cholesky_inverse(int32_t type, int64_t count, int64_t n, const void* blocks, double damping, void* inverses,
                                          int32_t* info) {
  const auto dtype = dtype_of_code(type);
  const bool wide = type == MFAC_FLOAT32 || type == MFAC_FLOAT64;
  const bool valid = wide && count >= 0 && n >= 0 && (count == 0 || (info && (n == 0 || (blocks && inverses))));
  return status_of(valid, [&] {
    if (n == 0) return std::fill_n(info, count, 0), void();
    invert(*dtype, count, n, static_cast<const char*>(blocks), damping, static_cast<char*>(inverses), info);
  });
}

MFAC_EXPORT int32_t mfac_linear_factor(int32_t type, int64_t rows, int64_t columns, const void* x, int64_t stride, const void* weights,
                                       double beta, double alpha, void* factor) {
  const auto dtype = dtype_of_code(type);
  return status_of(dtype && is_matrix(x, rows, columns, stride) && (factor || columns == 0), [&] {
    if (columns == 0) return;
    FactorUpdate update;
    update.patches.data = x;
    update.patches.dtype = *dtype;
    update.patches.channels = columns;
    update.patches.channel_step = 1;
    Axis& axis = update.patches.axes[Patches::kAxes - 1];
    axis.size = axis.outputs = rows;
    axis.step = stride;
    update.weights = {weights, rows};
    update.factor = {factor, *dtype == DType::f64 ? DType::f64 : DType::f32, 1, 1, columns, columns, false};
    update.beta = beta;
    update.alpha = alpha;
    update_factors({update});
  });
}

MFAC_EXPORT int32_t mfac_gram(int32_t type, int64_t m, int64_t d, const void* g, int64_t stride, int32_t in_double, double* out) {
  const auto dtype = dtype_of_code(type);
  return status_of(dtype && is_matrix(g, m, d, stride) && (out || m == 0), [&] {
    if (d == 0) return std::fill_n(out, m * m, 0.0), void();
    gram_blocks(Rows(g, *dtype, m, d, stride), d, in_double != 0, out);
  });
}

MFAC_EXPORT int32_t mfac_window_dots(int32_t type, int64_t m, int64_t d, const void* window, int64_t stride, int64_t k, const void* x,
                                     int64_t x_stride, double* dots) {
  const auto dtype = dtype_of_code(type);
  return status_of(dtype && is_matrix(window, m, d, stride) && is_matrix(x, k, d, x_stride) && (dots || m == 0 || k == 0), [&] {
    std::fill_n(dots, k * m, 0.0);
    if (d > 0) window_dots(Rows(window, *dtype, m, d, stride), Rows(x, *dtype, k, d, x_stride), d, dots);
  });
}

MFAC_EXPORT int32_t mfac_window_combine(int32_t type, int64_t m, int64_t d, const void* window, int64_t stride, int64_t k,
                                        const double* coefficients, double beta, const void* x, int64_t x_stride, double alpha, void* out) {
  const auto dtype = dtype_of_code(type);
  const bool valid = dtype && is_matrix(window, m, d, stride) && is_matrix(out, k, d, d) && (!x || is_matrix(x, k, d, x_stride)) &&
                     (coefficients || m == 0 || k == 0);
  return status_of(valid, [&] {
    if (d == 0) return;
    std::optional<Rows> added;
    if (x) added.emplace(x, *dtype, k, d, x_stride);
    window_combine(Rows(window, *dtype, m, d, stride), coefficients, d, beta, added, alpha, Rows(out, *dtype, k, d, d));
  });
}
