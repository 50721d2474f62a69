// The compressed form of a convolution's factor (lags/form.h) on the device, without torch. Every pointer is a device pointer.
#pragma once
#include "kronecker/cuda/factor_kernels.h"
#include "lags/form.h"

namespace mfac_kernels {

struct DeviceLags {
  void* data;
  int64_t groups, channels, size;  // channels and size of one group
  bool bias;
};

int64_t lags_workspace(const FactorRows& rows, const Factor& like);

// state <- beta state + alpha sums; unchanged, with refused = 1, if refused is given and the sums are not finite. like: the dense factor
// that the state stands for, without data.
cudaError_t accumulate_lags(const FactorRows& rows, const Factor& like, const LagForm& form, const DeviceLags& state, double beta,
                            double alpha, int32_t* refused, void* workspace, cudaStream_t);

// factor <- beta factor + alpha (what the state stands for)
cudaError_t expand_lags(const LagForm& form, const DeviceLags& state, const Factor& factor, double beta, double alpha, cudaStream_t);

}  // namespace mfac_kernels
