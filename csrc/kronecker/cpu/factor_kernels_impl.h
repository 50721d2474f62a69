// Read once per instruction set (common/cpu/for_each_isa.h). Each paragraph uses what the ones above it define.
#include "common/cpu/syrk_impl.h"

#include "kronecker/cpu/patches_impl.h"

#include "kronecker/cpu/factor_impl.h"

#include "kronecker/cpu/narrow_impl.h"
#include "kronecker/cpu/patch_sums_impl.h"
