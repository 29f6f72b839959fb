"""Deliberate errors in the CUDA kernels, each of which the host executor must catch: who passes them proves nothing.

A mutant is one textual change of a kernel, compiled into a library of its own; no mutant stands in the product. The
summary of the run lists who caught what:

values       a result differs from the reference, or from itself in another order of the threads
race         the race and bounds checker reports it
executor     threads that do not meet at a barrier, or a barrier that some never reach
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import Inputs, assert_same, case, define, exact_inputs, random_inputs
from tolerances import assert_within, tolerance

from simt import builder, host
from simt.test_passes import arranged, compute

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

# One tile of each pass, float32 and float16: what a mutant needs, and seconds to compile instead of minutes.
SLIM = {
    "cuda/launch.cuh": ("  if (type == ElementType::kBFloat16) f(BFloat16{});\n",),
    "cuda/forward.cu": tuple(
        f"    case {i}: return launch_tile<T, {tile}>(args, f, form, stream);\n"
        for i, tile in enumerate(("Tile0<T>", "Tile1", "Tile2"))
    )
    + tuple(f"      if (f.tile == {i}) launch_mma_tile<T, MmaTile{i}>(args, f, stream);\n" for i in (0, 1)),
    "cuda/grad_x.cu": tuple(
        f"      if (f.tile == {i}) launch_phase<T, Tile{i}>(args, f, phase, walk, grid, stream);\n" for i in (0, 1)
    ),
    "cuda/grad_w.cu": tuple(f"  if (f.tile == {i}) launch_tile<T, Tile{i}<T>>(args, f, stream);\n" for i in (0, 1, 2)),
}
TILE = {"forward": 3, "grad_x": 2, "grad_w": 3}


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/cuda/`file`; `on` is the pass that has to notice, by one of `detectors`."""

    what: str
    file: str
    old: str
    new: str
    on: str
    detectors: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    capability: int = 90
    tile: int | None = None  # another one than TILE's

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


RACE, VALUES = ("race",), ("values",)
F16 = {"dtype": torch.float16, "capability": 80}
BARRIER = "cp_async_wait<0>();\n    __syncthreads();\n"
MUTANTS = [
    Mutant("no barrier between slabs", "walk.cuh", BARRIER, "cp_async_wait<0>();\n", "forward", RACE),
    Mutant("no barrier between slabs", "forward_half.cuh", BARRIER, "cp_async_wait<0>();\n", "forward", RACE, **F16),
    Mutant("no barrier between slabs", "grad_w.cuh", BARRIER, "cp_async_wait<0>();\n", "grad_w", RACE),
    Mutant(
        *("sums written over a slab still read (write after read)", "walk.cuh"),
        "    __syncthreads();\n    shares[threadIdx.x] = share;",
        *("    shares[threadIdx.x] = share;", "grad_x", RACE),
    ),
    Mutant(
        *("sums read before they are written (read after write)", "walk.cuh"),
        *("shares[threadIdx.x] = share;\n    __syncthreads();", "shares[threadIdx.x] = share;", "forward", RACE),
        capability=80,
        tile=4,  # whose shares are of two groups of threads
    ),
    Mutant("cp.async not waited for", "walk.cuh", "    cp_async_wait<0>();\n", "", "forward", ("race", "values")),
    Mutant("cp.async not waited for", "grad_w.cuh", "    cp_async_wait<0>();\n", "", "grad_w", ("race", "values")),
    Mutant(
        "cp.async not waited for",
        "forward_half.cuh",
        "    cp_async_wait<0>();\n",
        "",
        "forward",
        ("race", "values"),
        **F16,
    ),
    Mutant(
        *("a row of weights too far", "walk.cuh"),
        *("kPieces = kSlab * kRow;", "kPieces = (kSlab + 1) * kRow;", "forward", ("race", "values")),
    ),
    Mutant(
        *("a pixel of dY too far", "grad_w.cuh"),
        *("x.h = y.left > 0 ?", "x.h = y.left > -1 ?", "grad_w", ("race", "values")),
    ),
    Mutant(
        "one channel too many",
        "walk.cuh",
        "i * kNextPart < left;",
        "i * kNextPart <= left;",
        "forward",
        ("race", "values"),
    ),
    Mutant(
        *("one pixel too many is stored", "forward.cuh"),
        *("if (pixel >= pixels) continue;", "if (pixel > pixels) continue;", "forward", ("race", "values")),
    ),
    Mutant(
        *("one filter too many is stored", "forward_half.cuh"),
        *("lane0 + column >= M", "lane0 + column > M", "forward", ("race", "values")),
        **F16,
    ),
    Mutant("stride_w for stride_h", "forward.cuh", "OH * p.stride_h", "OH * p.stride_w", "forward", VALUES),
    Mutant("stride_w for stride_h", "grad_w.cuh", "oh * p.stride_h", "oh * p.stride_w", "grad_w", VALUES),
    Mutant("strides swapped", "grad_x.cuh", "(int)i * f.stride_h", "(int)i * f.stride_w", "grad_x", ("race", "values")),
    Mutant(
        *("the left border is not looked at", "walk.cuh"),
        "(unsigned)(corner.w + tap_j * walk.step_w) < (unsigned)walk.W",
        *("corner.w + tap_j * walk.step_w < walk.W", "forward", ("race", "values")),
    ),
    Mutant(
        *("corners in the places of another thread", "walk.cuh", "corner = in_shared()[i * Threads];"),
        *("corner = in_shared()[i];", "forward", ("race", "values")),
    ),
    Mutant(
        *("sums of halves in half", "forward_half.cuh", "          mma_16x8x16<T>(c[m][co / 8], a, b);"),
        "          mma_16x8x16<T>(c[m][co / 8], a, b);\n"
        "          for (float& sum : c[m][co / 8]) {\n            T half;\n            from_float(sum, &half);\n"
        "            sum = to_float(half);\n          }",
        *("forward", VALUES),
        **F16,
    ),
    Mutant(
        *("cancelled sums are trusted", "forward.cuh"),
        *("fmaxf(fabsf(both), size_w) <= kCancellation * fabsf(y) && is_finite(y)", "is_finite(y)", "forward", VALUES),
        capability=80,
    ),
    Mutant(
        *("NaN of x is not looked for", "grad_x.cuh"),
        *("|| x[i][j] != x[i][j];", ";", "grad_x", VALUES),
    ),
    Mutant(
        "padding of the weights is not zero", "pack.cuh", "real ? *from : T{}", "*from", "forward", ("race", "values")
    ),
    Mutant("weights of group 0 for all", "pack.cuh", "(int64_t)group * co_step + co", "co", "forward", VALUES),
    Mutant(
        *("the last run of pixels is left out", "grad_w.cuh"),
        *("split < s.splits; ++split", "split + 1 < s.splits; ++split", "grad_w", VALUES),
    ),
    Mutant("dY is not subtracted", "grad_x.cuh", "2 * acc[i][j] - sum;", "2 * acc[i][j];", "grad_x", VALUES),
]

