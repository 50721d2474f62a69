from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension
import glob
setup(ext_modules=[CppExtension("mfac_kernels._ops", sorted(glob.glob("csrc/library.cpp")+glob.glob("csrc/*/*.cpp")), include_dirs=[__import__("os").path.abspath("csrc")],
          extra_compile_args={"cxx": ["-std=c++20","-O3", "-g0","-Wall","-Wextra","-Wno-psabi","-Wno-unused-parameter","-fvisibility=hidden",
             "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]}, extra_link_args=["-Wl,-s"])],
      name="mfac_kernels",packages=["mfac_kernels"],
      cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True)})
