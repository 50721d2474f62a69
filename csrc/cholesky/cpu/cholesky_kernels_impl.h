// Read once per instruction set (common/cpu/for_each_isa.h). Each paragraph uses what the ones above it define.
#include "common/cpu/syrk_impl.h"

#include "cholesky/cpu/matrix_impl.h"
#include "cholesky/cpu/spd_tiles_impl.h"

#include "cholesky/cpu/spd_inverse_impl.h"

#include "cholesky/cpu/interleaved_impl.h"
#include "cholesky/cpu/single_impl.h"

#include "cholesky/cpu/inverse_impl.h"

#include "cholesky/cpu/inverse_factor_impl.h"
#include "cholesky/cpu/triangular_impl.h"

template <class S>
constexpr CholeskyKernels cholesky_kernels_of() {
  return {kLanesOf<S>,
          lanes_work<S>,
          {inverse_work<S>, inverse<S>, inverse_of_lanes<S>},
          {factor_work<S>, factor<S>, factor_of_lanes<S>},
          {inverse_factor_work<S>, inverse_factor<S>, inverse_factor_of_lanes<S>},
          {triangular_inverse_work<S>, triangular_inverse<S>, triangular_inverse_of_lanes<S>},
          solve_work<S>,
          solve<S>};
}
constexpr CholeskyKernels kCholeskyKernels[] = {cholesky_kernels_of<float>(), cholesky_kernels_of<double>()};
