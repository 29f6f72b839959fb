"""Builds the extension `adderops._C`; everything that needs no code is in pyproject.toml.

ADDEROPS_CUDA = auto (default) | 0 | 1 asks for the CUDA kernels; MAX_JOBS bounds the compiler processes.
"""

import os
import sys
from glob import glob

from setuptools import setup
from torch.utils import cpp_extension

# The oldest torch in which the binary must load: 2.13.  LibTorch's stable ABI makes one build serve every later one.
TORCH_TARGET_VERSION = "0x020d000000000000"

CXX_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    # a*b + c is contracted only where a kernel says so: results must not depend on the compiler's taste
    "-ffp-contract=off",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]


def check_cuda_request() -> None:
    """Ends the build where CUDA kernels are demanded: a CPU build in their place would be a silent surprise."""
    value = os.environ.get("ADDEROPS_CUDA", "auto").lower()
    if value == "1":
        sys.exit("ADDEROPS_CUDA=1: this version of adderops has CPU kernels only; unset it, or set it to 0 or auto")
    if value not in ("auto", "0"):
        sys.exit(f"ADDEROPS_CUDA: expected auto, 0 or 1, got {value!r}")


class BuildExtension(cpp_extension.BuildExtension):
    """Leaves the library beside the sources too.

    Python started in the checkout finds ./adderops before the installed package (`python -m adderops.info` there, say),
    so `pip install .` has to make that folder importable as well.
    """

    def run(self) -> None:
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()


check_cuda_request()
setup(
    ext_modules=[
        cpp_extension.CppExtension(
            "adderops._C",
            sources=sorted(["csrc/ops.cpp", "csrc/checks.cpp", *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
            include_dirs=["csrc"],
            extra_compile_args={"cxx": CXX_FLAGS},
            extra_link_args=["-s"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
