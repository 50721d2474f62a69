// The CPU kernels of symmetric positive definite blocks, compiled for each instruction set.
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cholesky/cpu/cholesky_kernels.h"
#include "common/isa.h"

#define MFAC_ISA_IMPL "cholesky/cpu/cholesky_kernels_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const CholeskyKernels& cholesky_kernels(DType dtype) { return MFAC_FOR_ISA(kCholeskyKernels)[static_cast<int>(dtype)]; }

}  // namespace mfac_kernels
