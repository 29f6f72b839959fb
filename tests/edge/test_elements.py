"""The small kernels against PyTorch and the program's definition, bit for bit: pools, conversions, tables."""

import ctypes

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Case, case, random_case

from adderops.edge import interpreter, program

from .host_kernels import C_TARGET, guarded, library, unharmed
from .kernel_layers import BYTES, FLOATS, SumPool, Window, random_bytes

POINTER, FLOAT = ctypes.c_void_p, ctypes.c_float
POOL_FLOATS, POOL_BYTES, POOL_INTEGERS = range(3)
FLAGS = {"gcc": f"-std=c99 -O2 {C_TARGET}", "clang": f"-std=gnu99 -O3 -ffp-contract=fast {C_TARGET}"}
POOLS = [
    case("2x2", (1, 5, 6, 8), 5, 2, stride=2),
    case("3x3", (1, 3, 7, 9), 3, 3, stride=2, padding=1),
    case("sides", (1, 2, 6, 5), 2, (2, 3), padding=(1, 0, 0, 1)),
    case("whole", (1, 9, 4, 7), 9, (4, 7)),
    case("one", (1, 6, 1, 1), 6, 1),
]


@pytest.fixture(scope="module", params=FLAGS)
def kernels(request, tmp_path_factory):
    return library(tmp_path_factory.mktemp("elements"), request.param, FLAGS[request.param])


def call(function, x: np.ndarray, y: np.ndarray, *arguments, shift: int = 0, over: bool = False) -> np.ndarray:
    """Returns what function(x, y, *arguments) writes, like y; `shift` bytes off a word, or over x."""
    function.restype = None
    memory, inside = guarded(max(x.nbytes, y.nbytes if over else 0), shift=shift)
    inside[: x.nbytes] = x.view(np.uint8).ravel()
    y_memory, out = (memory, inside[: y.nbytes]) if over else guarded(y.nbytes, shift=shift)
    function(POINTER(inside.ctypes.data), POINTER(out.ctypes.data), *arguments)
    assert unharmed(memory, inside) and (over or unharmed(y_memory, out))
    return out.copy().view(y.dtype).reshape(y.shape)


def some_floats(n: int, seed: int = 0) -> np.ndarray:
    """Floats with halves, zeros of both signs and numbers far outside of every grid."""
    x = np.random.default_rng(seed).normal(0, 60, n).astype(np.float32)
    special = np.array([0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 254.5, 255.5, 1e9, -1e9, 3e38, -3e38, 1e-40], np.float32)
    x[: min(n, len(special))] = special[:n]
    return x


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_lookup(kernels, channels, shift):
    tables = random_bytes(1, (channels, 256))
    x = random_bytes(2, (13 * channels,))
    expected = tables[np.arange(x.size) % channels, x]
    arguments = (x.size, POINTER(tables.ctypes.data), channels)
    for over in (False, True):
        got = call(kernels.run_lookup, x, np.empty_like(x), *arguments, shift=shift, over=over)
        assert (got == expected).all()


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize("zero, least, most", [(0, 0, 255), (30, 7, 201), (128, 128, 255), (255, 0, 255)])
def test_quantize(kernels, zero, least, most, shift):
    """y is at any address; x is a float's place, and y may start there."""
    for n in (1, 3, 4, 17, 200):
        x, inverse = some_floats(n, n), np.float32(0.7 if n > 17 else 1.0)
        rounded = (torch.from_numpy(x) * torch.tensor(inverse)).round() + zero
        expected = rounded.clamp(least, most).to(torch.uint8).numpy()
        arguments = (n, FLOAT(inverse), zero, least, most)
        got = call(kernels.run_quantize, x, np.empty(n, np.uint8), *arguments, over=True)
        assert (got == expected).all()
        (memory, inside), (y_memory, y) = guarded(x.nbytes), guarded(n, shift=shift)
        inside[:] = x.view(np.uint8)
        kernels.run_quantize(POINTER(inside.ctypes.data), POINTER(y.ctypes.data), *arguments)
        assert (y == expected).all() and unharmed(y_memory, y) and (inside == x.view(np.uint8)).all()
        assert unharmed(memory, inside)


def test_dequantize(kernels):
    x, scale = np.arange(256, dtype=np.uint8), np.float32(0.0371)
    for zero in (0, 117, 255):
        expected = (torch.from_numpy(x).float() - zero) * torch.tensor(scale)
        got = call(kernels.run_dequantize, x, np.empty(256, np.float32), 256, FLOAT(scale), zero)
        assert (got.view(np.uint32) == expected.numpy().view(np.uint32)).all()


