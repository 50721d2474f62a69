// The CPU kernels of the transforms, compiled for each instruction set.
#include "lags/cpu/fft.h"

#include <cstdint>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/isa.h"

#define MFAC_ISA_IMPL "lags/cpu/fft_impl.h"
#include "common/cpu/for_each_isa.h"

namespace mfac_kernels {

const FftKernels& fft_kernels(DType panels) { return MFAC_FOR_ISA(kFftKernels)[panels == DType::f64]; }

}  // namespace mfac_kernels
