// Compiles the file named by MFAC_ISA_IMPL once per instruction set, each copy in its own namespace:
//
//   #define MFAC_ISA_IMPL "mfac/cpu/window_impl.h"
//   #include "common/cpu/for_each_isa.h"
//
// One binary then serves every x86-64 CPU at the speed of -march=native. The implementation file includes nothing (a standard header
// inside a target pragma would leak its inline functions, compiled for AVX-512, into baseline code); other architectures and other
// compilers get the baseline copy, which is plain vector-extension code.
//
// MFAC_VECTOR_BYTES is the width of simd.h's vectors. The baseline's 32 is two SSE or NEON registers: its half-width float32 vectors
// then fill one.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between always-inlined functions only

#define MFAC_VECTOR_BYTES 32
#define MFAC_ISA_LEVEL 0
namespace mfac_kernels::baseline {
#include "common/cpu/simd.h"
#include MFAC_ISA_IMPL
}  // namespace mfac_kernels::baseline
#undef MFAC_VECTOR_BYTES
#undef MFAC_ISA_LEVEL

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MFAC_HAS_X86_ISAS 1

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define MFAC_VECTOR_BYTES 32
#define MFAC_ISA_LEVEL 1
namespace mfac_kernels::avx2 {
#include "common/cpu/simd.h"
#include MFAC_ISA_IMPL
}  // namespace mfac_kernels::avx2
#undef MFAC_VECTOR_BYTES
#undef MFAC_ISA_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#define MFAC_VECTOR_BYTES 64
#define MFAC_ISA_LEVEL 2
namespace mfac_kernels::avx512 {
#include "common/cpu/simd.h"
#include MFAC_ISA_IMPL
}  // namespace mfac_kernels::avx512
#undef MFAC_VECTOR_BYTES
#undef MFAC_ISA_LEVEL
#pragma GCC pop_options
#endif

#pragma GCC diagnostic pop
#undef MFAC_ISA_IMPL

// Picks NAME of the instruction set in use; NAME must exist in each copy.
#ifdef MFAC_HAS_X86_ISAS
#define MFAC_FOR_ISA(NAME)                                             \
  (::mfac_kernels::isa() == ::mfac_kernels::Isa::avx512 ? avx512::NAME \
   : ::mfac_kernels::isa() == ::mfac_kernels::Isa::avx2 ? avx2::NAME   \
                                                        : baseline::NAME)
#else
#define MFAC_FOR_ISA(NAME) (baseline::NAME)
#endif
