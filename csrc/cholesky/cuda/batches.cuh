// Lists of batches as kernels take them: by value, at most 4 KB, so that a launch needs no copy to the device and can be captured.
#pragma once
#include <limits>

#include "cholesky/cuda/cholesky_kernels.h"

namespace mfac_kernels {

constexpr int kMaxBatches = 29;

template <class Batch>
struct BatchList {
  int count = 0;
  int64_t first[kMaxBatches];  // thread block of each batch; the next batch's ends it
  Batch batches[kMaxBatches];
};
static_assert(sizeof(BatchList<DeviceBlocks>) <= 4096);

// body<result>()
template <class Body>
cudaError_t for_result(CholeskyResult result, const Body& body) {
  switch (result) {
    case CholeskyResult::inverse: return body.template operator()<CholeskyResult::inverse>();
    case CholeskyResult::factor: return body.template operator()<CholeskyResult::factor>();
    case CholeskyResult::inverse_factor: return body.template operator()<CholeskyResult::inverse_factor>();
    default: return body.template operator()<CholeskyResult::triangular_inverse>();
  }
}

#if defined(MFAC_KERNELS_SIMT) || defined(__CUDACC__)
// The batch of this thread block
template <class Batch>
__device__ __forceinline__ int batch_of_block(const BatchList<Batch>& list) {
  int batch = 0;
  while (batch + 1 < list.count && blockIdx.x >= list.first[batch + 1]) ++batch;
  return batch;
}
#endif

// start(list, grid) for as few lists as hold the batches that have thread blocks: blocks_of(batch) > 0.
template <class Batch, class BlocksOf, class Start>
cudaError_t for_each_list(const Batch* batches, int64_t count, const BlocksOf& blocks_of, const Start& start) {
  BatchList<Batch> list;
  int64_t grid = 0;
  const auto flush = [&] {
    const cudaError_t error = list.count ? start(list, dim3(static_cast<unsigned>(grid))) : cudaSuccess;
    list.count = 0;
    grid = 0;
    return error;
  };
  for (int64_t i = 0; i < count; ++i) {
    const int64_t blocks = blocks_of(batches[i]);
    if (blocks == 0) continue;
    if (list.count == kMaxBatches || grid + blocks > std::numeric_limits<int32_t>::max())
      if (const cudaError_t error = flush(); error != cudaSuccess) return error;
    list.first[list.count] = grid;
    list.batches[list.count++] = batches[i];
    grid += blocks;
  }
  return flush();
}

}  // namespace mfac_kernels
