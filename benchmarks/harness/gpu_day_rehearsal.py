"""A day without a GPU: the CUDA kernels run on the host, and stand-ins print what the tools of a GPU print.

As a plugin of pytest (-p harness.gpu_day_rehearsal) it makes the tests of tests/gpu run their operators by the sources
of csrc/cuda, compiled for the host by tests/simt.  As a program it is nvidia-smi, ncu or compute-sanitizer.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

STAND_INS = ("nvidia-smi", "ncu", "compute-sanitizer")
CAPABILITY = 9, 0
# operators whose passes have other names
OF_LISTS = {"_kernel_moments": "moments", "_kernel_moments_grad": "moments_grad", "_match_rows": "match"}


def install(folder: Path) -> None:
    """Writes the stand-ins as programs."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in STAND_INS:
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness.gpu_day_rehearsal {name} "$@"\n')
        script.chmod(0o755)


# --- the plugin ---


def pytest_configure(config) -> None:
    """Before a test module is imported."""
    import torch
    from simt import host

    from adderops import _ops

    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    _ops.CUDA_KERNELS_MISSING = None
    from gpu import device

    device.DEVICE = "cpu"
    kernels, how = host.build("plain", host.PASSES), {"capability": 10 * CAPABILITY[0] + CAPABILITY[1]}

    def of_pass(name):
        def call(*arguments):
            tensors, (stride, padding, dilation, groups) = arguments[:-4], arguments[-4:]
            bias = tensors[2] if name == "forward" else None
            operands = tensors[:2] if name == "forward" else tensors
            geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
            return kernels.conv2d(name, *operands, bias=bias, **geometry, **how)

        return call

    def neurons(x, threshold, initial, *options):
        """As one image of one channel, contiguous."""

        def of_each(parameter):
            if parameter is not None and parameter.dim() == 1 and x.dim() > 3:  # per channel
                parameter = parameter.view(-1, *(1 for _ in x.shape[3:]))
            return None if parameter is None else parameter.expand(x.shape[1:]).contiguous().view(1, 1, -1)

        arguments = x.contiguous().view(len(x), 1, 1, -1), of_each(threshold), of_each(initial), *options[:-3]
        found = kernels.integrate_and_fire(*arguments, wanted=options[-3:], **how)
        return [y.view(x.shape if y.dim() == 4 else x.shape[1:]) for y in found]

    config.library = library = torch.library.Library("adderops", "IMPL")  # as long as the run
    library.impl("adder_conv2d", of_pass("forward"), "CPU")
    library.impl("adder_conv2d_grad_x", of_pass("grad_x"), "CPU")
    library.impl("adder_conv2d_grad_w", of_pass("grad_w"), "CPU")
    library.impl("adder_conv2d_int8", lambda *arguments: kernels.int8(*arguments, **how), "CPU")
    library.impl("quantize", lambda *arguments: kernels.quantize(*arguments, **how), "CPU")
    library.impl("integrate_and_fire", neurons, "CPU")
    for name in ("_mean_abs", "_kernel_moments", "_kernel_moments_grad", "_match_rows"):
        method = getattr(kernels, OF_LISTS.get(name, name[1:]))
        library.impl(name, lambda *arguments, method=method: method(*arguments, **how), "CPU")


def pytest_terminal_summary(terminalreporter) -> None:
    from simt import host

    launches = host.build("plain", host.PASSES).statistics()["launches"]
    terminalreporter.write_line(f"kernels executed on the host: {launches} launches")


# --- the stand-ins ---


def program_in(arguments: list[str]) -> list[str]:
    """The command after the options of a tool."""
    return arguments[arguments.index(sys.executable) :]


def nvidia_smi(arguments: list[str]) -> int:
    values = {"name": "NVIDIA H200", "driver_version": "580.00", "compute_cap": "9.0", "power.limit": "700.00"}
    values |= {"memory.total": "143771", "clocks.sm": "345", "clocks.mem": "3201", "clocks.max.sm": "1980"}
    values |= {"clocks.max.mem": "3201", "temperature.gpu": "33"}
    query = next(a for a in arguments if a.startswith("--query-gpu=")).split("=", 1)[1]
    print(", ".join(values[field] for field in query.split(",")))
    return 0


def compute_sanitizer(arguments: list[str]) -> int:
    print("========= COMPUTE-SANITIZER", flush=True)
    status = subprocess.run(program_in(arguments)).returncode
    racecheck = arguments[arguments.index("--tool") + 1] == "racecheck"
    end = "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" if racecheck else "ERROR SUMMARY: 0 errors"
    print(f"========= {end}")
    return status


def ncu(arguments: list[str]) -> int:
    """Counters that are 1.25 times the predictions, once these are there."""
    status = subprocess.run(program_in(arguments)).returncode
    log = Path(arguments[arguments.index("--log-file") + 1])
    metrics = arguments[arguments.index("--metrics") + 1].split(",")
    file = log.with_name("predictions.json")
    while not file.exists():  # the part's time ends this
        time.sleep(0.1)
    header = '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size"'
    lines = [
        "==PROF== Connected to process 1 (python)",
        ",".join([header, '"Device"', '"CC"', *map(json.dumps, metrics)]),
    ]
    lines.append(",".join(['""'] * 11 + [json.dumps("%" if "pct" in metric else "") for metric in metrics]))
    for i, (symbol, expected) in enumerate(json.loads(file.read_text()).items()):
        cells = [f"{1.25 * expected[m]:,.0f}" if m in expected else "n/a" for m in metrics]
        values = [i, 1, "python", "127.0.0.1", symbol, 1, 7, "(256, 1, 1)", "(392, 1, 1)", 0, "9.0", *cells]
        lines.append(",".join(f'"{value}"' for value in values))
    log.write_text("\n".join(lines) + "\n")
    return status


if __name__ == "__main__":
    tools = dict(zip(STAND_INS, (nvidia_smi, ncu, compute_sanitizer), strict=True))
    raise SystemExit(tools[sys.argv[1]](sys.argv[2:]))
