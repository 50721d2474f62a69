// The input factor of an embedding: rows are one-hot, so the factor is diagonal and holds how often each index occurs.
//
//   counts <- beta counts + alpha #{r : indices[r] = i}      (bins)
//
// Floor: the indices read once, the counts read and written once: 1 us for 16384 indices into 50257 counts on an H200, below the time of
// a launch; there are three (the counts are cleared first). Expected: the launches, unless all indices are equal: then the additions to
// one address, about one a clock.
//
// Integers are counted, so that the order of the atomic additions does not matter.
#include <algorithm>

#include "common/cuda/convert.cuh"
#include "kronecker/cuda/embedding_kernels.h"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1056;  // eight for each SM of an H200

template <class Index>
__global__ void __launch_bounds__(kThreads)
    count_kernel(const Index* indices, int64_t n, int64_t bins, int64_t skipped, unsigned long long* found) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads) {
    const int64_t index = indices[i];
    if (index == skipped) continue;
    const bool in_range = index >= 0 && index < bins;
    MFAC_DEVICE_CHECK(in_range, "embedding_factor_: indices: out of range");  // as torch's own embedding has it
    if (in_range) atomicAdd(found + index, 1ull);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const unsigned long long* found, int64_t bins, double beta, double alpha, S* counts) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < bins; i += int64_t(gridDim.x) * kThreads) {
    const double before = beta == 0 ? 0 : beta * static_cast<double>(counts[i]);
    counts[i] = static_cast<S>(before + alpha * static_cast<double>(found[i]));
  }
}

dim3 blocks_of(int64_t n) { return dim3(static_cast<unsigned>(std::min((n + kThreads - 1) / kThreads, kMaxBlocks))); }

}  // namespace

cudaError_t count_indices(const void* indices, bool narrow, int64_t n, int64_t bins, int64_t skipped, unsigned long long* found,
                          cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  const auto run = [&]<class Index>(const Index* list) {
    return launch(count_kernel<Index>, blocks_of(n), dim3(kThreads), 0, stream, list, n, bins, skipped, found);
  };
  return narrow ? run(static_cast<const int32_t*>(indices)) : run(static_cast<const int64_t*>(indices));
}

cudaError_t accumulate_counts(const unsigned long long* found, int64_t bins, double beta, double alpha, DType dtype, void* counts,
                              cudaStream_t stream) {
  if (bins == 0) return cudaSuccess;
  const auto run = [&]<class S>(S* to) {
    return launch(accumulate_kernel<S>, blocks_of(bins), dim3(kThreads), 0, stream, found, bins, beta, alpha, to);
  };
  return dtype == DType::f64 ? run(static_cast<double*>(counts)) : run(static_cast<float*>(counts));
}

}  // namespace mfac_kernels
