// What the glue of CUDA kernels shares. With MFAC_KERNELS_SIMT the device is the CPU, on which the same kernels run (common/simt/simt.h).
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/checks.h"
#include "common/cuda/launch.h"
#include "common/new_tensor.h"
#if !defined(MFAC_KERNELS_SIMT)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#else
#include <cstring>
#endif

// The dispatch key that the kernels are registered for
#if defined(MFAC_KERNELS_SIMT)
#define MFAC_DEVICE_KEY CPU
#else
#define MFAC_DEVICE_KEY CUDA
#endif

namespace mfac_kernels {

// The device of a tensor, made current, and its stream.
class DeviceOf {
 public:
#if defined(MFAC_KERNELS_SIMT)
  DeviceOf(const char* op, const Tensor&) : op_(op) {}
  void check_same(const char*, const Tensor&) const {}
  cudaStream_t stream() const { return nullptr; }
#else
  DeviceOf(const char* op, const Tensor& t) : op_(op), index_(t.get_device_index()), guard_(index_) {}
  // Kernels follow pointers: a tensor elsewhere would end in an illegal access.
  void check_same(const char* name, const Tensor& t) const {
    check(t.is_cuda() && t.get_device_index() == index_, op_, ": ", name, ": expected a tensor on cuda:", index_, ", got one on ",
          t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another kind of device");
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
#endif
  void check_launched(cudaError_t error) const {
    check(error == cudaSuccess, op_, ": the kernel was not launched: ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
#if !defined(MFAC_KERNELS_SIMT)
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Without values on a GPU, NaN on the CPU: what a kernel leaves unwritten shows.
inline Tensor uninitialised(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor t = new_tensor(like, sizes, dtype);
#if defined(MFAC_KERNELS_SIMT)
  if (t.numel() > 0) std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
#endif
  return t;
}

inline double* doubles_of(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

}  // namespace mfac_kernels
