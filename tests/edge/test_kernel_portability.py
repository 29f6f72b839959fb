"""What compiles and what is refused: compilers, processors, modes of floating point."""

import shutil
import subprocess

import pytest
from slow import slow_except

from .host_kernels import source
from .vector_targets import STRICT, zig


def errors(compiler: list[str], folder, options: str, finish: str = "finish_float.c") -> str:
    """Returns what the compiler says to the kernels, if it fails."""
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs {compiler[0]}")
    file = folder / "kernels.c"
    file.write_text(source(finish))
    command = [*compiler, *options.split(), *STRICT, "-ffreestanding", "-c", str(file), "-o", str(folder / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("finish", slow_except(("finish_float.c",), ["finish_float.c", "finish_integer.c"]))
@pytest.mark.parametrize(
    "target",
    [
        *(f"thumb-freestanding-eabihf -mcpu=cortex_{core}" for core in ("m4", "m7", "m33", "m55")),
        *(f"thumb-freestanding-eabi -mcpu=cortex_{core}" for core in ("m0plus", "m3")),
        "arm-freestanding-eabihf -mcpu=cortex_a7",
        "aarch64-freestanding -mcpu=cortex_a53",
        "riscv32-freestanding -mcpu=generic_rv32+m+a+c",
        "riscv64-freestanding",
        "x86-freestanding -msse2 -mfpmath=sse",
        "wasm32-freestanding",
    ],
)
def test_processors(target, finish, tmp_path):
    assert not errors(zig(*target.split()), tmp_path, "-std=c99 -O2", finish)


@pytest.mark.parametrize(
    "options, message",
    [
        ("-Ofast", "without -ffast-math"),
        ("-O2 -fassociative-math -fno-signed-zeros -fno-trapping-math", "without -ffast-math"),
        ("-O2 -mfpmath=387", "FLT_EVAL_METHOD"),
    ],
)
def test_refused_arithmetic(options, message, tmp_path):
    assert message in errors(["gcc"], tmp_path, f"-std=c99 {options}")


def test_refused_processors(tmp_path):
    assert "little-endian" in errors(zig("powerpc-freestanding"), tmp_path, "-std=c99")
    assert "int of 32 bits" in errors(zig("msp430-freestanding"), tmp_path, "-std=c99")


def test_half_floats_change_nothing(tmp_path):
    """Processors with _Float16 state an FLT_EVAL_METHOD of 16, for gcc -std=gnu99."""
    assert not errors(["aarch64-linux-gnu-gcc"], tmp_path, "-std=gnu99 -O2 -march=armv8.2-a+fp16")
