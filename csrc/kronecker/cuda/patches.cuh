// Elements of a patch matrix by address arithmetic: a row and a column each know a part of the offset, and where they stand on each axis.
#pragma once
#include "common/cuda/launch.h"
#include "kronecker/patches.h"

namespace mfac_kernels {

// A patch: the offset in memory of its first pixel, which may lie in the padding, and that pixel's coordinates.
struct PatchRow {
  int64_t offset;
  int at[Patches::kAxes];
  bool valid;
};

// A channel and an offset of the kernel. Without an element (the bias, columns past the end) the entry is `constant` in every valid row.
template <class T>
struct PatchColumn {
  int64_t offset;
  int at[Patches::kAxes];
  bool has_element;
  T constant;
};

__device__ __forceinline__ PatchRow patch_row(const Patches& p, int64_t row, int64_t end) {
  PatchRow result = {0, {}, row < end};
#pragma unroll
  for (int a = Patches::kAxes - 1; a >= 0; --a) {
    const Axis& axis = p.axes[a];
    int64_t output = 0;
    if (axis.outputs > 1) {
      output = row % axis.outputs;
      row /= axis.outputs;
    }
    const int64_t at = output * axis.stride - axis.padding;
    result.at[a] = static_cast<int>(at);
    result.offset += at * axis.step;
  }
  result.offset += row * p.sample_step;
  return result;
}

// feature = (channel, kernel offset), the last axis of the offset fastest
template <class T>
__device__ __forceinline__ PatchColumn<T> patch_column(const Patches& p, int64_t feature) {
  PatchColumn<T> result = {0, {}, true, T{}};
#pragma unroll
  for (int a = Patches::kAxes - 1; a >= 0; --a) {
    const Axis& axis = p.axes[a];
    if (axis.kernel == 1) continue;
    const int64_t at = feature % axis.kernel * axis.dilation;
    feature /= axis.kernel;
    result.at[a] = static_cast<int>(at);
    result.offset += at * axis.step;
  }
  result.offset += feature * p.channel_step;
  return result;
}

// Does the pixel lie in the image?
template <class T>
__device__ __forceinline__ bool meets_image(const Patches& p, const PatchRow& row, const PatchColumn<T>& column) {
  bool inside = true;
#pragma unroll
  for (int a = 0; a < Patches::kAxes; ++a)
    inside &= static_cast<unsigned>(row.at[a] + column.at[a]) < static_cast<unsigned>(p.axes[a].size);
  return inside;
}

}  // namespace mfac_kernels
