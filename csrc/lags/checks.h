// What the ops of the compressed form expect, on every device.
#pragma once
#include <optional>
#include <vector>

#include "common/sizes.h"
#include "kronecker/checks.h"
#include "lags/form.h"

namespace mfac_kernels {

// Pairs of offsets are counted one by one.
constexpr int64_t kMostOffsets = 4096;

// x (N, C, width) or (N, C, height, width); checks the lists.
inline LagForm check_form(const char* op, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& padding_before,
                          const std::vector<int64_t>& padding_after, const std::vector<int64_t>& dilation) {
  const auto spatial = static_cast<int64_t>(kernel_size.size());
  check(spatial == 1 || spatial == 2, op, ": kernel_size: expected 1 or 2 numbers, got ", spatial);
  check_list(op, "kernel_size", kernel_size, spatial, 1);
  check_list(op, "padding_before", padding_before, spatial, 0);
  check_list(op, "padding_after", padding_after, spatial, 0);
  check_list(op, "dilation", dilation, spatial, 1);
  check_product(op, "kernel_size", kernel_size, kMostOffsets, " offsets in the compressed form");
  const auto axis = [&](size_t i) {
    Axis a;
    a.kernel = kernel_size[i], a.padding = padding_before[i], a.dilation = dilation[i];
    return LagAxis(a, padding_after[i]);
  };
  return spatial == 1 ? LagForm(LagAxis(Axis(), 0), axis(0)) : LagForm(axis(0), axis(1));
}

struct LagState {
  void* data;
  int64_t groups, channels, size, item;  // channels and size of one group; bytes of an element

  // What a bias adds is the row-major matrix after the last slot.
  char* at(int64_t group, int64_t slot, int64_t row, int64_t column) const {
    return static_cast<char*>(data) + (group * size + (slot * channels + row) * channels + column) * item;
  }
};

inline LagState check_lags(const char* op, const Tensor& state, DType x, const LagForm& form, int64_t groups, int64_t channels, bool bias) {
  const int64_t size = form.size(channels, bias);
  check_state(op, "state", state, accumulator_of(x), {groups, size});
  return {state.data_ptr(), groups, channels, size, x == DType::f64 ? 8 : 4};
}

// The number of channels follows from the state's size.
inline LagState check_lags_of_any_size(const char* op, const Tensor& state, const LagForm& form, int64_t groups, bool bias) {
  const DType dtype = dtype_of(op, "state", state);
  check(dtype == DType::f32 || dtype == DType::f64, op, ": state: expected Float or Double, got ",
        torch::headeronly::toString(state.scalar_type()));
  check(groups > 0, op, ": groups: expected at least 1, got ", groups);
  check(state.dim() == 2, op, ": state: expected 2 dimensions, got shape ", shape(state));
  int64_t channels = 0;
  while (form.size(channels, bias) < state.size(1)) ++channels;
  check(form.size(channels, bias) == state.size(1), op, ": state: expected the sums of a kernel of ", form.offsets(),
        " offsets, got shape ", shape(state));
  return check_lags(op, state, dtype, form, groups, channels, bias);
}

}  // namespace mfac_kernels
