"""main.c: images in, classes and logits out, on a PC and on a bare Cortex-M4 through semihosting."""

import shutil
import struct
import subprocess
from pathlib import Path
from random import Random

import pytest

import adderops

from .hosts import HOSTS, STRICT, pc_program
from .semihosting import Ended

TEMPLATES = Path(adderops.__file__).parent / "edge" / "c"

# Stands in for a network: the logits are the floats whose bits are the image
STUB = {
    "network.h": """
#include <stdint.h>
#define NETWORK_ARENA_SIZE 4
#define NETWORK_INPUT_SIZE 16
#define NETWORK_OUTPUT_SIZE 4
void network_run_image(const uint8_t *image, float *output, void *arena);
""",
    "network.c": """
#include "network.h"
void network_run_image(const uint8_t *image, float *output, void *arena) {
  (void)arena;
  for (int i = 0; i < NETWORK_INPUT_SIZE; i++) ((uint8_t *)output)[i] = image[i];
}
""",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("main")
    for name, text in STUB.items():
        (folder / name).write_text(text)
    shutil.copy(TEMPLATES / "main.c", folder)
    return folder


@pytest.fixture(scope="module", params=HOSTS)
def execute(request, sources):
    """Runs the program with arguments and files."""
    return HOSTS[request.param](sources)


def image(*logits: float) -> bytes:
    return struct.pack("<4f", *logits)


def test_a_line_per_image(execute):
    images = image(0, 1, 2, 3) + image(-1, -2, -3, -4) + image(-5, 7, 7, 6)
    assert execute(["images.bin"], {"images.bin": images}) == Ended("3\n0\n1\n", True)
    assert execute(["images.bin"], {"images.bin": b""}) == Ended("", True)


def test_logits_show_every_bit(execute):
    random = Random(1)
    smallest, largest = 2.0**-149, struct.unpack("<f", bytes.fromhex("ffff7f7f"))[0]
    rows = [
        (0.0, -0.0, 1.0, -1.0),
        (smallest, -smallest, 2.0**-126, 2.0**-127),
        (largest, -largest, float("inf"), -float("inf")),
        *(struct.unpack("<4f", random.randbytes(15) + b"\x40") for _ in range(8)),
    ]
    result = execute(["--logits", "images.bin"], {"images.bin": b"".join(image(*row) for row in rows)})
    assert result.succeeded
    lines = result.output.splitlines()
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        printed = [float.fromhex(word) for word in line.split()[1:]]
        assert struct.pack("<4f", *printed) == image(*row), line


def test_half_an_image_is_an_error(execute):
    images = image(0, 1, 0, 0) + bytes(5)
    assert execute(["images.bin"], {"images.bin": images}) == Ended(
        "1\nexpected whole images of 16 bytes, got a last one of 5\n", False
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.bin"], "expected a file of images, got none: nothing.bin\n"),
        (["--logit", "images.bin"], "usage: network [--logits] [FILE]\n"),
        (["a", "b"], "usage: network [--logits] [FILE]\n"),
    ],
)
def test_refusals(execute, arguments, message):
    assert execute(arguments, {"images.bin": b""}) == Ended(message, False)


def test_standard_input(sources):
    done = subprocess.run([pc_program("gcc", sources)], input=image(0, 0, 9, 0), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"2\n", b"")


@pytest.mark.parametrize("target", ["pc", "cortex-m4"])
def test_cmake_builds_the_program(target, sources, tmp_path):
    tools = ["cmake", *(["arm-none-eabi-gcc"] if target != "pc" else [])]
    for tool in tools:
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on the PATH")
    shutil.copy(TEMPLATES / "CMakeLists.txt", sources)
    options = [f"-DCMAKE_C_FLAGS={' '.join(STRICT[1:])}"]
    if target != "pc":
        flags = "-mcpu=cortex-m4 -mfloat-abi=hard -mfpu=fpv4-sp-d16"
        options = [
            "-DCMAKE_SYSTEM_NAME=Generic",
            "-DCMAKE_SYSTEM_PROCESSOR=arm",
            "-DCMAKE_C_COMPILER=arm-none-eabi-gcc",
        ]
        options += ["-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY", f"-DCMAKE_C_FLAGS={flags}", "-DSEMIHOSTING=ON"]
    for command in (["cmake", "-B", tmp_path, "-S", sources, *options], ["cmake", "--build", tmp_path]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr.lower()
    if target == "pc":
        done = subprocess.run([tmp_path / "network_main"], input=image(0, 8, 0, 0), capture_output=True, timeout=60)
        assert done.stdout == b"1\n"
