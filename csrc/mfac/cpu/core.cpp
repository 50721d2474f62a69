// Glue of the m x m core: reads the ring's position from `state`, keeps the Gram matrix, calls the factor's kernels.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "mfac/checks.h"
#include "mfac/cpu/window_kernels.h"
#include "mfac/ring.h"

namespace mfac_kernels {
namespace {

// Appends every gradient in the order of age: O(m^3), the same stable step as an insert.
void refactor(const double* gram, double* factor, const Ring& ring) {
  const int64_t m = ring.slots.m;
  std::vector<double> work(2 * m);
  std::fill_n(factor, m * m, 0.0);
  for (int64_t age = 0; age < ring.filled; ++age) {
    const int64_t slot = ring.slots(age);
    core_kernels().replace(factor, m, slot, age, false, gram + slot * m, ring.shift, work.data());
  }
}

Tensor core_insert_(const Tensor& gram, const Tensor& factor, const Tensor& state, const Tensor& dots, double shift, bool per_gradient) {
  constexpr const char* op = "core_insert_";
  const int64_t m = check_core(op, factor, state, shift);
  check_state(op, "gram", gram, ScalarType::Double, {m, m});
  check_state(op, "dots", dots, ScalarType::Double, {m});
  const int64_t seen = seen_of(op, state);
  Tensor coefficients = torch::stable::new_zeros(dots, {m});
  const auto* s = static_cast<const double*>(dots.const_data_ptr());
  auto* counters = static_cast<int64_t*>(state.mutable_data_ptr());
  if (!std::all_of(s, s + m, [](double value) { return std::isfinite(value); })) {
    ++counters[1];
    return coefficients;
  }
  auto* S = static_cast<double*>(gram.mutable_data_ptr());
  auto* L = static_cast<double*>(factor.mutable_data_ptr());
  const bool full = seen >= m;
  const int64_t slot = seen % m;
  ++counters[0];
  std::copy_n(s, m, S + slot * m);
  const Ring ring = ring_of(m, seen + 1, shift, per_gradient);
  if (per_gradient && !full && ring.filled > 1) {
    refactor(S, L, ring);  // the shift grows with every gradient until the window is full
  } else {
    std::vector<double> work(2 * m);
    core_kernels().replace(L, m, slot, ring.filled - 1, full, s, ring.shift, work.data());
  }
  core_kernels().solve_newest(L, m, ring.slots.oldest, ring.filled, static_cast<double*>(coefficients.mutable_data_ptr()));
  return coefficients;
}

Tensor core_solve(const Tensor& factor, const Tensor& state, const Tensor& b, double shift, bool per_gradient) {
  constexpr const char* op = "core_solve";
  const int64_t m = check_core(op, factor, state, shift);
  check_core_solve(op, b, m);
  const Ring ring = ring_of(m, seen_of(op, state), shift, per_gradient);
  Tensor x = torch::stable::clone(b);
  for (int64_t i = 0; i < b.size(0); ++i)
    core_kernels().solve(static_cast<const double*>(factor.const_data_ptr()), m, ring.slots.oldest, ring.filled, ring.shift,
                         static_cast<double*>(x.mutable_data_ptr()) + i * m);
  return x;
}

void core_refactor_(const Tensor& gram, const Tensor& factor, const Tensor& state, double shift, bool per_gradient) {
  constexpr const char* op = "core_refactor_";
  const int64_t m = check_core(op, factor, state, shift);
  check_state(op, "gram", gram, ScalarType::Double, {m, m});
  refactor(static_cast<const double*>(gram.const_data_ptr()), static_cast<double*>(factor.mutable_data_ptr()),
           ring_of(m, seen_of(op, state), shift, per_gradient));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("core_insert_", TORCH_BOX(&core_insert_));
  m.impl("core_solve", TORCH_BOX(&core_solve));
  m.impl("core_refactor_", TORCH_BOX(&core_refactor_));
}

}  // namespace mfac_kernels
