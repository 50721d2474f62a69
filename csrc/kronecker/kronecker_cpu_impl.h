// Read once per instruction set (common/for_each_isa.h). Each paragraph uses what the ones above it define.
#include "common/syrk_impl.h"

#include "kronecker/patches_cpu_impl.h"

#include "kronecker/factor_cpu_impl.h"

#include "kronecker/narrow_cpu_impl.h"
#include "kronecker/patch_sums_cpu_impl.h"
