// Read once per instruction set (common/for_each_isa.h).
#include "mfac/core_cpu_impl.h"
#include "mfac/window_cpu_impl.h"