@pytest.mark.parametrize("over", [False, True])
def test_floats(kernels, over):
    for n in (1, 2, 5, 64):
        a, b = some_floats(n), some_floats(n, 1)[::-1].copy()
        got = call(kernels.run_relu_floats, a, np.empty_like(a), n, over=over)
        assert (got == torch.from_numpy(a).relu().numpy()).all()
        (memory, left), (_, right), (y_memory, y) = guarded(4 * n), guarded(4 * n), guarded(4 * n)
        left[:], right[:] = a.view(np.uint8), b.view(np.uint8)
        y_memory, y = (memory, left) if over else (y_memory, y)
        kernels.run_add_floats(*(POINTER(block.ctypes.data) for block in (left, right, y)), n)
        expected = torch.from_numpy(a) + torch.from_numpy(b)
        assert (y.view(np.float32) == expected.numpy()).all() and unharmed(y_memory, y)


def window_of(c: Case) -> Window:
    _, _, oh, ow = c.y_shape
    geometry = (c.KH, c.KW, *c.stride, *c.dilation, c.padding[0], c.padding[2])
    return Window(c.H, c.W, c.C_in, oh, ow, c.C_in, *geometry, 0)


def one(c: Case) -> Case:
    """One image, a filter for each channel."""
    return Case(**{**vars(c), "N": 1, "C_out": c.C_in, "groups": c.C_in})


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(2, 0, 1)[None]


@pytest.mark.parametrize("c", [*POOLS, *map(random_case, range(24))], ids=str)
def test_max_pool(kernels, c):
    c = one(c)
    x, (_, _, oh, ow) = random_bytes(3, (c.H, c.W, c.C_in)), c.y_shape
    top, bottom, left, right = c.padding
    padded = F.pad(nchw(x).float(), (left, right, top, bottom))
    expected = F.max_pool2d(padded, (c.KH, c.KW), c.stride, 0, c.dilation)[0].permute(1, 2, 0).numpy()
    window, y = window_of(c), np.empty((oh, ow, c.C_in), np.uint8)

    def pool(x, y):
        kernels.run_max_pool(ctypes.byref(window), x, y)

    for over in {False, top == left == 0}:
        assert (call(pool, x, y, over=over) == expected).all()


@pytest.mark.parametrize("form", [BYTES, FLOATS])
@pytest.mark.parametrize("kind", [POOL_FLOATS, POOL_BYTES, POOL_INTEGERS])
def test_sum_pool(kernels, kind, form):
    for i, c in enumerate([*POOLS, *map(random_case, range(12))]):
        c = one(c)
        if c.dilation != (1, 1):
            continue
        shape, (_, _, oh, ow) = (c.H, c.W, c.C_in), c.y_shape
        scale, zero, bound = np.float32(0.13), 61, 2000 if i % 2 else 2**22 - 1
        inverse = np.float32(5.1)
        factor = np.float32(0.9 / (c.KH * c.KW * (5.1 if kind != POOL_INTEGERS else 40)))
        if kind == POOL_BYTES:
            x = random_bytes(i, shape)
            u = (((nchw(x).float() - zero) * torch.tensor(scale)) * torch.tensor(inverse)).round()
        elif kind == POOL_FLOATS:
            x = some_floats(int(np.prod(shape)), i).clip(-1e9, 1e9).reshape(shape) * np.float32(10)
            u = (nchw(x) * torch.tensor(inverse)).round().clamp(-bound, bound)
        else:
            x = np.random.default_rng(i).integers(-9000, 9000, shape, dtype=np.int32)
            u = nchw(x).double()
        window = program.Window((c.KH, c.KW), c.stride, c.padding)
        if kind == POOL_BYTES:
            u = u.clamp(-bound, bound)
        z = interpreter.window_sums(u, window).float() * torch.tensor(factor)
        expected = z if form == FLOATS else (z.round() + 90).clamp(13, 240).to(torch.uint8)
        layer = SumPool(window_of(c), kind, form, zero, 90, 13, 240, bound, scale, inverse, factor)

        def pool(x, y, layer=layer):
            kernels.run_sum_pool(ctypes.byref(layer), x, y)

        y = np.empty((oh, ow, c.C_in), np.float32 if form == FLOATS else np.uint8)
        assert (call(pool, x, y) == expected[0].permute(1, 2, 0).numpy()).all(), c
