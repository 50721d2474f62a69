// Glue of the compressed form of a convolution's factor: checks, and the split of the work over threads. The split depends on the shapes
// alone, so results are the same bit for bit whatever the number of threads.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <vector>

#include "lags/cpu/direct.h"
#include "lags/cpu/expand.h"
#include "lags/cpu/spectra.h"

namespace mfac_kernels {
namespace {

template <class S>
void accumulate(double value, double beta, double alpha, void* out) {
  S& to = *static_cast<S*>(out);
  to = static_cast<S>((beta == 0 ? 0 : beta * static_cast<double>(to)) + alpha * value);
}

void conv_lags_(const Tensor& state, const Tensor& x, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, bool fft, double beta,
                double alpha, std::optional<Tensor> refused) {
  constexpr const char* op = "conv_lags_";
  check_scales(op, beta, alpha);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  const Patches patches =
      check_conv(op, x, kernel_size, std::vector<int64_t>(kernel_size.size(), 1), padding_before, padding_after, dilation, groups);
  const LagState sums = check_lags(op, state, patches.dtype, form, groups, patches.channels / groups, bias);
  int32_t* flag = check_refused(op, refused);

  fft = fft && patches.samples * patches.channels * patches.pixels() > 0;
  const Panels panels(patches, groups, fft ? Spectra::kSamples / 2 : std::numeric_limits<int64_t>::max());
  if (flag && !panels.look()) {
    *flag = 1;
    return;
  }
  const DirectSums regions(panels, form, sums, Pieces::in_region);
  std::optional<DirectSums> borders;
  std::optional<Spectra> planes;
  if (fft) {
    borders.emplace(panels, form, sums, Pieces::out_of_region);
    planes.emplace(panels, form, sums);
  }
  for (int64_t chunk = 0; chunk < panels.chunks(); ++chunk) {
    const double keep = chunk == 0 ? beta : 1;
    if (!(flag && panels.chunks() == 1)) panels.pack(chunk, false);
    if (bias) regions.add_bias(chunk, keep, alpha);
    if (!fft || !planes->accurate_for(chunk)) {
      regions.add(chunk, keep, alpha);
      continue;
    }
    borders->add(chunk, keep, -alpha);
    planes->transform(chunk);
    if (planes->full()) planes->add(alpha);
  }
  if (fft) planes->add(alpha);
  const auto& add_count = patches.dtype == DType::f64 ? accumulate<double> : accumulate<float>;
  for (int64_t group = 0; group < groups && bias; ++group)
    add_count(static_cast<double>(patches.rows()), beta, alpha, sums.at(group, form.slots(), form.offsets(), 0));
}

void conv_expand_(const Tensor& factor, const Tensor& state, std::vector<int64_t> kernel_size, std::vector<int64_t> padding_before,
                  std::vector<int64_t> padding_after, std::vector<int64_t> dilation, int64_t groups, bool bias, double beta, double alpha) {
  constexpr const char* op = "conv_expand_";
  check_scales(op, beta, alpha);
  const LagForm form = check_form(op, kernel_size, padding_before, padding_after, dilation);
  const LagState sums = check_lags_of_any_size(op, state, form, groups, bias);
  const Factor out = check_factor(op, factor, dtype_of(op, "state", state), groups, sums.channels * form.offsets(), bias);
  const Expansion expansion(form, sums, out, beta, alpha);
  const int64_t offsets = form.offsets(), row_blocks = divide_up(sums.channels, Expansion::kChannels);
  for_each_task(groups * row_blocks * offsets, [&](int64_t task) {
    expansion.write_rows(task / offsets / row_blocks, task % offsets, task / offsets % row_blocks * Expansion::kChannels);
  });
  for (int64_t group = 0; group < groups; ++group) expansion.write_last_rows(group);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("conv_lags_", TORCH_BOX(&conv_lags_));
  m.impl("conv_expand_", TORCH_BOX(&conv_expand_));
}

}  // namespace mfac_kernels
