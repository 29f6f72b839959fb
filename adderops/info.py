"""`python -m adderops.info` prints what a bug report needs: versions, instruction sets, CUDA kernels and devices."""

import platform
from collections.abc import Callable

import torch

import adderops
from adderops import _ops


def _cuda_kernels() -> str:
    if _ops.CUDA_KERNELS_MISSING:
        return f"none: {_ops.CUDA_KERNELS_MISSING}"
    return f"for {', '.join(_ops.cuda_archs().split(';'))}"


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} ({_code_of(device)})" for device in found)


def _code_of(device: torch.cuda._CudaDeviceProperties) -> str:
    capability = f"{device.major}.{device.minor}"
    if _ops.CUDA_KERNELS_MISSING:
        return capability
    code = _ops.cuda_code_for(_ops.cuda_archs(), 10 * device.major + device.minor)
    return f"{capability}, runs the kernels for {code / 10}" if code else f"{capability}, no kernels for it"


_LINES: dict[str, Callable[[], str]] = {
    "adderops": lambda: f"{adderops.__version__} in {adderops.__path__[0]}",
    "python": lambda: f"{platform.python_version()} on {platform.platform()}",
    "torch": lambda: f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
    "instruction set in use": lambda: _ops.cpu_isa(),
    "instruction sets here": lambda: ", ".join(_ops.cpu_isas()),
    "threads": lambda: str(torch.get_num_threads()),
    "CUDA kernels": _cuda_kernels,
    "CUDA devices": _devices,
}


def describe() -> dict[str, str]:
    """Returns the lines of `python -m adderops.info`, by name; a line that fails holds its error.

    >>> describe()["CUDA kernels"].startswith(("for ", "none: "))
    True
    """
    answers = {}
    for name, ask in _LINES.items():
        try:
            answers[name] = ask()
        except Exception as error:  # a broken driver, a mistyped ADDEROPS_CPU_ISA: the report needs the other lines
            answers[name] = f"error: {error}"
    return answers


if __name__ == "__main__":
    print("\n".join(f"{name:<24}{answer}" for name, answer in describe().items()))
