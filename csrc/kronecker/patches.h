// The patch matrix of x (samples, channels, spatial...), which no kernel forms, and the factor that its rows are summed into. Without
// torch.
#pragma once
#include <cstdint>

#include "common/sizes.h"
#include "common/types.h"

namespace mfac_kernels {

// One spatial dimension of a convolution: output q and kernel offset o meet input q stride + o dilation - padding, zero outside [0, size).
struct Axis {
  int64_t size = 1, outputs = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;  // padding: in front
  int64_t step = 0;                                                                  // from pixel to pixel in memory, in elements

  // How many outputs meet pixel i.
  int64_t visits(int64_t i) const {
    int64_t count = 0;
    for (int64_t o = 0; o < kernel; ++o) {
      const int64_t at = i + padding - o * dilation;
      count += at >= 0 && at % stride == 0 && at / stride < outputs;
    }
    return count;
  }
};

// Row (n, q): a patch, one per sample n and output position q. Column (c, o): channel, then kernel offset, the last axis fastest. A matrix
// of rows is the case of 1 x 1 kernels: its columns are the channels.
struct Patches {
  static constexpr int kAxes = 3;  // a convolution of fewer dimensions leaves the first ones at size one

  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t samples = 1, channels = 1;
  int64_t sample_step = 0, channel_step = 0;  // in elements
  Axis axes[kAxes];

  int64_t offsets() const { return axes[0].kernel * axes[1].kernel * axes[2].kernel; }
  int64_t pixels() const { return axes[0].size * axes[1].size * axes[2].size; }
  int64_t positions() const { return axes[0].outputs * axes[1].outputs * axes[2].outputs; }
  int64_t rows() const { return samples * positions(); }
};

// The same rows with their pixels along one axis, where these lie so in memory and patches are 1 x 1: few long runs in place of many short.
inline Patches along_one_axis(Patches patches) {
  Axis& inner = patches.axes[Patches::kAxes - 1];
  const auto whole = [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.padding == 0 && axis.outputs == axis.size;
  };
  for (int a = Patches::kAxes - 2; a >= 0; --a) {
    Axis& outer = patches.axes[a];
    if (!whole(inner) || !whole(outer)) break;
    if (outer.size != 1) {
      if (inner.size == 1) inner.step = outer.step;
      if (outer.step != inner.size * inner.step) break;
    }
    inner.size = inner.outputs = inner.size * outer.size;
    outer = Axis{};
  }
  return patches;
}

// Diagonal blocks of the symmetric matrices of `groups` groups, all of `features` rows: groups = blocks (each one whole), or one group cut
// into blocks of `size` features, the last one padded with zeros.
struct Factor {
  void* data;   // (blocks, size, size), contiguous
  DType dtype;  // float32, or float64 for float64 inputs
  int64_t groups, blocks, size;
  int64_t features;  // of one group, with the bias, which comes last
  bool bias;
};

// beta or alpha of several factors: a number, or values in memory, on the device for its kernels: one for each factor, or (step 0) one for
// all.
struct Scale {
  double number = 1;
  const double* values = nullptr;
  int64_t step = 0;

  MFAC_HOST_DEVICE double of(int64_t factor) const { return values ? values[factor * step] : number; }
  Scale from(int64_t factor) const { return {number, values ? values + factor * step : nullptr, step}; }
};

}  // namespace mfac_kernels
