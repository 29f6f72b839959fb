"""Deliberate errors in the CUDA kernels, each of which the host executor must catch.

A mutant is one textual change of a kernel, compiled into a library of its own; no mutant is part of the product. The
summary of the run lists who caught what:

values       a result differs from the reference, or from itself in another order of the threads
race         the race and bounds checker reports it
executor     threads that do not meet at a barrier, or a barrier that some never reach
"""

from dataclasses import dataclass

import pytest
import torch
from cases import Inputs, assert_same, case, define, exact_inputs, random_inputs
from ops import test_int8 as int8
from ops.test_integrate_and_fire import assert_equal
from tolerances import assert_within, tolerance

from adderops import _ops, reference
from simt import builder, host
from simt import test_integrate_and_fire as neurons
from simt import test_moments as moments
from simt.builder import ORDERS
from simt.test_int8 import images
from simt.test_passes import arranged, compute

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

# One tile of each pass (two of int8), float32 and float16: all that a mutant needs, and seconds to compile it.
SLIM = {
    "launch.cuh": ("  if (type == ElementType::kBFloat16) f(BFloat16{});\n",),
    "forward.cu": (
        *(
            f"    case {i}: return launch_tile<T, {tile}>(args, f, formula, stream);\n"
            for i, tile in enumerate(("Tile0<T>", "Tile1", "Tile2"))
        ),
        *(f"      if (f.tile == {i}) launch_mma_tile<T, MmaTile{i}>(args, f, stream);\n" for i in (0, 1)),
    ),
    "grad_x.cu": tuple(
        f"      if (f.tile == {i}) launch_phase<T, Tile{i}>(args, f, phase, params, grid, stream);\n" for i in (0, 1)
    ),
    "grad_w.cu": tuple(f"  if (f.tile == {i}) launch_tile<T, Tile{i}<T>>(args, f, stream);\n" for i in (0, 1, 2)),
    "int8.cu": tuple(f"    case {i}: launch<Tile{i}>(args, bytes, grid, stream); break;\n" for i in range(3)),
    "moments.cu": tuple(
        f"    launch<{side}, Layout::kStrided>(), launch<{side}, Layout::kChannelsLast>();\n"
        for side in ("32, false", "128, false")
    ),
    "moments_grad.cu": tuple(
        f"  launch_lists<Tile{i}, Layout::{layout}>(all, choice, {i}, &arena, stream);\n"
        for i in (0, 2)
        for layout in ("kStrided", "kChannelsLast")
    ),
}
TILES = {"forward": 3, "grad_x": 2, "grad_w": 3}
INT8_TILES = (3, 4)


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/cuda/`file`; the pass `on` has to notice, by one of `detectors`."""

    what: str
    on: str
    file: str
    old: str
    new: str
    detectors: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    capability: int = 90
    tile: int | None = None  # another one than TILES has

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


RACE, VALUES, EITHER = ("race",), ("values",), ("race", "values")
F16 = {"dtype": torch.float16, "capability": 80}
WAIT = "    cp_async_wait<0>();\n"
BARRIER = "    __syncthreads();\n"
PIXEL = "if (pixel >= pixels"


def mutants():
    def on(name: str, file: str, *rows: tuple, **how):
        return [
            Mutant(what, name, file, old, new, detectors, **how | dict(*more))
            for what, old, new, detectors, *more in rows
        ]

    half = "          mma_16x8x16<T>(c[f][filter / 8], a, b);"
    rounded = (
        f"{half}\n          for (float& sum : c[f][filter / 8]) {{\n            T half;\n"
        "            from_float(sum, &half);\n            sum = to_float(half);\n          }"
    )
    loop = [
        ("no barrier between slabs", WAIT + BARRIER, WAIT, RACE),
        ("cp.async not waited for", WAIT, "", EITHER),
    ]
    inside = "(unsigned)(position.w + tap_j * params.dilation_w) < (unsigned)params.W"
    reliable = "fmaxf(fabsf(both), size_w) <= kCancellation * fabsf(y) && is_finite(y)"
    yield from on(
        *("forward", "implicit_gemm.cuh", *loop),
        (
            *("sums read before they are written (read after write)",),
            *(f"s_partials[threadIdx.x] = partial;\n{BARRIER}", "s_partials[threadIdx.x] = partial;\n", RACE),
            {"capability": 80, "tile": 4},  # whose sums come from two groups of threads
        ),
        ("a step of weights too far", "kCopies = kSlab * kRow;", "kCopies = (kSlab + 1) * kRow;", EITHER),
        ("one channel too many", "i * kNextPart < left;", "i * kNextPart <= left;", EITHER),
        ("the left border is not checked", inside, inside.replace("(unsigned)", ""), EITHER),
        (
            *("positions in the places of another thread", "position = in_shared()[i * Threads];"),
            *("position = in_shared()[i];", EITHER),
        ),
    )
    yield from on(
        *("grad_x", "implicit_gemm.cuh"),
        (
            "sums written over a slab still read (write after read)",
            *(f"{BARRIER}    s_partials[threadIdx.x] = partial;", "    s_partials[threadIdx.x] = partial;", RACE),
        ),
    )
    yield from on(
        *("forward", "forward.cuh"),
        ("one pixel too many is stored", f"{PIXEL}) continue;", "if (pixel > pixels) continue;", EITHER),
        ("stride_w for stride_h", "OH * p.stride_h", "OH * p.stride_w", VALUES),
        ("cancelled sums are trusted", reliable, "is_finite(y)", VALUES, {"capability": 80}),
    )
    yield from on(
        *("forward", "forward_half.cuh", *loop),
        ("one filter too many is stored", "m0 + filter >= M", "m0 + filter > M", EITHER),
        ("sums of halves in half", half, rounded, VALUES),
        **F16,
    )
    yield from on(
        *("grad_w", "grad_w.cuh", *loop),
        ("a pixel of dY too far", "x.h = y.left > 0 ?", "x.h = y.left > -1 ?", EITHER),
        ("stride_w for stride_h", "oh * p.stride_h", "oh * p.stride_w", VALUES),
        ("the last split is left out", "split < params.splits; ++split", "split + 1 < params.splits; ++split", VALUES),
    )
    yield from on(
        *("grad_x", "grad_x.cuh"),
        ("strides swapped", "(int)at.i * stride_h", "(int)at.i * stride_w", EITHER),
        ("NaN of x is not looked for", "|| x[i][j] != x[i][j];", ";", VALUES),
        ("dY is not subtracted", "2 * acc[i][j] - sum;", "2 * acc[i][j];", VALUES),
    )
    yield from on(
        *("forward", "pack.cuh"),
        ("padding of the weights is not zero", "valid ? *from : T{}", "*from", EITHER),
        ("weights of group 0 for all", "(int64_t)group * filters + co", "co", VALUES),
    )
    right = "(unsigned)(window.w + right) < (unsigned)params.W"
    down = "(unsigned)(window.h + down) < (unsigned)height"
    quotient = "r >= d ? q + 1 : q, *rest = r >= d ? r - d : r"
    yield from on(
        *("int8", "int8.cuh", *loop),
        ("one place for all slabs", "at = kWords - at) {", "at = at) {", EITHER),
        (
            "pixels used before they are known (read after write)",
            *("  __syncthreads();\n\n  const uint8_t* const x", "\n  const uint8_t* const x", EITHER),
        ),
        (
            "sums written over a slab still read (write after read)",
            *(f"++round) {{\n{BARRIER}", "++round) {\n", RACE),
        ),
        (
            "sums read before they are written (read after write)",
            *(f"{BARRIER}#pragma unroll 1", "#pragma unroll 1", EITHER),
        ),
        ("one filter too many is read", "m(r) < filters_left", "m(r) <= filters_left", EITHER),
        ("one filter too many is stored", "if (k < count) definition", "if (k <= count) definition", EITHER),
        ("one pixel too many is stored", f"{PIXEL} ||", "if (pixel > pixels ||", EITHER),
        ("the left border is not checked", right, right.replace("(unsigned)", ""), EITHER),
        ("one row too many", down, down.replace("<", "<="), EITHER),
        ("copies after the last tap are read", "i < params.KH ? params.H : 0", "params.H", EITHER),
        ("one channel too many", "if (b < left)", "if (b <= left)", EITHER),
        ("pixels beyond the last are read", "pixel0 + i < pixels ? h : kOutside", "h", EITHER),
        ("stride_w for stride_h", "OH * p.stride_h", "OH * p.stride_w", VALUES),
        ("words in another order", "(word / 4 ^ row / 2 % 4) * 4", "word / 4 * 4", VALUES),
        ("filters in another order", "n % 4 + n / 4", "n % 2 + n / 4", EITHER),
        ("channels of group 0 for all", "args.x + group * params.C", "args.x", VALUES),
        ("a quotient is not corrected", quotient, "q, *rest = r", VALUES),
        ("bytes of the residual mixed up", "(bytes >> 8 * k & 255u)", "(bytes >> 4 * k & 255u)", VALUES),
        ("the direct kernel mixes rows", "row / OH, co, row % OH", "row / OH, co, row % OW", EITHER),
    )
    yield from on(
        *("int8", "int8.cu"),
        ("another padding", "args.padding * 0x01010101u", "args.padding * 0x00010101u", VALUES),
        ("dilation_w for dilation_h", "f.dilation_h = (int)p.dilation_h", "f.dilation_h = (int)p.dilation_w", EITHER),
        ("unaligned fours", "f.vector_epilogue = f.M % 4 == 0", "f.vector_epilogue = true", EITHER),
        ("copies across taps", "fits(16) ? 16 : fits(4) ? 4 : 1", "fits(4) ? 16 : 1", EITHER),
    )
    yield from on(
        *("quantize", "quantize.cuh"),
        ("a NaN becomes the least", "z < least ? least : z", "z > least ? z : least", VALUES),
        ("bytes read before they are written", f"    }}\n{BARRIER}", "    }\n", EITHER),
        ("bytes written over those still read", "    __syncthreads();  // s_pixels", "    // s_pixels", EITHER),
        ("one pixel too many", "if (pixel >= count)", "if (pixel > count)", EITHER),
    )
    yield from moments_mutants(on)
    yield from neuron_mutants(on)


def moments_mutants(on):
    mirrored = "    layer.out[(int64_t)to_k * D + to_j] = mean;\n"
    next_pixels = (
        "    if (slab + 2 < slabs) find_pixels(slab + 2);  // in the places of this slab's pixels, which nobody reads\n"
    )
    both = "(layer.grad[(int64_t)k * D + c] + layer.grad[(int64_t)c * D + k])"
    yield from on(
        *("moments", "moments.cuh"),
        ("no barrier between slabs", next_pixels + BARRIER, next_pixels, RACE),
        ("one table of pixels for all slabs", "places = s_places[slab % 2]", "places = s_places[0]", EITHER),
        ("the last pixels are not zeroed", "if (pixel >= pixels) s_slab", "if (pixel > pixels) s_slab", EITHER),
        ("the last split is left out", "for (; i < count; ++i) sums[0]", "for (; i + 1 < count; ++i) sums[0]", VALUES),
        ("the upper half is not mirrored", mirrored, "", VALUES),
        ("the columns of another tile", "exponential, column * M::kSide", "exponential, row * M::kSide", VALUES),
        ("a group is left out", "first < M::kGroups; first", "first + kAtOnce < M::kGroups; first", VALUES),
        (
            "sums of a group written over those still read (write after read)",
            "      __syncthreads();\n    }\n#pragma unroll\n    for (int i = 0; i < kOwn; ++i) to[",
            "    }\n#pragma unroll\n    for (int i = 0; i < kOwn; ++i) to[",
            RACE,
        ),
        ("half of the sums of z", "i += M::kSide) total", "i += 2 * M::kSide) total", VALUES),
    )
    yield from on(
        *("moments", "features.cuh"),
        ("the exponent is not clamped", "x > limit ? limit : x", "x", VALUES),
        ("the student's centre for both", "scale, f.centre,", "scale, y[0].centre,", VALUES),
        ("padding is read", "first = wanted < last ? wanted : last;", "first = wanted;", EITHER),
        ("halves are read as floats", "four = source.type == ElementType::kFloat32", "four = true", EITHER),
    )
    yield from on(
        *("moments", "launch_lists.cuh"),
        ("a quotient is one too small", "/ (uint64_t)d + 1)", "/ (uint64_t)d)", EITHER),
    )
    yield from on(
        *("moments_grad", "moments_grad.cuh"),
        ("cp.async not waited for", WAIT, "", EITHER),
        ("the gradient is not symmetrised", both, both.replace("c * D + k", "k * D + c"), VALUES),
        ("the row of the mean is left out", "+ bias[c];", ";", VALUES),
        ("phi' is left out", "v *= feature_of", "feature_of", VALUES),
        (
            "rows written over those still read (write after read)",
            f"first += kRows) {{\n{BARRIER}",
            "first += kRows) {\n",
            RACE,
        ),
        ("one pixel too many is stored", "|| pixel >= pixels", "|| pixel > pixels", EITHER),
        ("one channel too many is stored", "if (c >= student.C", "if (c > student.C", EITHER),
    )
    yield from on(
        *("mean_abs", "mean_abs.cuh"),
        ("16 bytes that are not whole", "done = count / (16 / bytes) * (16 / bytes)", "done = count + 3", EITHER),
        ("sums read before they are written", "= sum;\n  __syncthreads();\n", "= sum;\n", EITHER),
    )
    yield from on(
        *("mean_abs", "mean_abs.cu"),
        ("gaps are read", "x.dense = is_dense(args, count);", "x.dense = true;", EITHER),
    )
    yield from on(
        *("match", "match.cuh"),
        ("half of the lanes", "int lanes = 16;", "int lanes = 8;", VALUES),
        ("the rows of another group", "rows + group.first + ", "rows + ", VALUES),
        ("the gradient of another variance", "= g_c * mixed_c[C_a + i]", "= g_a * mixed_c[C_a + i]", VALUES),
    )


def neuron_mutants(on):
    channel = "if (++b == args.size[1]) b = 0, ++a;"
    yield from on(
        *("integrate_and_fire", "integrate_and_fire.cuh"),
        ("the last steps are left out", "for (; left; --left, x += args.x_step)", "for (; false;)", VALUES),
        ("a group too far", "left >= kNeuronSteps; left", "left > 0; left", EITHER),
        ("the halves of a word swapped", "[j / 2] >> j % 2 * 16", "[j / 2] >> (j + 1) % 2 * 16", VALUES),
        ("spikes of the other half", "narrow.bits << j % 2 * 16", "narrow.bits << (j + 1) % 2 * 16", VALUES),
        ("one vector too many", "if (first >= step) return", "if (first > step) return", EITHER),
        ("two threads share a vector", "threadIdx.x) * Neurons", "threadIdx.x / 2 * 2) * Neurons", EITHER),
        ("the place of a parameter stays", "if (++c < args.size[2]) continue;", "continue;", VALUES),
        ("an image begins in the middle of a vector", channel, "++b;", EITHER),
        ("membranes over counts", "membrane) + first + j, membranes", "counts) + first + j, membranes", EITHER),
        ("the last neurons of a half are not stored", "j < kCount; j += 4", "j < 4; j += 4", VALUES),
    )
    yield from on(
        *("integrate_and_fire", "integrate_and_fire.cu"),
        ("vectors that are not aligned", "&& all % 16 == 0", "&& true", EITHER),
        ("the last elements of a step", "kFloat64 && step % count == 0", "kFloat64", EITHER),
        ("steps that are not aligned", "args.x_step % count == 0 &&", "true &&", EITHER),
    )
    yield from on(
        *("integrate_and_fire", "../definition/integrate_and_fire.h"),
        ("fires above the threshold only", "*u >= f.fire", "*u > f.fire", VALUES),
        ("the threshold is not scaled", "f.fire * v", "v", VALUES),
        ("the direct kernel scales counts", "count += fired;", "count += spike;", VALUES),
    )


MUTANTS = list(mutants())

# Ragged in every direction; groups; both strides; several splits of grad_w.
CONV2D_CASES = [
    case("ragged", (3, 38, 9, 11), 34, (3, 2), stride=(1, 2), padding=(1, 0), groups=2),
    case("even", (1, 16, 16, 16), 16, 1, stride=(2, 1)),
]
# The three widths of a copy, ragged in every direction; groups, both strides, both dilations; the direct kernel.  The
# filters of the second come in fours.
INT8_CASES = [
    case("mutants-16", (2, 64, 8, 9), 44, (3, 2), stride=(1, 2), padding=(1, 0, 2, 0), dilation=(2, 1), groups=2),
    case("mutants-4", (3, 24, 7, 6), 40, (2, 3), stride=(2, 1), padding=(0, 1), groups=2),
    case("mutants-1", (1, 7, 6, 7), 18, 3, stride=(1, 2), padding=1),
    case("mutants-depthwise", (2, 5, 6, 4), 5, 3, padding=1, groups=5),
]
IMAGES = [case("mutants-images", (2, 130, 5, 7), 1), case("mutants-few", (1, 3, 9, 9), 1)]


def build(mutant: Mutant | None, variant: str, name: str) -> host.Kernels:
    edits = [(f"cuda/{file}", line, "") for file, lines in SLIM.items() for line in lines]
    if mutant:
        edits.append((f"cuda/{mutant.file}", mutant.old, mutant.new))
    return host.mutant(edits, variant, (name,))


def check_conv2d(kernels: host.Kernels, name: str, dtype: torch.dtype, capability: int, tile: int | None) -> None:
    how = {"tile": TILES[name] if tile is None else tile, "capability": capability, "multiprocessors": 4}
    # sums of numbers this large round, so that the minimum formula cancels; float16 has quarters next to 64
    offset = 64 if dtype == torch.float16 else 65536 if name == "forward" else 512
    poisoned = exact_inputs(CONV2D_CASES[0])
    poisoned = Inputs(poisoned.x.clone(), poisoned.w, poisoned.grad_y, poisoned.bias)
    poisoned.x[1, 3, 4, 5] = float("nan")
    for c in CONV2D_CASES:
        for order in ORDERS:
            layout = "channels_last" if order == "reverse" else "contiguous"
            for inputs in (exact_inputs(c), exact_inputs(c, offset)):
                got = compute(kernels, name, c, arranged(inputs, layout, dtype), order=order, **how)
                assert_same(got, define(name, c, inputs).float().to(dtype), "")
    got = compute(kernels, name, CONV2D_CASES[0], arranged(poisoned, "contiguous", dtype), **how)
    assert_same(got, define(name, CONV2D_CASES[0], poisoned).float().to(dtype), "")
    deep = case("deep", (1, 96, 3, 3), 16, 3, padding=1)
    inputs = random_inputs(deep, dtype)
    want = define(name, deep, inputs)
    got = compute(kernels, name, deep, inputs, **how)
    assert_within(got, want, tolerance(name, deep, inputs, want, gpu=True), "")


def check_int8(kernels: host.Kernels) -> None:
    for i, c in enumerate(INT8_CASES):
        b = int8.inputs(c)
        for seed, order in enumerate(ORDERS, 1):
            for output in (int8.OUTPUTS[(seed + i) % 3], "bytes"):
                tile = INT8_TILES[(seed + i) % 2]
                got = kernels.int8(b.x, b.w, *b.epilogue(output, seed), *c.geometry, tile=tile, order=order)
                assert_same(got, int8.expected(c, output, seed), "")


def check_quantize(kernels: host.Kernels) -> None:
    for c in IMAGES:
        for form in (torch.contiguous_format, torch.channels_last):
            x = images(c, torch.float32).contiguous(memory_format=form)
            for order in ORDERS:
                assert_same(kernels.quantize(x, 0.37, 100, order=order), reference.quantize(x, 0.37, 100), "")


# Tiles of the sides 64 and 128, the latter several; ragged slabs of pixels; channels not in whole copies of a warp.
MOMENTS_LAYERS = [((3, 21, 5, 9), 27), ((2, 75, 5, 7), 70)]


def check_moments(kernels: host.Kernels, name: str) -> None:
    for order, dtype in zip(ORDERS, (torch.float32, torch.float16, torch.float32), strict=True):
        layout = "channels_last" if order == "reverse" else "contiguous"
        student, teacher, scales = moments.make(layout, (dtype, torch.float32), MOMENTS_LAYERS)
        how = {"order": order, "multiprocessors": 2, "tile": 1}
        if name == "moments_grad":
            moments.check_gradient(kernels, student, teacher, scales, True, MOMENTS_LAYERS, **how)
            continue
        student[0][1, 2, 3, 4] = 40.0  # an exponent to be clamped
        moments.check_moments(kernels, student, teacher, scales, True, MOMENTS_LAYERS, **how)


def check_means(kernels: host.Kernels) -> None:
    xs = [torch.arange(-300.0, 301.0)[: n * 3].view(1, 3, 1, n) for n in (1, 7, 90)]
    xs += [x[..., ::2] for x in xs]
    for order in ORDERS:
        for dtype in (torch.float32, torch.float16):
            want = torch.stack([x.to(dtype).float().abs().sum() / x.numel() for x in xs])
            assert torch.equal(kernels.mean_abs([x.to(dtype) for x in xs], order=order), want)


def check_match(kernels: host.Kernels) -> None:
    given = [list(lists) for lists in zip(*moments.groups(), strict=True)]
    want = _ops.match_rows(*given, 1e-5)
    for order in ORDERS:
        for a, b in zip(kernels.match(*given, 1e-5, order=order), want, strict=True):
            assert ((a - b).abs() <= 1e-6 * b.abs().max()).all()


def check_neurons(kernels: host.Kernels) -> None:
    neurons.check(kernels, dtypes=(torch.float32, torch.float16))
    x, _ = neurons.inputs((6, 2, 4, 8), torch.float32)
    gaps = torch.zeros(6, 64 + 3)[:, :64].unflatten(1, (2, 4, 8)).copy_(x)
    unaligned = torch.zeros(6 * 64 + 1)[1:].view(x.shape).copy_(x)
    constant = x[:1, :1, :3, :7].contiguous().expand(6, 1, 3, 7)
    for current in (gaps, unaligned, constant):
        options = (torch.full((1, 1, 1), 0.75).expand(current.shape[1:]), None, 1.0, 1.0, 1.0, True, True)
        assert_equal(kernels.integrate_and_fire(current, *options), neurons.define(current, *options), x.dtype, "")


def detector(kernels: host.Kernels, name: str, dtype=torch.float32, capability=90, tile=None) -> str | None:
    """Who objects: "values", "race", "executor"; None if none does."""
    try:
        if name == "int8":
            check_int8(kernels)
        elif name == "quantize":
            check_quantize(kernels)
        elif name == "mean_abs":
            check_means(kernels)
        elif name == "match":
            check_match(kernels)
        elif name == "integrate_and_fire":
            check_neurons(kernels)
        elif name in host.MOMENTS:
            check_moments(kernels, name)
        else:
            check_conv2d(kernels, name, dtype, capability, tile)
    except AssertionError:
        return "values"
    except host.KernelError as error:
        found = ("race", "out of bounds", "outside its elements", "uninitialised", "async", "not aligned")
        return "race" if any(word in str(error) for word in found) else "executor"
    return None


def test_every_mutant_is_in_the_sources():
    """Quick, where the others compile for minutes: a renamed line shows here first."""
    for mutant in MUTANTS:
        assert (builder.CSRC / "cuda" / mutant.file).read_text().count(mutant.old) == 1, f"{mutant}: {mutant.old!r}"


@pytest.mark.slow
@pytest.mark.parametrize("name", host.PASSES)
@pytest.mark.parametrize("variant", ("plain", "race"))
def test_the_kernels_themselves_pass(variant, name):
    kernels = build(None, variant, name)
    settings = ((torch.float32, 80), (torch.float32, 90), (torch.float16, 80)) if name in host.CONV2D else ((),)
    for setting in settings:
        assert detector(kernels, name, *setting) is None


# Each compiles a library of its own: by default the first of each pass and the first of each kind of detector.
QUICK = [*{m.on: m for m in reversed(MUTANTS)}.values(), *{m.detectors: m for m in reversed(MUTANTS)}.values()]


@pytest.mark.parametrize(
    "mutant", [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow, id=str(m)) for m in MUTANTS]
)
def test_mutant_is_caught(mutant, record_mutant):
    variant = "race" if "race" in mutant.detectors else "plain"
    kernels = build(mutant, variant, mutant.on)
    found = detector(kernels, mutant.on, mutant.dtype, mutant.capability, mutant.tile)
    record_mutant(str(mutant), found)
    assert found in mutant.detectors, f"expected one of {mutant.detectors} to catch it, got {found}"
