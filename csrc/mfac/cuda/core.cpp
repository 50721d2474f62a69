// Glue of the m x m core on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/core_kernels.h"

namespace mfac_kernels {
namespace {

Tensor core_work(const Tensor& like, int64_t m) { return uninitialised(like, {kCoreWork * m + 1}, ScalarType::Double); }

int64_t* counters(const Tensor& state) { return static_cast<int64_t*>(state.data_ptr()); }

Tensor core_insert_cuda(const Tensor& gram, const Tensor& factor, const Tensor& state, const Tensor& dots, double shift,
                        bool per_gradient) {
  constexpr const char* op = "core_insert_";
  const int64_t m = check_core(op, factor, state, shift);
  check_state(op, "gram", gram, ScalarType::Double, {m, m});
  check_state(op, "dots", dots, ScalarType::Double, {m});
  const DeviceOf device(op, factor);
  device.check_same("gram", gram);
  device.check_same("state", state);
  device.check_same("dots", dots);
  const Tensor coefficients = uninitialised(dots, {m}, ScalarType::Double), work = core_work(dots, m);
  device.check_launched(core_insert(doubles_of(gram), doubles_of(factor), counters(state), doubles_of(dots), m, shift, per_gradient,
                                    doubles_of(work), doubles_of(coefficients), device.stream()));
  return coefficients;
}

Tensor core_solve_cuda(const Tensor& factor, const Tensor& state, const Tensor& b, double shift, bool per_gradient) {
  constexpr const char* op = "core_solve";
  const int64_t m = check_core(op, factor, state, shift);
  check_core_solve(op, b, m);
  const DeviceOf device(op, factor);
  device.check_same("state", state);
  device.check_same("b", b);
  const int64_t vectors = b.size(0);
  const Tensor x = uninitialised(b, {vectors, m}, ScalarType::Double), work = uninitialised(b, {vectors, 2 * m}, ScalarType::Double);
  device.check_launched(core_solve(doubles_of(factor), counters(state), m, shift, per_gradient, doubles_of(b), doubles_of(work),
                                   doubles_of(x), vectors, device.stream()));
  return x;
}

void core_refactor_cuda(const Tensor& gram, const Tensor& factor, const Tensor& state, double shift, bool per_gradient) {
  constexpr const char* op = "core_refactor_";
  const int64_t m = check_core(op, factor, state, shift);
  check_state(op, "gram", gram, ScalarType::Double, {m, m});
  const DeviceOf device(op, factor);
  device.check_same("gram", gram);
  device.check_same("state", state);
  const Tensor work = core_work(factor, m);
  device.check_launched(
      core_refactor(doubles_of(gram), doubles_of(factor), counters(state), m, shift, per_gradient, doubles_of(work), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("core_insert_", TORCH_BOX(&core_insert_cuda));
  m.impl("core_solve", TORCH_BOX(&core_solve_cuda));
  m.impl("core_refactor_", TORCH_BOX(&core_refactor_cuda));
}

}  // namespace mfac_kernels
