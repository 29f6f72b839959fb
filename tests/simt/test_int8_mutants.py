"""Deliberate errors in the int8 kernels, each of which the host executor must catch; see test_simt_mutants.py."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import assert_same, case
from ops.test_int8 import OUTPUTS, expected, inputs

from adderops import reference
from simt import builder, host, host_int8
from simt.test_int8 import images

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

# Two tiles: seconds to compile.
SLIM = {"int8.cu": tuple(f"    case {i}: launch<Tile{i}>(args, bytes, grid, stream); break;\n" for i in range(3))}
TILES = (3, 4)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/cuda/`file`; one of `detectors` has to notice."""

    what: str
    old: str
    new: str
    detectors: tuple[str, ...]
    file: str = "int8.cuh"

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


RACE, VALUES, EITHER = ("race",), ("values",), ("race", "values")
WAIT = "    cp_async_wait<0>();\n    __syncthreads();\n"
MUTANTS = [
    Mutant("no barrier between slabs", WAIT, "    cp_async_wait<0>();\n", RACE),
    Mutant("cp.async not waited for", WAIT, "    __syncthreads();\n", EITHER),
    Mutant("one place for all slabs", "at = kWords - at) {", "at = at) {", EITHER),
    Mutant(
        *("pixels used before they are known (read after write)", "  __syncthreads();\n\n  const uint8_t* const x"),
        *("\n  const uint8_t* const x", EITHER),
    ),
    Mutant(
        *("sums written over a slab still read (write after read)", "++round) {\n    __syncthreads();\n"),
        *("++round) {\n", RACE),
    ),
    Mutant(
        *("sums read before they are written (read after write)", "    __syncthreads();\n#pragma unroll 1"),
        *("#pragma unroll 1", EITHER),
    ),
    Mutant("another padding", "args.padding * 0x01010101u", "args.padding * 0x00010101u", VALUES, "int8.cu"),
    Mutant("one filter too many is read", "lane_of(r) < lanes", "lane_of(r) <= lanes", EITHER),
    Mutant("one filter too many is stored", "if (k < count) definition", "if (k <= count) definition", EITHER),
    Mutant("one pixel too many is stored", "if (pixel >= pixels ||", "if (pixel > pixels ||", EITHER),
    Mutant(
        *("the left border is not looked at", "(unsigned)(site.w + right) < (unsigned)walk.W"),
        *("site.w + right < walk.W", EITHER),
    ),
    Mutant(
        *("one row too many", "(unsigned)(site.h + down) < (unsigned)height"),
        *("(unsigned)(site.h + down) <= (unsigned)height", EITHER),
    ),
    Mutant("pieces behind the last tap are read", "i < walk.KH ? walk.H : 0", "walk.H", EITHER),
    Mutant("one channel too many", "if (b < left)", "if (b <= left)", EITHER),
    Mutant("pixels behind the last are read", "first + i < pixels ? h : -0x40000000", "h", EITHER),
    Mutant("stride_w for stride_h", "OH * p.stride_h", "OH * p.stride_w", VALUES),
    Mutant(
        "dilation_w for dilation_h",
        "w.step_h = (int)p.dilation_h",
        "w.step_h = (int)p.dilation_w",
        *(EITHER, "int8.cu"),
    ),
    Mutant("words in another order", "(word / 4 ^ row / 2 % 4) * 4", "word / 4 * 4", VALUES),
    Mutant("filters in another order", "n % 4 + n / 4", "n % 2 + n / 4", EITHER),
    Mutant("channels of group 0 for all", "args.x + group * walk.C", "args.x", VALUES),
    Mutant("a quotient is not corrected", "r >= d ? q + 1 : q, *rest = r >= d ? r - d : r", "q, *rest = r", VALUES),
    Mutant("bytes of the residual mixed up", "(bytes >> 8 * k & 255u)", "(bytes >> 4 * k & 255u)", VALUES),
    Mutant("unaligned fours", "w.vectors = w.M % 4 == 0", "w.vectors = true", EITHER, "int8.cu"),
    Mutant("pieces across taps", "fits(16) ? 16 : fits(4) ? 4 : 1", "fits(4) ? 16 : 1", EITHER, "int8.cu"),
    Mutant("the direct kernel mixes rows", "row / OH, co, row % OH", "row / OH, co, row % OW", EITHER),
    Mutant("a NaN becomes the least", "z < least ? least : z", "z > least ? z : least", VALUES, "quantize.cuh"),
    Mutant(
        *("bytes read before they are written", "    }\n    __syncthreads();\n", "    }\n", EITHER, "quantize.cuh"),
    ),
    Mutant(
        *("bytes written over those still read", "    __syncthreads();  // the", "    // the", EITHER, "quantize.cuh"),
    ),
    Mutant("one pixel too many", "if (pixel >= count)", "if (pixel > count)", EITHER, "quantize.cuh"),
]

