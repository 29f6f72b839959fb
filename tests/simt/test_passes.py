"""The sources of the CUDA kernels, run on the host against the float64 reference: values, order, races.

Every kernel that csrc/cuda launches, with each tile, type, layout and formula, on shapes that are ragged
against it; docs/cuda.md says what that proves and what it does not.
"""

from itertools import product

import pytest
import torch
from cases import (
    CASES,
    FAR_CASES,
    GEOMETRY_CASES,
    PASSES,
    PEER_CASES,
    SELECTED,
    Case,
    Inputs,
    assert_same,
    case,
    channel_slice,
    define,
    exact_inputs,
    exact_result,
    near,
    opposite_offsets,
    random_case,
    random_inputs,
    sliced,
)
from slow import slow_except
from tolerances import assert_within, tolerance

from simt import builder, host
from simt.builder import ORDERS

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

INF, NAN = float("inf"), float("nan")
SEEDS = [*range(15), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(15, 60))]
HALVES = (torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": sliced,
    "channel-slice": channel_slice,
}
# kM x kN of the tiles, as csrc/cuda/<pass>.cu has them: for float32, and for the halves from sm_80 on.
TILES = {
    "forward": (((128, 128), (64, 128), (32, 128), (16, 128), (64, 64)), ((64, 128), (32, 128), (16, 128))),
    "grad_x": (((64, 128), (32, 128), (16, 128)),) * 2,
    "grad_w": (((128, 128), (64, 128), (32, 128), (16, 128)),) * 2,
}


def compute(passes: host.Kernels, name: str, c: Case, i: Inputs, **how) -> torch.Tensor:
    operands = (i.x, i.w) if name == "forward" else (i.grad_y, i.x, i.w)
    stride, padding, dilation, groups = c.stride, c.padding, c.dilation, c.groups
    bias = i.bias if name == "forward" else None
    return passes.conv2d(
        name, *operands, bias=bias, stride=stride, padding=padding, dilation=dilation, groups=groups, **how
    )


def arranged(inputs: Inputs, layout: str, dtype: torch.dtype) -> Inputs:
    """Halves go through float32: a direct conversion from float64 may differ by an ulp."""
    how = LAYOUTS[layout]
    return Inputs(*(how(t.float().to(dtype)) for t in (inputs.x, inputs.w, inputs.grad_y)), inputs.bias.to(dtype))


def at_edges(name: str, tile: tuple[int, int], i: int) -> Case:
    """One channel or pixel, one less than a tile, a tile, one more; m and n never the same of these."""
    tile_m, tile_n = tile
    m = (1, tile_m - 1, tile_m, tile_m + 1)[i]
    n = (tile_n + 1, 1, tile_n, tile_n - 1)[i]
    if name == "forward":
        return case(f"m{m}-n{n}", (1, 8, 1, n), m, 1)
    if name == "grad_x":
        return case(f"m{m}-n{n}", (1, m, 1, n), 8, 1) if m > 1 else case("narrow", (1, 3, 1, n), 8, 1)
    c = max(2, n)
    return case(f"m{m}-n{c}", (1, c, 3, 11), m, 1)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_tile_edges(name, dtype, layout):
    passes = host.build()
    for tile, size in enumerate(TILES[name][dtype in HALVES]):
        for i in range(4):
            c = at_edges(name, size, i)
            got = compute(passes, name, c, arranged(exact_inputs(c), layout, dtype), tile=tile, order=ORDERS[i % 3])
            assert_same(got, exact_result(name, c).float().to(dtype), f"{name} of {c!r}, tile {tile}")


