// Glue of the factors of linear layers on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/cuda/glue.h"
#include "kronecker/checks.h"
#include "kronecker/cuda/factor_kernels.h"

namespace mfac_kernels {
namespace {

void check_scales_on(const DeviceOf& device, const std::optional<Tensor>& betas, const std::optional<Tensor>& alphas,
                     const std::optional<Tensor>& refused) {
  if (betas) device.check_same("beta", *betas);
  if (alphas) device.check_same("alpha", *alphas);
  if (refused) device.check_same("refused", *refused);
}

void linear_factor_cuda(const Tensor& factor, Tensor x, const std::optional<Tensor>& weights, bool bias, double beta, double alpha,
                        const std::optional<Tensor>& refused, bool allow_tf32, const std::optional<Tensor>& offsets,
                        const std::optional<Tensor>& betas, const std::optional<Tensor>& alphas) {
  constexpr const char* op = "linear_factor_";
  const DeviceOf device(op, factor);
  device.check_same("x", x);
  FactorJob job = {};
  job.rows.allow_tf32 = allow_tf32;
  job.rows.patches = check_matrix(op, "x", x);
  const DType dtype = job.rows.patches.dtype;
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, dtype);
  if (row_weights) {
    device.check_same("weights", *row_weights);
    job.rows.weights = row_weights->const_data_ptr();
  }
  const int64_t columns = job.rows.patches.channels;
  int64_t count = 1;
  Tensor ends;
  if (offsets) {
    device.check_same("offsets", *offsets);
    ends = check_offsets(op, *offsets, x);
    job.rows.offsets = ends.const_data_ptr();
    job.rows.narrow_offsets = ends.scalar_type() == ScalarType::Int;
    count = ends.size(0) - 1;
  }
  job.factor = offsets ? check_factors(op, factor, dtype, count, columns, bias) : check_factor(op, factor, dtype, 1, columns, bias);
  job.beta = check_scale(op, "beta", beta, betas, count);
  job.alpha = check_scale(op, "alpha", alpha, alphas, count);
  job.refused = check_refused(op, refused, count);
  check_scales_on(device, betas, alphas, refused);
  const Tensor workspace = uninitialised(factor, {factor_workspace(&job, 1)}, ScalarType::Byte);
  device.check_launched(factor_accumulate(&job, 1, workspace.data_ptr(), device.stream()));
}

void grouped_linear_factor_cuda(std::vector<Tensor> factors, std::vector<Tensor> x, std::vector<std::optional<Tensor>> weights,
                                std::vector<bool> bias, double beta, double alpha, std::optional<Tensor> refused, bool allow_tf32,
                                std::optional<Tensor> betas, std::optional<Tensor> alphas) {
  constexpr const char* op = "grouped_linear_factor_";
  const std::vector<LinearPair> pairs = check_pairs(op, factors, x, weights, bias);
  const auto count = static_cast<int64_t>(pairs.size());
  const Scale before = check_scale(op, "beta", beta, betas, count), added = check_scale(op, "alpha", alpha, alphas, count);
  int32_t* const flags = check_refused(op, refused, count);
  if (pairs.empty()) return;
  const DeviceOf device(op, factors[0]);
  std::vector<FactorJob> jobs(pairs.size());
  for (int64_t i = 0; i < count; ++i) {
    device.check_same("factors", factors[i]);
    device.check_same("x", x[i]);
    if (weights[i]) device.check_same("weights", *weights[i]);
    jobs[i].rows.patches = pairs[i].rows.patches;
    jobs[i].rows.weights = pairs[i].rows.weights;
    jobs[i].rows.allow_tf32 = allow_tf32;
    jobs[i].factor = pairs[i].factor;
    jobs[i].beta = before.from(i);
    jobs[i].alpha = added.from(i);
    jobs[i].refused = flags ? flags + i : nullptr;
  }
  check_scales_on(device, betas, alphas, refused);
  const Tensor workspace = uninitialised(factors[0], {factor_workspace(jobs.data(), count)}, ScalarType::Byte);
  device.check_launched(factor_accumulate(jobs.data(), count, workspace.data_ptr(), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) {
  m.impl("linear_factor_", TORCH_BOX(&linear_factor_cuda));
  m.impl("grouped_linear_factor_", TORCH_BOX(&grouped_linear_factor_cuda));
}

}  // namespace mfac_kernels
