"""The sources of the int8 CUDA kernels, run on the host against the reference: bits, order, races."""

from itertools import product

import pytest
import torch
from cases import CASES, FORMATS, SELECTED, VIEWS, Case, assert_same, case, generator, random_case
from ops.test_int8 import BYTE_CASES, OUTPUTS, Bytes, arranged, expected, inputs
from slow import slow_except

from adderops import reference
from simt import builder, host
from simt.builder import ORDERS
from simt.test_passes import SEEDS

pytestmark = pytest.mark.skipif(not builder.compiler(), reason="no C++ compiler: set CXX, or install g++")

TILES = ((128, 128), (64, 128), (32, 128), (16, 128), (64, 64))  # csrc/cuda/int8.cu
COPIES = {16: 32, 4: 20, 1: 7}  # bytes per copy: channels that lead to it


def build(variant: str = "plain") -> host.Kernels:
    return host.build(variant, host.INT8)


def check(kernels: host.Kernels, c: Case, output: str, options: int = 0, b: Bytes | None = None, **how) -> None:
    b = inputs(c) if b is None else b
    got = kernels.int8(b.x, b.w, *b.epilogue(output, options), *c.geometry, **how)
    assert_same(got, expected(c, output, options), f"{output} of {c!r}, options {options}, {how}")


