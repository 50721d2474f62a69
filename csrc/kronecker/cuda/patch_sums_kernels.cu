// The sum of the patches of each sample, the rows of the "reduce" approximation.
//
//   S[n, (c, o)] = sum over the output positions q of x[n, c, q stride + o dilation - padding]      (N, C, K)
//
// Floor: x read once. Expected: bound by L1 and L2, which serve x to each of the K kernel offsets: a small part of the time that the layer
// itself takes. A warp sums an entry if pixels are neighbours in memory; if channels are, each lane has a channel of its own. The range of
// positions that meet the image is found beforehand, so the loops hold loads and additions alone. Sums are float64.
#include <algorithm>

#include "kronecker/cuda/factor_kernels.h"
#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;

// Outputs [first, first + count) meet the image.
struct Range {
  int64_t first, count;
};
__device__ __forceinline__ Range outputs_inside(const Axis& axis, int64_t offset) {
  const int64_t before = axis.padding - offset * axis.dilation;  // pixel of output q: q stride - before
  const int64_t first = before > 0 ? divide_up(before, axis.stride) : 0;
  const int64_t end = axis.size + before > 0 ? min(axis.outputs, divide_up(axis.size + before, axis.stride)) : 0;
  return {first, max(int64_t(0), end - first)};
}

// sums (samples, channels, offsets)
template <class T, bool kByWarp>
__global__ void __launch_bounds__(kThreads) patch_sums_kernel(const Patches p, int64_t entries, Accumulator<T>* sums) {
  constexpr int kLanes = kByWarp ? kWarpSize : 1;
  const int64_t index = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (index >= entries) return;
  const int64_t kernels[] = {p.axes[0].kernel, p.axes[1].kernel, p.axes[2].kernel};
  const int64_t offsets = kernels[0] * kernels[1] * kernels[2];
  // Neighbouring threads have neighbouring channels.
  const int64_t channel = kByWarp ? index / offsets % p.channels : index % p.channels;
  const int64_t offset = kByWarp ? index % offsets : index / p.channels % offsets;
  const int64_t sample = index / offsets / p.channels;

  const T* from = static_cast<const T*>(p.data) + sample * p.sample_step + channel * p.channel_step;
  uint32_t counts[Patches::kAxes];
  int64_t steps[Patches::kAxes], rest = offset;
#pragma unroll
  for (int a = Patches::kAxes - 1; a >= 0; --a) {
    const Axis& axis = p.axes[a];
    const int64_t o = rest % axis.kernel;
    rest /= axis.kernel;
    const Range range = outputs_inside(axis, o);
    from += (range.first * axis.stride + o * axis.dilation - axis.padding) * axis.step;
    counts[a] = static_cast<uint32_t>(range.count);
    steps[a] = axis.stride * axis.step;
  }
  double sum = 0;
  for (uint32_t q = kByWarp ? lane_of_thread() : 0; q < counts[0] * counts[1] * counts[2]; q += kLanes) {
    const uint32_t line = q / counts[2];
    sum += widen(from[line / counts[1] * steps[0] + line % counts[1] * steps[1] + q % counts[2] * steps[2]]);
  }
  if constexpr (kByWarp) sum = warp_sum(sum);
  if (!kByWarp || lane_of_thread() == 0) narrow(sum, sums[(sample * p.channels + channel) * offsets + offset]);
}

template <class T>
cudaError_t launch_sums(const Patches& p, void* sums, cudaStream_t stream) {
  const int64_t entries = p.samples * p.channels * p.offsets();
  if (entries == 0) return cudaSuccess;
  const auto grid = [&](int64_t threads) { return dim3(static_cast<unsigned>(divide_up(threads, kThreads))); };
  auto* to = static_cast<Accumulator<T>*>(sums);
  return p.channel_step == 1 ? launch(patch_sums_kernel<T, false>, grid(entries), dim3(kThreads), 0, stream, p, entries, to)
                             : launch(patch_sums_kernel<T, true>, grid(entries * kWarpSize), dim3(kThreads), 0, stream, p, entries, to);
}

}  // namespace

cudaError_t sum_patches(const Patches& patches, void* out, cudaStream_t stream) {
  switch (patches.dtype) {
    case DType::f32: return launch_sums<float>(patches, out, stream);
    case DType::f64: return launch_sums<double>(patches, out, stream);
    case DType::bf16: return launch_sums<bf16>(patches, out, stream);
    default: return launch_sums<fp16>(patches, out, stream);
  }
}

}  // namespace mfac_kernels
