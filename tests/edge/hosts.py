"""Where a generated program runs: on this machine, and on a bare Cortex-M4 in Unicorn and in QEMU.

execute = HOSTS["qemu"](folder)                  compiles network.c and main.c of the folder; skips without the tools
execute(["images.bin"], {"images.bin": images})  runs it with arguments and files
"""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

from .emulation import toolchain
from .semihosting import Ended, run

STRICT = "-std=c99 -Wall -Wextra -Werror -pedantic -Wshadow".split()
LINK = "-nostartfiles -Wl,--section-start=.vectors=0,-Ttext=0x400,-Tbss=0x20000000,-e,reset".split()


def pc_program(compiler: str, sources: Path) -> Path:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on the PATH: apt install {compiler}")
    program = sources / compiler
    command = [compiler, *STRICT, "-O1", sources / "network.c", sources / "main.c", "-o", program]
    subprocess.run(command, check=True, timeout=100)
    return program


def ended(command: list, folder: Path, files: dict[str, bytes]) -> Ended:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    quiet = dict(stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    done = subprocess.run(command, cwd=folder, **quiet)
    return Ended(done.stdout + done.stderr, done.returncode == 0)


def on_pc(compiler: str, sources: Path):
    program = pc_program(compiler, sources)
    return lambda arguments, files: ended([program, *arguments], sources, files)


def in_unicorn(compiler: str, sources: Path):
    inputs = [sources / "network.c", sources / "main.c"]
    program = toolchain(compiler).compile("cortex-m4", inputs, ["reset"], ["-O2", "-DSEMIHOSTING", *STRICT])
    return lambda arguments, files: run(program.elf, "reset", arguments, files)


def in_qemu(sources: Path):
    for tool, package in (("arm-none-eabi-gcc", "gcc-arm-none-eabi"), ("qemu-system-arm", "qemu-system-arm")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on the PATH: apt install {package}")
    target = "-mcpu=cortex-m4 -mthumb -mfloat-abi=hard -mfpu=fpv4-sp-d16 -O2 -DSEMIHOSTING".split()
    command = ["arm-none-eabi-gcc", *target, *STRICT, *LINK, "network.c", "main.c", "-o", "network.elf"]
    subprocess.run(command, cwd=sources, check=True, timeout=100)
    machine = "qemu-system-arm -M mps2-an386 -nographic -kernel network.elf -semihosting-config".split()

    def execute(arguments: list[str], files: dict[str, bytes]) -> Ended:
        words = ",".join(f"arg={word}" for word in ["network", *arguments])
        return ended([*machine, f"enable=on,target=native,{words}"], sources, files)

    return execute


HOSTS = {
    "gcc": partial(on_pc, "gcc"),
    "clang": partial(on_pc, "clang"),
    "unicorn-gcc": partial(in_unicorn, "gcc"),
    "unicorn-zig": partial(in_unicorn, "zig"),
    "qemu": in_qemu,
}