LARGER = [c for c in CASES if c.name in "resnet20-64 depth1161-k3 bands-images depthwise65x2 resnet50-1x1-s2".split()]
SHAPES = list(dict.fromkeys([*SELECTED, *PEER_CASES, *GEOMETRY_CASES, *LARGER]))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("c", slow_except(SELECTED, SHAPES), ids=str)
def test_exact(c, name):
    """Every geometry, with the automatic choice of kernel; type, layout, device and order vary from case to case."""
    passes, index = host.build(), CASES.index(c)
    dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float16)[index % 4]
    layout = list(LAYOUTS)[index // 2 % 4]
    how = {"capability": (90, 80, 75, 120)[index // 3 % 4], "order": ORDERS[index % 3], "seed": index}
    got = compute(passes, name, c, arranged(exact_inputs(c), layout, dtype), **how)
    assert_same(got, exact_result(name, c).float().to(dtype), f"{name} of {c!r}, {dtype}, {layout}, {how}")


@pytest.mark.parametrize("seed", SEEDS)
def test_exact_random_geometry(seed):
    c, passes = random_case(1000 + seed), host.build()
    for number, name in enumerate(PASSES):
        tile, layout = seed % len(TILES[name][0]), list(LAYOUTS)[(seed + number) % 4]
        dtype = (torch.float32, torch.float64, torch.float16)[seed % 3]
        how = {"tile": tile, "capability": (80, 90)[seed % 2], "order": ORDERS[seed % 3], "seed": seed}
        got = compute(passes, name, c, arranged(exact_inputs(c), layout, dtype), **how)
        assert_same(got, exact_result(name, c).to(dtype), f"{name} of {c!r}, {dtype}, {layout}, {how}")


KERNELS = [
    *(("forward", torch.float32, t, f, c) for t in range(5) for f, c in ((0, 90), (1, 80))),
    *(("forward", dtype, t, -1, c) for dtype in HALVES for t in range(3) for c in (80, 75)),
    *(("grad_x", dtype, t, -1, 80) for dtype in (torch.float32, *HALVES) for t in range(3)),
    *(("grad_w", dtype, t, -1, 80) for dtype in (torch.float32, *HALVES) for t in range(4)),
]
RAGGED = case("ragged", (2, 24, 9, 8), 40, 3, stride=(1, 2), padding=1)


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_same_bits_in_every_order(kernel, layout):
    """Threads and blocks in three orders, and other poison: no result depends on order or on what memory held."""
    name, dtype, tile, formula, capability = kernel
    inputs = arranged(random_inputs(RAGGED, torch.float64), layout, dtype)
    how = {"tile": tile, "formula": formula, "capability": capability}
    first, *others = (
        compute(host.build(), name, RAGGED, inputs, order=order, poison=poison, **how)
        for order, poison in (("forward", 0xFF), ("reverse", 0xFF), ("random", 0x3F))
    )
    want = define(name, RAGGED, inputs)
    assert_within(first, want, tolerance(name, RAGGED, inputs, want, gpu=True), f"{kernel}, {layout}")
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_no_race_and_nothing_out_of_bounds(kernel, layout):
    name, dtype, tile, formula, capability = kernel
    c = case("raced", (1, 24, 5, 6), 24, 3, stride=(1, 2), padding=1)
    got = compute(
        *(host.build("race"), name, c, arranged(exact_inputs(c), layout, dtype)),
        **{"tile": tile, "formula": formula, "capability": capability, "order": "random"},
    )
    assert_same(got, exact_result(name, c).float().to(dtype), f"{kernel}, {layout}")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, *HALVES), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_no_race_in_the_direct_kernels(name, dtype):
    for c in (case("depthwise", (2, 6, 5, 4), 12, 3, padding=1, groups=6), case("one-channel", (2, 1, 5, 5), 9, 3)):
        for layout in ("contiguous", "channels_last"):
            got = compute(host.build("race"), name, c, arranged(exact_inputs(c), layout, dtype), order="reverse")
            assert_same(got, exact_result(name, c).to(dtype), f"{name} of {c!r}, {dtype}, {layout}")


@pytest.mark.slow
def test_sanitized():
    """AddressSanitizer and UBSan over every kernel once, in a process of their own."""
    c = case("sanitized", (1, 19, 5, 4), 21, (2, 3), stride=(2, 1), padding=(1, 0))
    calls, wanted = [], []
    for (name, dtype, tile, formula, capability), layout in product(KERNELS, ("contiguous", "channels_last")):
        i = arranged(exact_inputs(c), layout, dtype)
        operands = (i.x, i.w) if name == "forward" else (i.grad_y, i.x, i.w)
        geometry = {"stride": c.stride, "padding": c.padding, "dilation": c.dilation, "groups": c.groups}
        bias = {"bias": i.bias} if name == "forward" else {}
        how = {"tile": tile, "formula": formula, "capability": capability}
        calls.append(("conv2d", (name, *operands), geometry | bias | how))
        wanted.append(exact_result(name, c).float().to(dtype))
    for got, want, (_, operands, how) in zip(host.run_sanitized(calls), wanted, calls, strict=True):
        assert_same(got, want, f"{operands[0]}, {how}")


@pytest.mark.parametrize("capability", slow_except((80,), (75, 80, 90)))
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("name", PASSES)
def test_nan_and_infinity(name, dtype, capability):
    """One poisoned element of each operand at a time; the others stay exact."""
    c, passes = case("poisoned", (2, 18, 5, 6), 20, 3, stride=(1, 2), padding=1), host.build()
    for field in ("x", "w") if name == "forward" else ("grad_y", "x", "w"):
        for value, last in product((NAN, INF, -INF), (False, True)):
            clean = exact_inputs(c)
            tensors = {f: getattr(clean, f).clone() for f in ("x", "w", "grad_y", "bias")}
            shape = tensors[field].shape
            tensors[field][tuple(s - 1 if last else s // 2 for s in shape)] = value
            inputs = Inputs(**tensors)
            want = define(name, c, inputs).float().to(dtype)
            layout = "channels_last" if last else "contiguous"
            got = compute(passes, name, c, arranged(inputs, layout, dtype), capability=capability)
            assert_same(got, want, f"{name}, {dtype}, {field} = {value}, sm_{capability}")


CANCELLING = [
    (torch.float32, 65536, case("offset", (1, 40, 4, 5), 24, 3)),
    (torch.float16, 2032, case("deep-offset", (1, 1024, 3, 3), 16, 3)),
]


@pytest.mark.parametrize("dtype, offset, c", CANCELLING, ids=str)
def test_minimum_form_where_it_cancels(dtype, offset, c):
    """A common offset that float32 sums of X and W round away: the distance formula steps in, exactly."""
    inputs = exact_inputs(c, offset)
    if dtype == torch.float16:  # integers next to 2032
        inputs = Inputs(*(t.round() for t in (inputs.x, inputs.w, inputs.grad_y, inputs.bias)))
    want = define("forward", c, inputs)
    for layout, capability in product(("contiguous", "channels_last"), (75, 80)):
        got = compute(host.build(), "forward", c, arranged(inputs, layout, dtype), capability=capability)
        assert_same(got, want.float().to(dtype), f"offset {offset}, {dtype}, {layout}, sm_{capability}")


OPPOSITE = [
    (torch.float32, 2**20, case("opposite", (1, 512, 2, 3), 33, 1)),
    (torch.float16, 2032, case("deep-opposite", (1, 20480, 1, 3), 17, 1)),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, offset, c", OPPOSITE, ids=str)
def test_minimum_form_where_offsets_cancel_within_its_sums(dtype, offset, c):
    """sum X + sum W is small, and wrong: sum |W| reveals it."""
    inputs = exact_inputs(c)
    if dtype == torch.float16:  # integers next to 2032
        inputs = Inputs(*(t.round() for t in (inputs.x, inputs.w, inputs.grad_y, inputs.bias)))
    inputs = opposite_offsets(c, inputs, offset)
    want = define("forward", c, inputs)
    for layout, capability in product(("contiguous", "channels_last"), (75, 80)):
        got = compute(host.build(), "forward", c, arranged(inputs, layout, dtype), capability=capability)
        assert_same(got, want.float().to(dtype), f"offset {offset}, {dtype}, {layout}, sm_{capability}")


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize(
    "far, close", [(far, near(far, geometry)) for far, geometry in FAR_CASES], ids=lambda c: c.name
)
def test_far_windows(far, close, name):
    """Windows that span up to 2^31 pixels: the same sums as nearby, and a workspace as small."""
    for dtype, capability in ((torch.float32, 80), (torch.float64, 80), (torch.bfloat16, 90)):
        got = compute(
            host.build(), name, far, arranged(exact_inputs(close), "contiguous", dtype), capability=capability
        )
        assert_same(got, exact_result(name, close).float().to(dtype), f"{name} of {far!r}, {dtype}")


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("scales", [(1.0, 1.0, 0.0), (100.0, 0.01, 0.0), (0.01, 0.01, 0.0), (1.0, 1.0, 10.0)], ids=str)
def test_accuracy(name, scales):
    """Within a bound derived from the arithmetic (tests/tolerances.py), where rounding matters."""
    x_scale, w_scale, offset = scales
    for dtype, c in product(
        (torch.float32, *HALVES), (case("deep", (2, 136, 4, 5), 18, 3, padding=1), case("wide", (5, 16, 9, 9), 24, 1))
    ):
        inputs = random_inputs(c, dtype, x_scale, w_scale, offset)
        want = define(name, c, inputs)
        bound = tolerance(name, c, inputs, want, gpu=True)
        for capability in (80, 90):
            got = compute(host.build(), name, c, inputs, capability=capability)
            assert_within(got, want, bound, f"{name} of {c!r}, {dtype}, scales {scales}, sm_{capability}")


def test_many_splits_of_pixels():
    """grad_w divides its sum into as many splits as the device can use; each number of them gives the exact sum."""
    c = case("split", (6, 10, 20, 23), 12, 3, padding=1)
    inputs = arranged(exact_inputs(c), "contiguous", torch.float32)
    for multiprocessors in (1, 4, 132):
        got = compute(host.build(), "grad_w", c, inputs, multiprocessors=multiprocessors)
        assert_same(got, exact_result("grad_w", c).float(), f"{multiprocessors} multiprocessors")
