"""`python -m adderops.info` prints what an answer to "it is slow" or "it does not work" needs to know."""

import platform
from collections.abc import Callable

import torch

import adderops
from adderops import _ops


def _devices() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


_LINES: dict[str, Callable[[], str]] = {
    "adderops": lambda: f"{adderops.__version__} in {adderops.__path__[0]}",
    "python": lambda: f"{platform.python_version()} on {platform.platform()}",
    "torch": lambda: f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
    "instruction set in use": lambda: _ops.cpu_isa(),
    "instruction sets here": lambda: ", ".join(_ops.cpu_isas()),
    "threads": lambda: str(torch.get_num_threads()),
    "CUDA kernels": lambda: "not in this version (CPU kernels only)",
    "CUDA devices": _devices,
}


def describe() -> dict[str, str]:
    """Returns the lines of `python -m adderops.info`; a line that cannot be found out holds its error.

    >>> describe()["CUDA kernels"]
    'not in this version (CPU kernels only)'
    """
    answers = {}
    for name, ask in _LINES.items():
        try:
            answers[name] = ask()
        except Exception as error:  # a broken driver, a mistyped ADDEROPS_CPU_ISA: the other lines matter all the more
            answers[name] = f"error: {error}"
    return answers


if __name__ == "__main__":
    for name, answer in describe().items():
        print(f"{name:<24}{answer}")
