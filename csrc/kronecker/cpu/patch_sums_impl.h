// The sum of all patches of a sample: sums[c, o] = sum over output positions q of x[c, q stride + o dilation - padding].
//
// Floor: each pixel read once. A line of x is summed for each offset along the last axis, and the sums of lines then go to the offsets
// along the other axes that meet them. In float64: the sums are few.

template <class T>
double line_sum(const Patches& p, const T* line, int64_t kx) {
  const Axis& axis = p.axes[2];
  const int64_t start = kx * axis.dilation - axis.padding;
  int64_t begin = start < 0 ? (axis.stride - 1 - start) / axis.stride : 0,
          end = axis.size > start ? (axis.size - start + axis.stride - 1) / axis.stride : 0;
  if (end > axis.outputs) end = axis.outputs;
  double sum = 0;
  const int64_t step = axis.step * axis.stride, first = start * axis.step;
  int64_t q = begin;
  if (step == 1) {
    f64v sums[2] = {};
    for (; q + 2 * kLanes <= end; q += 2 * kLanes)
      for (int v = 0; v < 2; ++v) sums[v] += widen(line + first + q + v * kLanes);
    sum = horizontal_sum(sums[0] + sums[1]);
  }
  for (; q < end; ++q) sum += static_cast<double>(widen_one(line[first + q * step]));
  return sum;
}

template <class T>
void sum_patches(const Patches& p, int64_t sample, void* out) {
  using S = Compute<T>;
  const auto& [az, ay, ax] = p.axes;
  S* sums = static_cast<S*>(out) + sample * p.channels * p.offsets();
  for (int64_t c = 0; c < p.channels; ++c, sums += p.offsets()) {
    const T* x = static_cast<const T*>(p.data) + sample * p.sample_step + c * p.channel_step;
    for (int64_t kx = 0; kx < ax.kernel; ++kx)
      for (int64_t kz = 0; kz < az.kernel; ++kz)
        for (int64_t ky = 0; ky < ay.kernel; ++ky) {
          double sum = 0;
          for (int64_t qz = 0; qz < az.outputs; ++qz)
            for (int64_t qy = 0; qy < ay.outputs; ++qy) {
              const int64_t z = qz * az.stride + kz * az.dilation - az.padding, y = qy * ay.stride + ky * ay.dilation - ay.padding;
              if (z >= 0 && z < az.size && y >= 0 && y < ay.size) sum += line_sum(p, x + z * az.step + y * ay.step, kx);
            }
          sums[(kz * ay.kernel + ky) * ax.kernel + kx] = static_cast<S>(sum);
        }
  }
}

constexpr PatchSums kPatchSums[kDTypes] = {sum_patches<float>, sum_patches<double>, sum_patches<bf16>, sum_patches<fp16>};
