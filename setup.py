"""Builds the extensions `adderops._C` and, with a CUDA toolkit, `adderops._cuda`; pyproject.toml has the rest.

ADDEROPS_CUDA = auto (default) | 0 | 1 selects whether to build the CUDA kernels, TORCH_CUDA_ARCH_LIST for which
architectures (all: every one, whatever GPU is here); MAX_JOBS limits the number of compiler processes.
"""

import os
import shlex
import shutil
import sys
from glob import glob
from pathlib import Path

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

sys.path.insert(0, str(Path(__file__).resolve().parent / "_build"))
from cuda_toolkit import Toolkit, Unavailable, arch_list, choose_toolkit, visible_gpus

# The oldest torch in which the binaries must load: 2.11.  LibTorch's stable ABI makes one build serve every later one.
TORCH_TARGET_VERSION = "0x020b000000000000"

CXX_FLAGS = [
    "-O3",
    "-fvisibility=hidden",
    # a*b + c becomes an FMA only where a kernel asks for one: results must not depend on the compiler
    "-ffp-contract=off",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
# The same for GPU kernels; --threads compiles the architectures of one file in parallel.
NVCC_FLAGS = ["-O3", "--compiler-options=-fvisibility=hidden", "--fmad=false", "--threads=2"]


def headers() -> list[str]:
    return sorted(path for kind in ("h", "cuh") for path in glob(f"csrc/**/*.{kind}", recursive=True))


def cpu_extension() -> Extension:
    return cpp_extension.CppExtension(
        "adderops._C",
        sources=sorted([*glob("csrc/*.cpp"), *glob("csrc/cpu/*.cpp")]),
        depends=headers(),
        include_dirs=["csrc"],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-s"],
        py_limited_api=True,
    )


def cuda_extension(toolkit: Toolkit, archs: str) -> Extension:
    """Links the CUDA runtime statically and hides its symbols: all it needs of torch's CUDA is the current stream.

    libtorch.so loads the library that knows the stream, whether or not the torch at build time has it.
    """
    return cpp_extension.CppExtension(
        "adderops._cuda",
        sources=sorted([*glob("csrc/*.cpp"), *glob("csrc/cuda/*.cpp"), *glob("csrc/cuda/*.cu")]),
        depends=headers(),
        include_dirs=["csrc", str(toolkit.include)],
        library_dirs=[str(toolkit.libraries)],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args={"cxx": [*CXX_FLAGS, f'-DADDEROPS_CUDA_ARCHS="{archs}"', "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
        extra_link_args=["-s", "-Wl,--exclude-libs,ALL", "-Wl,--push-state,--no-as-needed,-ltorch,--pop-state"],
        py_limited_api=True,
    )


def extensions() -> tuple[list[Extension], str]:
    """Returns the libraries to build, and a line that says why."""
    try:
        toolkit, reason = choose_toolkit(os.environ, torch.version.cuda)
        if not toolkit:
            return [cpu_extension()], f"CPU kernels only ({reason})"
        archs = arch_list(os.environ, toolkit.architectures(), visible_gpus())
    except (Unavailable, ValueError) as error:
        sys.exit(str(error))
    # torch would guess both: the toolkit from the nvcc on the PATH, the architectures from the visible GPUs
    cpp_extension.CUDA_HOME = str(toolkit.home)
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    gpus = ", ".join(sorted(visible_gpus(), key=float)) or "none"
    decision = f"CPU kernels and CUDA kernels for {archs} ({reason}; visible GPUs: {gpus})"
    return [cpu_extension(), cuda_extension(toolkit, archs)], decision


class BuildExtension(cpp_extension.BuildExtension):
    """Also copies the libraries next to the sources, and deletes an earlier build's CUDA library if this one has none.

    Python started in the checkout (`python -m adderops.info`, say) finds ./adderops before the installed package, so
    `pip install .` has to make that folder importable as well.
    """

    def run(self) -> None:
        compiler = cpp_extension.get_cxx_compiler()
        if not shutil.which((shlex.split(compiler) or [compiler])[0]):
            sys.exit(f"adderops: no C++ compiler: expected {compiler!r} on the PATH; install g++, or name yours in CXX")
        print(f"adderops: {DECISION}", flush=True)
        if not any(extension.name == "adderops._cuda" for extension in self.extensions):
            for folder in (".", self.build_lib):
                for left_over in Path(folder, "adderops").glob("_cuda.*so"):
                    left_over.unlink()
        super().run()
        if not self.inplace:
            self.copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        # separate objects per library: both compile csrc/*.cpp, with different flags
        folder = self.build_temp
        self.build_temp = str(Path(folder, ext.name))
        super().build_extension(ext)
        self.build_temp = folder


EXTENSIONS, DECISION = extensions()
setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
