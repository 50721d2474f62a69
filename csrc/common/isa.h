// Which instruction set the CPU kernels use: detected once, lowered by ATEN_CPU_CAPABILITY=default|avx2|avx512 or by set_isa().
#pragma once

namespace mfac_kernels {

enum class Isa : int { baseline, avx2, avx512 };

Isa isa();            // the one in use
Isa supported_isa();  // the best that this binary and this CPU have
Isa set_isa(Isa);     // asks for one; returns the one in use from now on, never more than supported_isa()

}  // namespace mfac_kernels
