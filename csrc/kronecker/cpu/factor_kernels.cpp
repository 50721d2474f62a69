// The kernels of Kronecker factors, compiled for each instruction set.
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "kronecker/cpu/factor_kernels.h"

#define MFAC_ISA_IMPL "kronecker/cpu/factor_kernels_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const FactorKernels& factor_kernels(DType dtype) { return MFAC_FOR_ISA(kFactorKernels)[static_cast<int>(dtype)]; }
const NarrowKernels& narrow_kernels(DType dtype) { return MFAC_FOR_ISA(kNarrowKernels)[static_cast<int>(dtype)]; }
PatchSums patch_sums(DType dtype) { return MFAC_FOR_ISA(kPatchSums)[static_cast<int>(dtype)]; }

}  // namespace mfac_kernels
