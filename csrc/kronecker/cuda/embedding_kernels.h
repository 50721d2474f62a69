// Counts of indices on the device, without torch. Every pointer is a device pointer. See embedding_kernels.cu.
#pragma once
#include "common/cuda/launch.h"
#include "common/types.h"

namespace mfac_kernels {

constexpr int64_t kNone = INT64_MIN;

// found (bins), zero before: how often each index occurs but `skipped`, which may be kNone. indices: int32 if narrow, else int64
cudaError_t count_indices(const void* indices, bool narrow, int64_t n, int64_t bins, int64_t skipped, unsigned long long* found,
                          cudaStream_t);

// counts <- beta counts + alpha found; float32 or float64
cudaError_t accumulate_counts(const unsigned long long* found, int64_t bins, double beta, double alpha, DType dtype, void* counts,
                              cudaStream_t);

}  // namespace mfac_kernels
