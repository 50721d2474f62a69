// Read once per instruction set (common/cpu/for_each_isa.h).
#include "mfac/cpu/core_impl.h"
#include "mfac/cpu/window_impl.h"