# The three widths of a copy, ragged in every direction; groups, both strides, both dilations; the direct kernel.  The
# filters of the second come in fours.
BATTERY = [
    case("mutants-16", (2, 64, 8, 9), 44, (3, 2), stride=(1, 2), padding=(1, 0, 2, 0), dilation=(2, 1), groups=2),
    case("mutants-4", (3, 24, 7, 6), 40, (2, 3), stride=(2, 1), padding=(0, 1), groups=2),
    case("mutants-1", (1, 7, 6, 7), 18, 3, stride=(1, 2), padding=1),
    case("mutants-depthwise", (2, 5, 6, 4), 5, 3, padding=1, groups=5),
]
IMAGES = [case("mutants-images", (2, 130, 5, 7), 1), case("mutants-few", (1, 3, 9, 9), 1)]


def build(mutant: Mutant | None, variant: str, folder: Path) -> host_int8.Kernels:
    csrc = folder / variant / "csrc"
    shutil.copytree(builder.CSRC, csrc)
    for file, lines in SLIM.items():
        text = (csrc / "cuda" / file).read_text()
        for line in lines:
            assert text.count(line) == 1, f"{file}: expected {line!r} once"
            text = text.replace(line, "")
        (csrc / "cuda" / file).write_text(text)
    if mutant:
        path = csrc / "cuda" / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file}: expected {mutant.old!r} once"
        path.write_text(text.replace(mutant.old, mutant.new))
    return host_int8.Kernels(host_int8.library(variant, csrc))


def check(kernels: host_int8.Kernels) -> str | None:
    """Who objects: "values", "race", "executor"; None if nobody does."""
    try:
        for c in IMAGES:
            for form in (torch.contiguous_format, torch.channels_last):
                x = images(c, torch.float32).contiguous(memory_format=form)
                for order in ("forward", "reverse", "random"):
                    assert_same(kernels.quantize(x, 0.37, 100, order=order), reference.quantize(x, 0.37, 100), "")
        for i, c in enumerate(BATTERY):
            b = inputs(c)
            for seed, order in enumerate(("forward", "reverse", "random"), 1):
                for output in (OUTPUTS[(seed + i) % 3], "bytes"):
                    tile = TILES[(seed + i) % 2]
                    got = kernels.forward(b.x, b.w, *b.epilogue(output, seed), *c.geometry, tile=tile, order=order)
                    assert_same(got, expected(c, output, seed), "")
    except AssertionError:
        return "values"
    except host.KernelError as error:
        found = ("race", "out of bounds", "beside its elements", "uninitialised", "async", "not aligned")
        return "race" if any(word in str(error) for word in found) else "executor"
    return None


@pytest.mark.parametrize("variant", ("plain", "race"))
def test_the_kernels_themselves_pass(variant, tmp_path):
    assert check(build(None, variant, tmp_path)) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant, tmp_path, record_mutant):
    variant = "race" if "race" in mutant.detectors else "plain"
    detector = check(build(mutant, variant, tmp_path))
    record_mutant(str(mutant), detector)
    assert detector in mutant.detectors, f"expected one of {mutant.detectors} to catch it, got {detector}"
