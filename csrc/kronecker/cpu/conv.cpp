// Glue of the factors of a convolution.
//
// SUA is the projection of the full factor onto I (x) C: with k offsets, C = (1/k) sum over patches and offsets of [x; 1] [x; 1]^T for
// the pixel x there, zero in the padding. So a pixel counts visits / k times, and the bias row is (sum of visits x / k, patches).
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>

#include "common/cpu/tasks.h"
#include "kronecker/checks.h"
#include "kronecker/cpu/factor.h"

namespace mfac_kernels {
namespace {

// 1 x 1 patches of all pixels
Patches pixels_of(const Patches& patches) {
  Patches pixels = patches;
  for (Axis& axis : pixels.axes) axis = {axis.size, axis.size, 1, 1, 0, 1, axis.step};
  return pixels;
}

// How many patches see each pixel
template <class S>
void count_visits(const Patches& patches, S* visits) {
  const auto& [az, ay, ax] = patches.axes;
  for (int64_t z = 0; z < az.size; ++z)
    for (int64_t y = 0; y < ay.size; ++y)
      for (int64_t x = 0; x < ax.size; ++x) *visits++ = static_cast<S>(az.visits(z) * ay.visits(y) * ax.visits(x));
}

// The sums of the patches of each sample as a matrix of one row per sample
Patches summed_patches(const Patches& patches, void* sums) {
  const int64_t offsets = patches.offsets();
  for_each_task(patches.samples, [&](int64_t n) { patch_sums(patches.dtype)(patches, n, sums); });
  Patches rows;
  rows.data = sums;
  rows.dtype = patches.dtype == DType::f64 ? DType::f64 : DType::f32;
  rows.samples = patches.samples;
  rows.channels = patches.channels * offsets;
  rows.sample_step = rows.channels;
  rows.channel_step = 1;
  return rows;
}

void conv_factor_(const Tensor& factor, const Tensor& x, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                  const std::vector<int64_t>& padding_before, const std::vector<int64_t>& padding_after,
                  const std::vector<int64_t>& dilation, int64_t groups, bool bias, bool sua, bool reduce, double beta, double alpha,
                  const std::optional<Tensor>& refused, bool /*allow_tf32*/) {
  constexpr const char* op = "conv_factor_";
  check_scales(op, beta, alpha);
  const Patches patches = check_conv(op, x, kernel_size, stride, padding_before, padding_after, dilation, groups);
  const int64_t offsets = patches.offsets(), positions = patches.positions(),
                group_columns = patches.channels / groups * (sua ? 1 : offsets);
  const auto rows = static_cast<double>(patches.rows());
  FactorUpdate update;
  update.factor = check_factor(op, factor, patches.dtype, groups, group_columns, bias);
  update.refused = check_refused(op, refused);
  update.patches = patches;
  update.beta = beta;
  update.alpha = sua ? alpha / static_cast<double>(offsets) : alpha;
  update.bias_squares = sua ? rows * static_cast<double>(offsets) : rows;

  const int64_t item = patches.dtype == DType::f64 ? 8 : 4;
  std::unique_ptr<char[]> memory;
  if (reduce && positions > 1) {
    memory = std::make_unique_for_overwrite<char[]>(patches.samples * patches.channels * offsets * item);
    update.patches = summed_patches(patches, memory.get());
    update.bias = static_cast<double>(positions);
    update.bias_squares *= update.bias;
    if (sua) {  // a row per sample and offset
      update.patches.channels = patches.channels;
      update.patches.channel_step = offsets;
      update.patches.axes[2] = {offsets, offsets, 1, 1, 0, 1, 1};
    }
  } else if (sua) {
    update.patches = pixels_of(patches);
    memory = std::make_unique_for_overwrite<char[]>(patches.pixels() * item);
    item == 8 ? count_visits(patches, reinterpret_cast<double*>(memory.get()))
              : count_visits(patches, reinterpret_cast<float*>(memory.get()));
    update.weights = {memory.get(), 0};
  }
  update_factor(update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("conv_factor_", TORCH_BOX(&conv_factor_)); }

}  // namespace mfac_kernels
