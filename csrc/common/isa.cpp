#include "common/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string_view>

namespace mfac_kernels {
namespace {

// The variable that torch itself honours, so that one setting lowers both.
Isa requested_isa() {
  const char* value = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view name = value ? value : "";
  if (name == "default") return Isa::baseline;
  if (name == "avx2") return Isa::avx2;
  return Isa::avx512;
}

std::atomic<Isa>& current_isa() {
  static std::atomic<Isa> current{std::min(requested_isa(), supported_isa())};
  return current;
}

}  // namespace

Isa supported_isa() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() { return current_isa().load(std::memory_order_relaxed); }

Isa set_isa(Isa wanted) {
  const Isa chosen = std::min(wanted, supported_isa());
  current_isa().store(chosen, std::memory_order_relaxed);
  return chosen;
}

}  // namespace mfac_kernels
