// Glue of the compressed form of a convolution's factor on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "lags/checks.h"
#include "lags/cuda/lags_kernels.h"

namespace mfac_kernels {
namespace {

constexpr int64_t kMaxOffsets = 512;  // of a kernel: tables of them are arguments of the launches

void check_offsets(const char* op, const LagForm& form) {
  check(form.offsets() <= kMaxOffsets, op, ": kernel_size: expected at most ", kMaxOffsets, " offsets, got ", form.offsets());
}

void conv_lags_cuda(const Tensor& state, const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                    std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, bool fft, double beta,
                    double alpha, std::optional<Tensor> refused) {
  constexpr const char* op = "conv_lags_";
  check(!fft, op, ": fft: expected False for tensors on a GPU, got True");
  check_scales(op, beta, alpha);
  const DeviceOf device(op, state);
  device.check_same("x", x);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  check_offsets(op, form);
  FactorRows rows;
  rows.patches =
      check_conv(op, x, kernel_size, std::vector<int64_t>(kernel_size.size(), 1), padding_before, padding_after, dilation, groups);
  rows.patches.channels /= groups;
  const LagState sums = check_lags(op, state, rows.patches.dtype, form, groups, rows.patches.channels, bias);
  int32_t* const flag = check_refused(op, refused);
  if (refused) device.check_same("refused", *refused);
  const int64_t features = rows.patches.channels * form.offsets() + bias;
  const Factor like = {nullptr, rows.patches.dtype == DType::f64 ? DType::f64 : DType::f32, groups, groups, features, features, bias};
  const Tensor workspace = uninitialised(state, {lags_workspace(rows, like)}, ScalarType::Byte);
  device.check_launched(accumulate_lags(rows, like, form, {sums.data, sums.groups, sums.channels, sums.size, bias}, beta, alpha, flag,
                                        workspace.data_ptr(), device.stream()));
}

void conv_expand_cuda(const Tensor& factor, const Tensor& state, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                      std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, double beta,
                      double alpha) {
  constexpr const char* op = "conv_expand_";
  check_scales(op, beta, alpha);
  const DeviceOf device(op, factor);
  device.check_same("state", state);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  check_offsets(op, form);
  const LagState sums = check_lags_of_any_size(op, state, form, groups, bias);
  const Factor out = check_factor(op, factor, dtype_of(op, "state", state), groups, sums.channels * form.offsets(), bias);
  device.check_launched(expand_lags(form, {sums.data, sums.groups, sums.channels, sums.size, bias}, out, beta, alpha, device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("conv_lags_", TORCH_BOX(&conv_lags_cuda));
  m.impl("conv_expand_", TORCH_BOX(&conv_expand_cuda));
}

}  // namespace mfac_kernels
