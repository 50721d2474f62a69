// Read once per instruction set (common/cpu/for_each_isa.h). Each paragraph uses what the ones above it define.
#include "common/cpu/syrk_impl.h"

#include "cholesky/cpu/spd_tiles_impl.h"

#include "cholesky/cpu/spd_inverse_impl.h"

#include "mfac/cpu/block_inverse_impl.h"
#include "mfac/cpu/gram_impl.h"
#include "mfac/cpu/inverse_diagonal_impl.h"

template <class T>
constexpr StaticKernels static_kernels_of() {
  return {gram_block<T, Compute<T>>, gram_block<T, double>, block_inverse_work<T>,    block_inverse<T>,
          packed_transform_bytes<T>, pack_transform<T>,     inverse_diagonal_work<T>, inverse_diagonal<T>};
}
constexpr StaticKernels kStaticKernels[kDTypes] = {static_kernels_of<float>(), static_kernels_of<double>(), static_kernels_of<bf16>(),
                                                   static_kernels_of<fp16>()};
