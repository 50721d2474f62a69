// The input factor of an embedding: rows are one-hot, so the factor is diagonal and holds how often each index occurs.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "kronecker/checks.h"

namespace mfac_kernels {
namespace {

template <class Index>
std::vector<int64_t> count(const char* op, const void* indices, int64_t n, int64_t bins, std::optional<int64_t> skipped) {
  std::vector<int64_t> counts(bins);
  const auto* at = static_cast<const Index*>(indices);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t index = at[i];
    if (index == skipped) continue;
    check(index >= 0 && index < bins, op, ": indices: expected 0 to ", bins - 1, ", got ", index);
    ++counts[index];
  }
  return counts;
}

template <class S>
void accumulate(const std::vector<int64_t>& from, double beta, double alpha, void* counts) {
  S* to = static_cast<S*>(counts);
  for (size_t i = 0; i < from.size(); ++i)
    to[i] = static_cast<S>((beta == 0 ? 0 : beta * static_cast<double>(to[i])) + alpha * static_cast<double>(from[i]));
}

void embedding_factor_(const Tensor& counts, const Tensor& indices, std::optional<int64_t> padding_idx, double beta, double alpha) {
  constexpr const char* op = "embedding_factor_";
  check_scales(op, beta, alpha);
  const Tensor list = check_embedding(op, counts, indices);
  const auto& count_of = list.scalar_type() == ScalarType::Int ? count<int32_t> : count<int64_t>;
  const std::vector<int64_t> found = count_of(op, list.const_data_ptr(), list.numel(), counts.size(0), padding_idx);
  const auto& accumulate_in = counts.scalar_type() == ScalarType::Float ? accumulate<float> : accumulate<double>;
  accumulate_in(found, beta, alpha, counts.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("embedding_factor_", TORCH_BOX(&embedding_factor_)); }

}  // namespace mfac_kernels
