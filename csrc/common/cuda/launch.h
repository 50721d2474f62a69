// What a kernel file needs beside the language, under nvcc and, run on the CPU (MFAC_KERNELS_SIMT), under g++; the only place where the
// size of a warp and its masks are spelled. Glue includes it for the types of the CUDA runtime.
//
//   launch(kernel, grid, block, bytes, stream, arguments...)   kernel<<<grid, block, bytes, stream>>>(arguments...)
//   MFAC_SHARED(double, sums, 32);                             __shared__ double sums[32]; bounds are checked on the CPU
//   MFAC_DYNAMIC_SHARED(double, rows);                         the `bytes` of the launch
//   Shared<double>                                             the type to pass either on by
//   MFAC_DEVICE_CHECK(i < n, "op: argument: out of range");    a device assertion; an error of the op on the CPU
#pragma once
#if defined(MFAC_KERNELS_SIMT)
#include "common/simt/simt.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#include <cuda_runtime_api.h>
#endif

#include <cassert>
#include <cstdint>

namespace mfac_kernels {

// A block has 48 KB of shared memory, and more dynamic memory where a launch asks for it: 48 KB less the static arrays of kernels that have
// both.
constexpr size_t kDynamicWithoutAsking = 32 << 10;

#if defined(MFAC_KERNELS_SIMT)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, cudaStream_t, const Arguments&... arguments) {
  constexpr size_t kUnasked = 48 << 10, kAsked = 227 << 10;  // the largest there is
  simt::launch(grid, block, bytes, bytes > kDynamicWithoutAsking ? kAsked : kUnasked, [&] { kernel(arguments...); });
  return cudaSuccess;
}

template <class T>
using Shared = simt::Shared<T>;
// The address of a static in a lambda: one per array, also per instantiation of a template.
#define MFAC_SHARED(type, name, count)                                                      \
  const ::mfac_kernels::simt::Shared<type> name = ::mfac_kernels::simt::shared_array<type>( \
      [] {                                                                                  \
        static const char key = 0;                                                          \
        return &key;                                                                        \
      }(),                                                                                  \
      count)
#define MFAC_DYNAMIC_SHARED(type, name) const ::mfac_kernels::simt::Shared<type> name = ::mfac_kernels::simt::dynamic_array<type>()
#define MFAC_DEVICE_CHECK(condition, message) \
  ((condition) ? void() : ::mfac_kernels::simt::fail(message, ::mfac_kernels::simt::Location::current()))

#elif defined(__CUDACC__)

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (bytes > kDynamicWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

template <class T>
using Shared = T*;
#define MFAC_SHARED(type, name, count) __shared__ type name[count]
#define MFAC_DYNAMIC_SHARED(type, name)                                        \
  extern __shared__ __align__(16) unsigned char mfac_kernels_dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(mfac_kernels_dynamic_shared)
#define MFAC_DEVICE_CHECK(condition, message) assert((condition) && message)

#endif

#if defined(MFAC_KERNELS_SIMT) || defined(__CUDACC__)

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarpSize; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarpSize; }

template <class T>
__device__ __forceinline__ T read_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}

// The sum over the warp, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int bit = kWarpSize / 2; bit > 0; bit /= 2) value += __shfl_xor_sync(kAllLanes, value, bit);
  return value;
}

// One half of the values goes to the lanes that have a bit clear, the other to those that have it set: then there are half as many.
template <int half, int n, class T>
__device__ __forceinline__ void halve_values(T (&values)[n]) {
  if constexpr (half > 0) {
    const bool upper = lane_of_thread() & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[i + half] : values[i], sent = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, half);
    }
    halve_values<half / 2>(values);
  }
}

// The sums over the warp of n <= kWarpSize values (a power of two): lane l gets that of values[l % n], for about n shuffles in all.
template <int n, class T>
__device__ __forceinline__ T warp_sums(T (&values)[n]) {
  halve_values<n / 2>(values);
#pragma unroll
  for (int bit = n; bit < kWarpSize; bit *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], bit);
  return values[0];
}

// The sum over the block, in every thread. scratch: kWarpSize elements, free to use again after the next __syncthreads.
template <class T>
__device__ __forceinline__ T block_sum(T value, Shared<T> scratch) {
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = warp_sum(value);
  if (lane_of_thread() == 0) scratch[warp_of_thread()] = value;
  __syncthreads();
  return warp_sum(lane_of_thread() < warps ? scratch[lane_of_thread()] : T(0));
}

#endif

}  // namespace mfac_kernels
