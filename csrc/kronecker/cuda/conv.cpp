// Glue of the factors of a convolution on the device: checks, allocation, launch.
//
// SUA is the projection of the full factor onto I (x) C: with k offsets, C = (1/k) sum over patches and offsets of [x; 1] [x; 1]^T for
// the pixel x there, zero in the padding. So a pixel counts visits / k times; the square of the bias is the number of patches.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "kronecker/checks.h"
#include "kronecker/cuda/factor_kernels.h"

namespace mfac_kernels {
namespace {

using torch::headeronly::MemoryFormat;

constexpr Axis line_of(int64_t count, int64_t step) { return {count, count, 1, 1, 0, 1, step}; }

// One row per pixel
FactorRows pixels_of(const Patches& patches) {
  FactorRows rows;
  rows.patches = patches;
  rows.by_visits = true;
  for (int a = 0; a < Patches::kAxes; ++a) {
    rows.visited[a] = patches.axes[a];
    rows.patches.axes[a] = line_of(patches.axes[a].size, patches.axes[a].step);
  }
  return rows;
}

// The sums of the patches of each sample as rows: one per sample or, for SUA, one per sample and offset.
FactorRows rows_of_sums(const Patches& patches, bool sua, void* sums) {
  FactorRows rows;
  rows.patches.data = sums;
  rows.patches.dtype = patches.dtype == DType::f64 ? DType::f64 : DType::f32;
  rows.patches.samples = patches.samples;
  rows.patches.sample_step = patches.channels * patches.offsets();
  rows.patches.channels = sua ? patches.channels : rows.patches.sample_step;
  rows.patches.channel_step = sua ? patches.offsets() : 1;
  if (sua) rows.patches.axes[2] = line_of(patches.offsets(), 1);
  rows.bias = static_cast<double>(patches.positions());
  return rows;
}

// Tensor cores want channels that are neighbours in memory: a copy of x that has them so is at most a quarter of the patches of a kernel of
// at least four offsets.
bool worth_transposing(const Tensor& x, const Patches& patches, int64_t groups, bool allow_tf32) {
  const int64_t vector = 16 / x.element_size();
  return x.dim() >= 4 && patches.channel_step != 1 && patches.offsets() >= 4 && patches.channels / groups % vector == 0 &&
         (patches.dtype == DType::f32 ? allow_tf32 : patches.dtype != DType::f64);
}

void conv_factor_cuda(const Tensor& factor, const Tensor& x, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                      const std::vector<int64_t>& padding_before, const std::vector<int64_t>& padding_after,
                      const std::vector<int64_t>& dilation, int64_t groups, bool bias, bool sua, bool reduce, double beta, double alpha,
                      const std::optional<Tensor>& refused, bool allow_tf32) {
  constexpr const char* op = "conv_factor_";
  check_scales(op, beta, alpha);
  const DeviceOf device(op, factor);
  device.check_same("x", x);
  const Patches patches = check_conv(op, x, kernel_size, stride, padding_before, padding_after, dilation, groups);
  const int64_t offsets = patches.offsets(), columns = patches.channels / groups * (sua ? 1 : offsets);
  const Factor out = check_factor(op, factor, patches.dtype, groups, columns, bias);
  int32_t* const flag = check_refused(op, refused);
  if (refused) device.check_same("refused", *refused);

  Tensor sums, channels_last;
  FactorRows rows;
  if (reduce) {
    sums = uninitialised(factor, {patches.samples * patches.channels * offsets}, accumulator_of(patches.dtype));
    device.check_launched(sum_patches(patches, sums.data_ptr(), device.stream()));
    rows = rows_of_sums(patches, sua, sums.data_ptr());
    if (sua) alpha /= static_cast<double>(offsets);
  } else if (sua) {
    rows = pixels_of(patches);
    rows.bias_square = static_cast<double>(patches.rows());
  } else {
    rows.patches = patches;
    rows.allow_tf32 = allow_tf32;
    if (worth_transposing(x, patches, groups, allow_tf32)) {
      channels_last = torch::stable::contiguous(x, x.dim() == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d);
      rows.patches = check_conv(op, channels_last, kernel_size, stride, padding_before, padding_after, dilation, groups);
    }
  }
  rows.patches.channels /= groups;
  const FactorJob job = {rows, out, {beta}, {alpha}, flag};
  const Tensor workspace = uninitialised(factor, {factor_workspace(&job, 1)}, ScalarType::Byte);
  device.check_launched(factor_accumulate(&job, 1, workspace.data_ptr(), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("conv_factor_", TORCH_BOX(&conv_factor_cuda)); }

}  // namespace mfac_kernels