@pytest.mark.parametrize("c", slow_except([*SELECTED, *BYTE_CASES], [*CASES, *BYTE_CASES]), ids=str)
def test_every_geometry(c):
    """Output, options, tile, order and layout vary from case to case."""
    index = [*CASES, *BYTE_CASES].index(c)
    how = {"order": ORDERS[index % 3], "tile": index // 3 % 6 - 1, "seed": index}
    check(build(), c, OUTPUTS[index // 2 % 3], index, arranged(inputs(c), list(FORMATS)[index % 2]), **how)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_geometries(seed):
    how = {"order": ORDERS[seed % 3], "tile": seed % len(TILES), "seed": seed}
    check(build(), random_case(3000 + seed), OUTPUTS[seed // 3 % 3], seed, **how)


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_option(output):
    """Filters in groups of four and not, by tile and by the definition."""
    for c in (case("fours", (2, 16, 5, 6), 24, 3, padding=1), *(s for s in SELECTED if s.name in OPTION_CASES)):
        for seed in range(9):
            check(build(), c, output, seed, tile=seed % 5)


OPTION_CASES = ("groups4", "depthwise17x2", "padding0123", "out33", "k5x2-s2x1")


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda tile: "{}x{}".format(*TILES[tile]))
def test_tile_edges(tile, copy):
    """One filter or pixel, one less than a tile, a tile, one more."""
    tile_m, tile_n = TILES[tile]
    for i, (m, n) in enumerate(
        zip((1, tile_m - 1, tile_m, tile_m + 1), (tile_n + 1, 1, tile_n, tile_n - 1), strict=True)
    ):
        c = case(f"filters{m}-pixels{n}", (1, COPIES[copy], 1, n), m, 1)
        check(build(), c, OUTPUTS[i % 3], i, tile=tile, order=ORDERS[i % 3])


def test_tiles_are_those_of_the_source():
    assert build().tiles("int8") == len(TILES)
    text = (builder.CSRC / "cuda/int8.cu").read_text()
    assert "{" + ", ".join(f"{{{m}, {n}}}" for m, n in TILES) + "}" in text


def ragged(copy: int) -> Case:
    return case(f"ragged-{copy}", (2, 2 * COPIES[copy], 7, 6), 42, (3, 2), stride=(1, 2), padding=(1, 0), groups=2)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_same_bits_in_every_order(tile, copy):
    """Threads and blocks in three orders, and other poison: no result depends on order or on what memory held."""
    for order, poison in zip(ORDERS, (0xFF, 0x00, 0x5A), strict=True):
        check(build(), ragged(copy), "bytes", 3, tile=tile, order=order, poison=poison)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("tile", range(len(TILES)))
def test_no_race_and_nothing_out_of_bounds(tile, copy):
    c = case(f"raced-{copy}", (1, COPIES[copy], 4, 5), 23, 3, stride=(1, 2), padding=1)
    for i, order in enumerate(ORDERS):
        check(build("race"), c, OUTPUTS[i], 2 * i + 1, tile=tile, order=order)


def test_no_race_in_the_direct_kernel():
    for i, c in enumerate((case("depthwise", (2, 6, 5, 4), 12, 3, padding=1, groups=6), random_case(3001))):
        check(build("race"), c, OUTPUTS[i], 3, order="reverse")


def misaligned(t: torch.Tensor, elements: int) -> torch.Tensor:
    """A channels_last copy that starts `elements` elements after an aligned address."""
    n, c, h, w = t.shape
    store = torch.zeros(t.numel() + 64 + elements, dtype=t.dtype)
    begin = -store.data_ptr() % 64 // t.element_size() + elements
    return store[begin : begin + t.numel()].view(n, h, w, c).permute(0, 3, 1, 2).copy_(t)


@pytest.mark.parametrize("variant", ("plain", "race"))
def test_operands_anywhere_in_memory(variant):
    """16 bytes are copied at a time where they are aligned; no access is wider than its address allows."""
    c = case("anywhere", (1, 32, 4, 4), 24, 3, padding=1)
    b = inputs(c)
    for x, w, residual in ((0, 0, 0), (4, 0, 1), (0, 4, 4), (1, 0, 2), (0, 3, 0), (8, 8, 16)):
        moved = Bytes(misaligned(b.x, x), misaligned(b.w, w), b.scale, b.offset, misaligned(b.residual, residual))
        for output, seed in (("bytes", 1), ("floats", 5)):
            check(build(variant), c, output, seed, moved)
        epilogue = moved.epilogue("bytes", 3)
        floats = (*epilogue[:2], misaligned(epilogue[2], residual), *epilogue[3:])
        got = build(variant).int8(moved.x, moved.w, *floats, *c.geometry)
        assert_same(got, expected(c, "bytes", 3), f"{x}, {w}, {residual}")


@pytest.mark.slow
def test_long_sums():
    """Beyond 2^24, where floats are no longer integers; 255 everywhere."""
    k = 70000
    x, w = torch.full((1, k, 1, 1), 255, dtype=torch.uint8), torch.zeros(2, k, 1, 1, dtype=torch.uint8)
    w[1] = 255
    w[0, 0] = 1
    kernels = build()
    assert kernels.int8(x, w, tile=3).flatten().tolist() == [-255 * k + 1, 0]
    epilogue = torch.tensor([2.0**-20, 1.0]), torch.tensor([3.0, 300.0])
    for quantize in (False, True):
        want = reference.adder_conv2d_int8(x, w, *epilogue, quantize=quantize)
        assert_same(kernels.int8(x, w, *epilogue, quantize=quantize, tile=3), want, f"quantize {quantize}")


def test_rounding_and_bounds():
    """Ties go to even, values out of range to the nearest uint8, a NaN to the largest; by vectors of four or not."""
    values = [-3e38, -1e10, -0.5, 0.5, 1.5, 2.5, 3.4999998, 254.5, 255.0, 255.5, 256.0, 1e10, 3e38, float("nan")]
    for filters in (13, 14, 28):
        offset = torch.tensor((values * 2)[-filters:])
        x, w = torch.zeros(1, 1, 1, 1, dtype=torch.uint8), torch.zeros(filters, 1, 1, 1, dtype=torch.uint8)
        for relu, quantize, most in product((False, True), (False, True), (255, 15)):
            how = (torch.ones(filters), offset, None, 1.0, relu, quantize, 3, most)
            got, want = build().int8(x, w, *how), reference.adder_conv2d_int8(x, w, *how)
            assert_same(got, want, f"{filters} filters, {how[4:]}")


def images(c: Case, dtype: torch.dtype) -> torch.Tensor:
    """Ties, infinities and NaN among the numbers."""
    x = torch.randn(c.x_shape, generator=generator(c)) * 40
    x.view(-1)[0], x.view(-1)[-1], x.view(-1)[x.numel() // 2] = float("nan"), float("inf"), -float("inf")
    return x.mul(2).round().div(2).to(dtype)


QUANTIZE_CASES = [*SELECTED, case("channels130", (1, 130, 5, 7), 1), case("wide", (1, 9, 2, 700), 1)]
GRIDS = ((1.0, 0, 255), (0.37, 100, 255), (2.0, 255, 255), (5.0, 0, 15))


@pytest.mark.parametrize("form", [*FORMATS, *VIEWS])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_quantize(dtype, form):
    for i, c in enumerate(QUANTIZE_CASES):
        x, grid = {**FORMATS, **VIEWS}[form](images(c, dtype)), GRIDS[i % len(GRIDS)]
        got = build().quantize(x, *grid, order=ORDERS[i % 3])
        assert_same(got, reference.quantize(x, *grid), f"{c!r}, {form}, {grid}")


@pytest.mark.parametrize("form", ("contiguous", "channels_last", "channel_stride"))
def test_quantize_has_no_race(form):
    for c in (QUANTIZE_CASES[-2], case("small", (2, 3, 5, 7), 1)):
        x = {**FORMATS, **VIEWS}[form](images(c, torch.float32))
        for order in ORDERS:
            got = build("race").quantize(x, 0.37, 100, order=order)
            assert_same(got, reference.quantize(x, 0.37, 100), f"{c!r}, {form}")


@pytest.mark.slow
def test_sanitized():
    """AddressSanitizer and UBSan over every kernel once, in a process of their own."""
    calls, wanted = [], []
    for (copy, channels), tile in product(COPIES.items(), range(len(TILES))):
        c = case(f"sanitized-{copy}", (1, channels, 5, 4), 21, (2, 3), stride=(2, 1), padding=(1, 0))
        b, output = inputs(c), OUTPUTS[tile % 3]
        calls.append(("int8", (b.x, b.w, *b.epilogue(output, tile), *c.geometry), {"tile": tile}))
        wanted.append(expected(c, output, tile))
    c = case("sanitized-depthwise", (1, 6, 5, 4), 6, 3, padding=1, groups=6)
    calls.append(("int8", (inputs(c).x, inputs(c).w, *inputs(c).epilogue("bytes", 3), *c.geometry), {}))
    wanted.append(expected(c, "bytes", 3))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calls.append(("quantize", (images(c, dtype), 0.37, 100), {}))
        wanted.append(reference.quantize(images(c, dtype), 0.37, 100))
    for got, want, (name, _, how) in zip(host.run_sanitized(calls, host.INT8), wanted, calls, strict=True):
        assert_same(got, want, f"{name}, {how}")
