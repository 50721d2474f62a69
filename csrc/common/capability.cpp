// The op through which Python asks for, or chooses, the instruction set of the CPU kernels.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/isa.h"

namespace mfac_kernels {
namespace {

int64_t cpu_capability(int64_t level) {
  check(level <= 2, "cpu_capability: level: expected at most 2, got ", level);
  return static_cast<int64_t>(level < 0 ? isa() : set_isa(static_cast<Isa>(level)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CompositeExplicitAutograd, m) { m.impl("cpu_capability", TORCH_BOX(&cpu_capability)); }

}  // namespace mfac_kernels
