// The blocks that fit the registers of one thread block: see register_kernels.cu.
#pragma once
#include "cholesky/cuda/cholesky_kernels.h"

namespace mfac_kernels {

constexpr int kLargestInRegisters = 128;
// Of the batches those with n up to that; others are left as they are.
cudaError_t cholesky_in_registers(CholeskyResult, DType dtype, const DeviceBlocks* batches, int64_t count, cudaStream_t);

}  // namespace mfac_kernels
