// Glue of the window passes on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/window_kernels.h"

namespace mfac_kernels {
namespace {

DeviceRows device_rows(const char* op, const char* name, const Tensor& t) { return Rows(op, name, t).on_device(); }

Tensor window_dots_cuda(const Tensor& window, const Tensor& x, const std::optional<int64_t>& block_size) {
  constexpr const char* op = "window_dots";
  const int64_t width = check_window_dots(op, window, x, block_size);
  const DeviceRows g = device_rows(op, "window", window), v = device_rows(op, "x", x);
  const DeviceOf device(op, window);
  device.check_same("x", x);
  const WindowCut cut = window_cut(g.dim, width, v.rows);
  const Tensor dots = uninitialised(window, {cut.blocks, v.rows, g.rows}, ScalarType::Double);
  const Tensor partial = uninitialised(window, {dots.numel() * cut.segments}, ScalarType::Double);
  device.check_launched(window_dots(g, v, width, doubles_of(partial), doubles_of(dots), device.stream()));
  return dots;
}

Tensor window_insert_cuda(const Tensor& window, const Tensor& state, const Tensor& gradient) {
  constexpr const char* op = "window_insert_";
  const Tensor row = check_window_insert(op, window, state, gradient);
  const DeviceRows w = device_rows(op, "window", window), g = device_rows(op, "g", row);
  const DeviceOf device(op, window);
  device.check_same("state", state);
  device.check_same("g", row);
  const Tensor dots = uninitialised(window, {w.rows}, ScalarType::Double);
  const Tensor partial = uninitialised(window, {(w.rows + 1) * window_cut(w.dim, w.dim, 1).segments}, ScalarType::Double);
  device.check_launched(
      window_insert(w, static_cast<const int64_t*>(state.const_data_ptr()), g, doubles_of(partial), doubles_of(dots), device.stream()));
  return dots;
}

Tensor window_combine_cuda(const Tensor& window, const Tensor& coefficients, const std::optional<int64_t>& block_size, double beta,
                           const std::optional<Tensor>& x, double alpha, ScalarType dtype) {
  constexpr const char* op = "window_combine";
  const int64_t width = check_window_combine(op, window, coefficients, block_size, x);
  const DeviceRows g = device_rows(op, "window", window);
  const DeviceOf device(op, window);
  device.check_same("coefficients", coefficients);
  const Tensor result = uninitialised(window, {coefficients.size(1), g.dim}, dtype);
  DeviceRows input = {};
  if (x) {
    device.check_same("x", *x);
    input = device_rows(op, "x", *x);
  }
  device.check_launched(window_combine(g, static_cast<const double*>(coefficients.const_data_ptr()), width, beta, x ? &input : nullptr,
                                       alpha, device_rows(op, "dtype", result), device.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("window_dots", TORCH_BOX(&window_dots_cuda));
  m.impl("window_insert_", TORCH_BOX(&window_insert_cuda));
  m.impl("window_combine", TORCH_BOX(&window_combine_cuda));
}

}  // namespace mfac_kernels
