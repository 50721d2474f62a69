// M-FAC's CPU kernels, compiled for each instruction set.
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "mfac/cpu/window_kernels.h"

#define MFAC_ISA_IMPL "mfac/cpu/window_kernels_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const WindowKernels& window_kernels(DType dtype) { return MFAC_FOR_ISA(kWindowKernels)[static_cast<int>(dtype)]; }
const CoreKernels& core_kernels() { return MFAC_FOR_ISA(kCoreKernels); }

}  // namespace mfac_kernels
