"""The int8 CUDA kernels give the bits of the reference on a GPU; without one the whole file is one skip."""

import pytest
import torch
from cases import CASES, FORMATS, SELECTED, VIEWS, assert_same, case, generator, random_case
from ops import test_int8
from ops.test_int8 import BYTE_CASES, OP, OUTPUTS, Bytes, arranged, expected, inputs

from adderops import reference
from adderops.functional import adder_conv2d_int8, quantize
from gpu.device import DEVICE


def on_device(b: Bytes) -> Bytes:
    return Bytes(*(t.to(DEVICE) for t in vars(b).values()))


def moved(arguments: tuple) -> tuple:
    return tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments)


def check(c, output: str, form: str, seed: int = 0) -> None:
    b = on_device(arranged(inputs(c), form))
    got = OP(b.x, b.w, *moved(b.epilogue(output, seed)), *c.geometry)
    assert_same(got, expected(c, output, seed), f"{output} of {c!r}, {form}, seed {seed}")
    assert got.device.type == DEVICE and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("c", [*CASES, *BYTE_CASES], ids=str)
def test_every_geometry(c):
    for form in FORMATS:
        for output in OUTPUTS:
            check(c, output, form)


def test_random_geometries():
    for seed in range(200):
        check(random_case(seed), OUTPUTS[seed % 3], list(FORMATS)[seed // 3 % 2], seed)


def test_every_option():
    for c in SELECTED:
        for output in OUTPUTS:
            for seed in range(1, 9):
                check(c, output, "channels_last", seed)


def test_layers_of_many_tiles():
    """Tiles of 128 x 128, and many slabs."""
    for c in (
        case("resnet18-512", (2, 512, 14, 14), 512, 3, padding=1),
        case("resnet50-1x1", (4, 256, 28, 28), 256, 1),
        case("resnet20-16", (64, 16, 32, 32), 16, 3, padding=1),
        case("groups", (8, 128, 20, 21), 256, 3, padding=1, groups=4),
    ):
        check(c, "bytes", "channels_last", 3)


def test_the_longest_sum():
    """As many terms of 255 as the operator accepts: the sum is just below 2^31."""
    k = (2**31 - 1) // 255
    x, w = torch.full((1, k, 1, 1), 255, dtype=torch.uint8), torch.zeros(2, k, 1, 1, dtype=torch.uint8)
    w[1] = 255
    assert adder_conv2d_int8(x.to(DEVICE), w.to(DEVICE)).flatten().tolist() == [-255 * k, 0]
    x, w = (t[:, : k - 1].contiguous() for t in (x, w))  # no multiple of 4
    assert adder_conv2d_int8(x.to(DEVICE), w.to(DEVICE)).flatten().tolist() == [-255 * (k - 1), 0]


def test_misaligned_operands():
    c = case("anywhere", (1, 32, 4, 4), 24, 3, padding=1)
    b = inputs(c)
    for offset in (1, 2, 4, 8, 16):

        def moved_by(t: torch.Tensor, by: int) -> torch.Tensor:
            n, channels, h, w = t.shape
            store = torch.empty(t.numel() + by, dtype=t.dtype, device=DEVICE)
            return store[by:].view(n, h, w, channels).permute(0, 3, 1, 2).copy_(t)

        x, w, residual = (moved_by(t, offset) for t in (b.x, b.w, b.residual))
        epilogue = moved(Bytes(x, w, b.scale, b.offset, residual).epilogue("bytes", 1))
        assert_same(OP(x, w, *epilogue, *c.geometry), expected(c, "bytes", 1), f"{offset}")


@pytest.mark.parametrize("form", [*FORMATS, *VIEWS])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_quantize(dtype, form):
    for c in [*SELECTED, case("tall", (2, 3, 90, 80), 1), case("wide", (1, 9, 2, 2000), 1)]:
        x = torch.randn(c.x_shape, generator=generator(c)) * 40
        x.view(-1)[0], x.view(-1)[-1] = float("nan"), float("inf")
        x = x.mul(2).round().div(2).to(dtype)
        for grid in ((1.0, 0, 255), (0.37, 100, 255), (2.0, 255, 255), (5.0, 0, 15)):
            got = quantize({**FORMATS, **VIEWS}[form](x.to(DEVICE)), *grid)
            assert_same(got, reference.quantize(x, *grid), f"{c!r}, {form}, {grid}")
            assert got.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch():
    w = torch.ones(4, 3, 3, 3, dtype=torch.uint8, device=DEVICE)
    assert adder_conv2d_int8(torch.ones(0, 3, 5, 5, dtype=torch.uint8, device=DEVICE), w).shape == (0, 4, 3, 3)
    assert quantize(torch.ones(0, 3, 5, 5, device=DEVICE), 1.0, 0).shape == (0, 3, 5, 5)


@pytest.mark.parametrize("output", OUTPUTS)
def test_opcheck(output):
    c = case("opcheck", (2, 6, 7, 8), 9, 3, stride=(1, 2), padding=(1, 0, 2, 1), groups=3)
    for form in FORMATS:
        b = on_device(arranged(inputs(c), form))
        result = torch.library.opcheck(OP, (b.x, b.w, *moved(b.epilogue(output, 3)), *c.geometry))
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize(
    "changed, message", test_int8.WRONG_OPERATOR_CALLS.values(), ids=test_int8.WRONG_OPERATOR_CALLS
)
def test_what_the_operator_refuses(changed, message):
    arguments = dict(x=test_int8.X, w=test_int8.W, scale=test_int8.A, offset=test_int8.B, residual=None)
    arguments |= dict(residual_scale=1.0, relu=False, quantize=True, zero_point=0, quant_max=255, padding_value=0)
    arguments |= dict(stride=[1, 1], padding=[0] * 4, dilation=[1, 1], groups=1) | changed
    with pytest.raises(RuntimeError, match=f"adder_conv2d_int8: {message}"):
        OP(**{name: a.to(DEVICE) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()})


def test_operands_of_two_devices():
    x, w = torch.ones(1, 4, 5, 5, dtype=torch.uint8), torch.ones(4, 4, 3, 3, dtype=torch.uint8)
    geometry = [1, 1], [0] * 4, [1, 1], 1
    sums = None, None, None, 1.0, False, False, 0, 255, 0
    for operands in ((x.to(DEVICE), w), (x, w.to(DEVICE))):
        with pytest.raises(RuntimeError, match="w: expected the device of x"):
            OP(*operands, *sums, *geometry)


def test_cuda_graph():
    """Captured once, replayed with other data: no synchronisation, only torch's memory, the current stream."""
    c = case("graph", (3, 32, 9, 10), 72, 3, padding=1)
    b = on_device(arranged(inputs(c), "channels_last"))
    x = b.x.clone(memory_format=torch.preserve_format)
    OP(x, b.w, *moved(b.epilogue("bytes", 3)), *c.geometry)  # modules are loaded before a capture
    quantize(x.float(), 1.0, 0)
    epilogue = moved(b.epilogue("bytes", 3))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OP(x, b.w, *epilogue, *c.geometry)
        again = quantize(got.float(), 1.0, 0)
    for data in (b.x, b.x.flip(2)):
        x.copy_(data)
        graph.replay()
        want = reference.adder_conv2d_int8(data.cpu(), inputs(c).w, *inputs(c).epilogue("bytes", 3), *c.geometry)
        assert_same(got, want, "graph")
        assert_same(again, want, "quantized")


def test_nothing_is_kept():
    c = case("kept", (3, 32, 9, 10), 72, 3, padding=1)
    b = on_device(inputs(c))  # contiguous: the call makes them channels_last
    epilogue = moved(b.epilogue("bytes", 3))
    before = torch.cuda.memory_allocated()
    OP(b.x, b.w, *epilogue, *c.geometry)
    assert torch.cuda.memory_allocated() == before
