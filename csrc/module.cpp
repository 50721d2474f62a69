// mfac_kernels._C: the record of the build, from macros that setup.py sets. Links no torch.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = MFAC_KERNELS_VERSION;
  info["torch_built"] = MFAC_KERNELS_TORCH_VERSION;
  info["python_built"] = PY_VERSION;

  py::list architectures;
#ifdef MFAC_KERNELS_WITH_CUDA
  info["cuda_built"] = MFAC_KERNELS_CUDA_VERSION;
  architectures = py::str(MFAC_KERNELS_CUDA_ARCHITECTURES).attr("split")(";");
#else
  info["cuda_built"] = py::none();
#endif
  info["cuda_architectures"] = architectures;

#ifdef __clang__
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus / 100 % 100;

  py::list instruction_sets;
  instruction_sets.append("default");
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)  // as in common/cpu/for_each_isa.h
  instruction_sets.append("avx2");
  instruction_sets.append("avx512");
#endif
  info["instruction_sets"] = instruction_sets;
  info["sanitized"] = static_cast<bool>(MFAC_KERNELS_SANITIZED);
#ifdef MFAC_KERNELS_SIMT
  info["simt"] = true;
#else
  info["simt"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The record of the build.";
  m.def("build_info", &build_info, "What this package was built with.");
}
