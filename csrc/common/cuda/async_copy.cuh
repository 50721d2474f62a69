// Copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 and later):
//
//   copy_async<4>(stage + i, x + j, valid);   4 elements on their way: 4, 8 or 16 bytes, at multiples of their size in both memories
//   commit_copies();                          those since the last commit are a group
//   wait_for_copies<1>();                     this thread's groups have arrived, all but the newest 1; __syncthreads shows them to the
//   others
//
// Under the SIMT shim the destination is NaN from the copy to the wait that covers it, where the source is read.
#pragma once
#include "common/cuda/launch.h"

namespace mfac_kernels {

#if defined(MFAC_KERNELS_SIMT)

template <int n, class T>
void copy_async(Shared<T> to, const T* from, int valid = n, simt::Location where = simt::Location::current()) {
  static_assert(n * sizeof(T) == 4 || n * sizeof(T) == 8 || n * sizeof(T) == 16);
  simt::copy_async(to.together(n, where), from, n * sizeof(T), valid * sizeof(T), where);
}
inline void commit_copies() { simt::commit_copies(); }
template <int pending>
void wait_for_copies() {
  simt::wait_for_copies(pending);
}

#elif defined(__CUDACC__)

// The first `valid` of n elements; the others become zero. With valid = 0 `from` is not read.
template <int n, class T>
__device__ __forceinline__ void copy_async(Shared<T> to, const T* from, int valid = n) {
  constexpr int kBytes = n * sizeof(T);
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto global = __cvta_generic_to_global(from);
  const int bytes = valid * static_cast<int>(sizeof(T));
  if constexpr (kBytes == 16)  // past L1, which has no use for what goes to shared memory
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int pending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

#endif

}  // namespace mfac_kernels
