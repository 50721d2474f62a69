// How the sums of many narrow groups are cut into tasks: groups that share vectors, times segments of rows, whose sums are added in order.
// The cut depends on shapes alone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/cpu/tasks.h"
#include "kronecker/cpu/factor.h"

namespace mfac_kernels {
namespace {

template <class S>
void update(const FactorUpdate& u) {
  const Factor& f = u.factor;
  const NarrowKernels& kernels = narrow_kernels(u.patches.dtype);
  Patches group = u.patches;
  group.channels /= f.groups;
  const int64_t n = f.features - f.bias, square = n * n, rows = group.rows(), step = group.channels * group.channel_step;
  const int64_t sets = (f.groups + kernels.groups - 1) / kernels.groups;
  constexpr int64_t kEnough = 64, kMinRows = 1024;
  int64_t segments = 1;
  while (2 * segments * sets <= kEnough && 2 * segments * kMinRows <= rows) segments *= 2;

  std::vector<S> sums(segments * f.groups * square);
  std::vector<double> column_sums(f.bias ? segments * f.groups * n : 0);
  for_each_task(sets * segments, [&](int64_t task) {
    const int64_t first = task / segments * kernels.groups, segment = task % segments, at = segment * f.groups + first;
    const int64_t begin = rows * segment / segments, end = rows * (segment + 1) / segments;
    Patches lanes = group;
    lanes.data = static_cast<const char*>(group.data) + first * step * element_size(group.dtype);
    kernels.accumulate(lanes, step, std::min(kernels.groups, f.groups - first), u.weights, begin, end - begin, sums.data() + at * square,
                       f.bias ? column_sums.data() + at * n : nullptr, scratch(kernels.work_bytes(lanes)));
  });
  const auto add_segments = [segments](auto& partial) {  // into the first
    const size_t size = partial.size() / segments;
    for (size_t i = size; i < partial.size(); ++i) partial[i % size] += partial[i];
  };
  add_segments(sums);
  if (f.bias) add_segments(column_sums);
  const bool finite = std::isfinite(u.bias_squares) &&
                      std::all_of(sums.begin(), sums.begin() + f.groups * square, [](S sum) { return std::isfinite(sum); });
  if (u.refused && !finite) {
    *u.refused = 1;
    return;
  }
  const S beta = static_cast<S>(u.beta), alpha = static_cast<S>(u.alpha);
  const auto put = [beta](S& entry, S sum) { entry = beta == 0 ? sum : beta * entry + sum; };
  for (int64_t g = 0; g < f.groups; ++g) {
    S* out = static_cast<S*>(f.data) + g * f.size * f.size;
    for (int64_t row = 0; row < n; ++row)
      for (int64_t column = 0; column < n; ++column) put(out[row * f.size + column], alpha * sums[g * square + row * n + column]);
    if (!f.bias) continue;
    for (int64_t c = 0; c < n; ++c) {
      const S sum = static_cast<S>(u.alpha * u.bias * column_sums[g * n + c]);
      put(out[n * f.size + c], sum);
      put(out[c * f.size + n], sum);
    }
    put(out[n * f.size + n], static_cast<S>(u.alpha * u.bias_squares));
  }
}

}  // namespace

bool is_narrow(const FactorUpdate& u) {
  const int64_t columns = u.factor.features - u.factor.bias;
  return u.factor.groups > 1 && columns > 0 && columns <= kNarrowColumns;
}
void update_narrow(const FactorUpdate& u) { u.factor.dtype == DType::f64 ? update<double>(u) : update<float>(u); }

}  // namespace mfac_kernels
