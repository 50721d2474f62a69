// The CPU kernels of a fixed set of gradients, compiled for each instruction set.
#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"
#include "mfac/cpu/static_kernels.h"

#define MFAC_ISA_IMPL "mfac/cpu/static_kernels_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const StaticKernels& static_kernels(DType dtype) { return MFAC_FOR_ISA(kStaticKernels)[static_cast<int>(dtype)]; }

}  // namespace mfac_kernels
