"""Exported networks, compiled on this machine and run between guards; and how to get an integer network to export."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adderops.edge import Report, bytes_of, export_c, program_of, run
from adderops.quant import IntegerNetwork, Scheme, calibrate, convert, reestimate_batchnorm

STRICT = "-Wall -Wextra -Werror -pedantic"
SANITIZED = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
BUILDS = {
    "gcc": f"gcc -std=c99 -O2 {STRICT}",
    "gcc-O0": f"gcc -std=c99 -O0 -DADDER_TARGET=0 {STRICT}",
    "gcc-sanitized": f"gcc -std=c99 {SANITIZED} {STRICT}",
    "gcc-c99-sanitized": f"gcc -std=c99 -DADDER_TARGET=0 {SANITIZED} {STRICT}",
    "gcc-contract": "gcc -std=gnu99 -O3 -ffp-contract=fast -march=native -Wall -Wextra -Werror",
    "gcc-c99-contract": "gcc -std=gnu99 -O3 -DADDER_TARGET=0 -ffp-contract=fast -march=native -Wall -Wextra -Werror",
    "clang": f"clang -std=c99 -O2 {STRICT}",
    "clang-sanitized": f"clang -std=c99 {SANITIZED} {STRICT}",
    "clang-contract": "clang -std=gnu99 -O3 -ffp-contract=fast -march=native -Wall -Wextra -Werror",
}

# Each image runs in an arena of its own, twice, and once more after the next image has run in another arena. Input,
# arena and output are blocks of exactly their sizes, at odd addresses where that is allowed, between bytes that must
# not change.
_MAIN = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "NAME.h"

enum { GUARD = 32, MARK = 0x5a };

static unsigned char *block(size_t size, int shift, unsigned char **whole) {
  *whole = malloc(GUARD + size + GUARD);
  memset(*whole, MARK, GUARD + size + GUARD);
  return *whole + GUARD - 4 + shift;
}

static void check(const unsigned char *whole, const unsigned char *start, size_t size, size_t n, const char *what) {
  for (size_t i = 0; i < n; i++)
    if ((whole + i < start || whole + i >= start + size) && whole[i] != MARK) {
      fprintf(stderr, "%s: byte %ld is overwritten\\n", what, (long)(whole + i - start));
      exit(1);
    }
}

static void run(int image, const unsigned char *x, int shift, unsigned char *arena, float *y) {
  unsigned char *copy = malloc(NAME_INPUT_SIZE + (size_t)shift);
  unsigned char *whole, *out = block(sizeof(float) * NAME_OUTPUT_SIZE, 4, &whole);
  const size_t n = sizeof(float) * NAME_OUTPUT_SIZE;
  memcpy(copy + shift, x, NAME_INPUT_SIZE);
  if (image) {
#ifdef IMAGES
    name_run_image(copy + shift, (float *)(void *)out, arena);
#endif
  } else {
    name_run(copy + shift, (float *)(void *)out, arena);
  }
  check(whole, out, n, GUARD + n + GUARD, "output");
  memcpy(y, out, n);
  free(whole), free(copy);
}

int main(int argc, char **argv) {
  static unsigned char x[NAME_INPUT_SIZE], before[NAME_INPUT_SIZE];
  static float first[NAME_OUTPUT_SIZE], again[NAME_OUTPUT_SIZE], last[NAME_OUTPUT_SIZE];
  const int image = argc > 1 && argv[1][0] == 'i';
  unsigned char *kept[2];
  for (int k = 0; k < 2; k++) kept[k] = malloc(NAME_ARENA_SIZE);
  for (int n = 0; fread(x, 1, sizeof x, stdin) == sizeof x; n++) {
    unsigned char *whole, *exact = malloc(NAME_ARENA_SIZE + (size_t)(n & 3));
    unsigned char *arena = block(NAME_ARENA_SIZE, n & 3, &whole);
    memset(exact, n * 37, NAME_ARENA_SIZE + (size_t)(n & 3));
    run(image, x, n & 3, exact + (n & 3), first);
    run(image, x, (n + 1) & 3, arena, again);
    check(whole, arena, NAME_ARENA_SIZE, GUARD + NAME_ARENA_SIZE + GUARD, "arena");
    free(whole), free(exact);
    if (memcmp(first, again, sizeof first)) return fprintf(stderr, "two runs differ\\n"), 1;
    run(image, x, 0, kept[n & 1], again);
    if (n) run(image, before, 0, kept[~n & 1], again);
    if (n && memcmp(last, again, sizeof last)) return fprintf(stderr, "two arenas disturb each other\\n"), 1;
    memcpy(before, x, sizeof x), memcpy(last, first, sizeof first);
    fwrite(first, sizeof first, 1, stdout);
  }
  for (int k = 0; k < 2; k++) free(kept[k]);
  return 0;
}
"""


def integer_network(model: nn.Module, images: Tensor, **scheme: object) -> IntegerNetwork:
    """Returns the integer network of an untrained model, with BatchNorm statistics of some images."""
    model = reestimate_batchnorm(model, [images]).eval()
    return convert(calibrate(model, [images], Scheme(**{"ends": "int8", **scheme})), images)


def pixels(x: Tensor) -> bytes:
    """Returns bytes (N, C, H, W) as C reads them, (N, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous().numpy().tobytes()


def compiled(folder: Path, name: str, build: str = "gcc", images: bool = False) -> Path:
    """Compiles an exported network with a main program that reads inputs and writes outputs."""
    command = BUILDS[build].split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}: a C compiler")
    main, program = folder / f"{name}_test.c", folder / f"{name}_{build}"
    main.write_text(
        _MAIN.replace("NAME", name.upper()).replace('"' + name.upper(), f'"{name}').replace("name_", f"{name}_")
    )
    files = [str(folder / f"{name}.c"), str(main), "-o", str(program)]
    subprocess.run([*command, *(["-DIMAGES"] if images else []), f"-I{folder}", *files], check=True, timeout=300)
    return program


def outputs(program: Path, x: bytes, count: int, image: bool = False) -> np.ndarray:
    """Returns the floats of a compiled network, (count, n)."""
    done = subprocess.run([str(program), *(["i"] if image else [])], input=x, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return np.frombuffer(done.stdout, np.float32).reshape(count, -1)


def exported(integer: IntegerNetwork, images: Tensor, folder: Path, **options: object) -> Report:
    """Exports to `folder` under the name `network`, with images of bytes."""
    channels = images.size(1)
    return export_c(integer, images, folder, mean=[0.45] * channels, std=[0.25] * channels, **options)


def some_images(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Returns inputs, with one image of the lowest and one of the highest number on any grid."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[-2], x[-1] = -1e6, 1e6
    return x


def check_export(
    integer: IntegerNetwork, x: Tensor, folder: Path, builds: Sequence[str], epilogue: str = "float32"
) -> Report:
    """Exports, compiles, runs, and compares all bits of the outputs with those of Python."""
    program = program_of(integer, x, epilogue)
    grid = bytes_of(program, x)
    expected = run(program, grid)
    if epilogue == "float32":
        assert torch.equal(expected, integer(x)), "the program is not the network"
    report = exported(integer, x, folder, epilogue=epilogue)
    if expected.dim() == 4:
        expected = expected.permute(0, 2, 3, 1)
    for build in builds:
        got = outputs(compiled(folder, "network", build, images=True), pixels(grid), len(x))
        wrong = int((got != expected.reshape(len(x), -1).numpy()).sum())
        assert wrong == 0, f"{build}: {wrong} of {got.size} outputs differ"
    return report
