// The CPU kernels of the compressed form, compiled for each instruction set.
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "lags/cpu/lags_kernels.h"

#define MFAC_ISA_IMPL "lags/cpu/lags_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const LagKernels& lag_kernels(DType dtype) { return MFAC_FOR_ISA(kLagKernels)[static_cast<int>(dtype)]; }
const ExpandKernels& expand_kernels(DType dtype) { return MFAC_FOR_ISA(kExpandKernels)[static_cast<int>(dtype)]; }

}  // namespace mfac_kernels