# Ragged in every direction; groups; both strides; several runs of pixels for grad_w.
BATTERY = [
    case("ragged", (3, 38, 9, 11), 34, (3, 2), stride=(1, 2), padding=(1, 0), groups=2),
    case("even", (1, 16, 16, 16), 16, 1, stride=(2, 1)),
]


def build(mutant: Mutant | None, variant: str, folder: Path) -> host.Passes:
    csrc = folder / variant / "csrc"
    shutil.copytree(builder.CSRC, csrc)
    for file, lines in SLIM.items():
        text = (csrc / file).read_text()
        for line in lines:
            assert text.count(line) == 1, f"{file}: expected {line!r} once"
            text = text.replace(line, "")
        (csrc / file).write_text(text)
    if mutant:
        path = csrc / "cuda" / mutant.file
        text = path.read_text()
        assert text.count(mutant.old) == 1, f"{mutant.file}: expected {mutant.old!r} once"
        path.write_text(text.replace(mutant.old, mutant.new))
    return host.Passes(host.library(variant, None, csrc))


def check(passes: host.Passes, name: str, dtype: torch.dtype, capability: int, tile: int | None = None) -> str | None:
    """Who objects: "values", "race", "executor"; None if nobody does."""
    how = {"tile": TILE[name] if tile is None else tile, "capability": capability, "multiprocessors": 4}
    # sums of so large numbers round, so that the minimum form cancels; float16 has quarters next to 64
    offset = 64 if dtype == torch.float16 else 65536 if name == "forward" else 512
    poisoned = exact_inputs(BATTERY[0])
    poisoned = Inputs(poisoned.x.clone(), poisoned.w, poisoned.grad_y, poisoned.bias)
    poisoned.x[1, 3, 4, 5] = float("nan")
    try:
        for c in BATTERY:
            for order in ("forward", "reverse", "random"):
                layout = "channels_last" if order == "reverse" else "contiguous"
                for inputs in (exact_inputs(c), exact_inputs(c, offset)):
                    got = compute(passes, name, c, arranged(inputs, layout, dtype), order=order, **how)
                    assert_same(got, define(name, c, inputs).float().to(dtype), "")
        got = compute(passes, name, BATTERY[0], arranged(poisoned, "contiguous", dtype), **how)
        assert_same(got, define(name, BATTERY[0], poisoned).float().to(dtype), "")
        deep = case("deep", (1, 96, 3, 3), 16, 3, padding=1)
        inputs = random_inputs(deep, dtype)
        want = define(name, deep, inputs)
        got = compute(passes, name, deep, inputs, **how)
        assert_within(got, want, tolerance(name, deep, inputs, want, gpu=True), "")
    except AssertionError:
        return "values"
    except host.KernelError as error:
        found = ("race", "out of bounds", "beside its elements", "uninitialised", "async")
        return "race" if any(word in str(error) for word in found) else "executor"
    return None


@pytest.mark.parametrize("name", TILE)
@pytest.mark.parametrize("variant", ("plain", "race"))
def test_the_kernels_themselves_pass(variant, name, tmp_path):
    passes = build(None, variant, tmp_path)
    for dtype, capability in ((torch.float32, 80), (torch.float32, 90), (torch.float16, 80)):
        assert check(passes, name, dtype, capability) is None


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutant_is_caught(mutant, tmp_path, record_mutant):
    variant = "race" if "race" in mutant.detectors else "plain"
    detector = check(build(mutant, variant, tmp_path), mutant.on, mutant.dtype, mutant.capability, mutant.tile)
    record_mutant(str(mutant), detector)
    assert detector in mutant.detectors, f"expected one of {mutant.detectors} to catch it, got {detector}"
