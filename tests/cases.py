"""The convolutions under test: geometries by name, data, memory layouts, and the two ways to compute them.

The letters of the project: Y = -sum over K = C_in/groups*KH*KW of |x - w|, P = N*OH*OW output pixels.
"""

import random
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import torch

from adderops import reference

PASSES = ("forward", "grad_x", "grad_w")


@dataclass(frozen=True)
class Case:
    """One geometry. `padding` is (top, bottom, left, right)."""

    name: str
    N: int
    C_in: int
    H: int
    W: int
    C_out: int
    KH: int
    KW: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def geometry(self) -> tuple:
        return list(self.stride), list(self.padding), list(self.dilation), self.groups

    @property
    def x_shape(self) -> tuple[int, ...]:
        return self.N, self.C_in, self.H, self.W

    @property
    def w_shape(self) -> tuple[int, ...]:
        return self.C_out, self.C_in // self.groups, self.KH, self.KW

    @property
    def y_shape(self) -> tuple[int, ...]:
        top, bottom, left, right = self.padding
        oh = (self.H + top + bottom - self.dilation[0] * (self.KH - 1) - 1) // self.stride[0] + 1
        ow = (self.W + left + right - self.dilation[1] * (self.KW - 1) - 1) // self.stride[1] + 1
        return self.N, self.C_out, oh, ow

    @property
    def terms(self) -> dict[str, int]:
        """The number of terms in the longest sum of each pass."""
        n, _, oh, ow = self.y_shape
        return {
            "forward": self.C_in // self.groups * self.KH * self.KW,
            "grad_x": self.C_out // self.groups * self.KH * self.KW,
            "grad_w": n * oh * ow,
        }

    def __str__(self) -> str:
        return self.name


def case(name: str, x: tuple, out: int, k=1, stride=1, padding=0, dilation=1, groups=1) -> Case:
    """Shorthand: scalars become pairs; one padding number pads all four sides, two pad (height, width)."""

    def pair(v):
        return (v, v) if isinstance(v, int) else tuple(v)

    padding = pair(padding)
    if len(padding) == 2:
        padding = (padding[0], padding[0], padding[1], padding[1])
    return Case(name, *x, out, *pair(k), pair(stride), padding, pair(dilation), groups)


# Sizes around vectors of 4, 8 and 16 lanes and tiles up to 64: 1, w-1, w, w+1, 2w+1, and odd sizes in between.
EDGES = (1, 3, 4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 129, 130)

CHANNEL_CASES = [
    *(case(f"out{c}", (2, 3, 4, 5), c, 2) for c in EDGES),
    *(case(f"in{c}", (2, c, 4, 5), 5, 2) for c in EDGES),
    *(case(f"both{c}", (1, c, 3, 3), c, 3, padding=1) for c in (16, 17, 32, 33, 48, 65)),
]

PIXEL_CASES = [
    *(case(f"row{p}", (1, 5, 1, p), 9, 1) for p in range(1, 14)),
    *(case(f"row{p}-k3", (1, 6, 2, p), 33, 3, padding=1) for p in range(1, 14)),
    *(case(f"column{p}", (1, 17, p, 1), 16, (3, 1), padding=(1, 0)) for p in (1, 2, 5, 6, 7, 8, 9, 13, 17)),
    *(case(f"row{p}-out{c}", (1, 33, 1, p), c, 1) for p in range(1, 22) for c in (48, 64)),
    *(case(f"square{p}-s2", (2, 8, p, p), 17, 3, stride=2, padding=1) for p in (2, 3, 5, 7, 9, 13)),
]

# Sum lengths around blocks of 192 and 256 terms, and several blocks.
DEPTH_CASES = [
    *(case(f"depth{k}", (1, k, 2, 4), 18, 1) for k in (191, 192, 193, 255, 256, 257, 400, 512, 520, 1024)),
    case("depth576", (1, 64, 3, 4), 18, 3, padding=1),
    case("depth1161-k3", (1, 129, 3, 4), 7, 3, padding=1),
    case("depth612-k6", (1, 17, 7, 9), 20, 6, padding=2),
]

# Several rows of tasks: images cut into bands, and several images in one band.
BAND_CASES = [
    case("bands-tall", (2, 16, 70, 40), 24, 3, padding=1),
    case("bands-wide", (1, 6, 9, 700), 4, 3, padding=1),
    case("bands-stride2", (1, 16, 67, 67), 5, 3, stride=2, padding=1),
    case("bands-columns", (1, 520, 2, 530), 3, (2, 3), padding=(1, 2), dilation=(1, 2)),
    case("bands-columns-s2", (1, 520, 3, 540), 3, (3, 2), stride=2, padding=(1, 0)),
    case("bands-columns-out", (1, 8, 2, 480), 440, 2, padding=(0, 1)),
    case("bands-columns-depthwise", (1, 33, 2, 1100), 33, 3, padding=1, groups=33),
    case("bands-columns-depthwise-s2", (2, 5, 3, 2300), 10, 3, stride=2, padding=1, groups=5),
    case("bands-images", (21, 12, 5, 6), 6, 3, padding=1),
    case("bands-many-images", (67, 2, 3, 3), 3, 2),
    case("bands-of-one-image", (18, 256, 16, 16), 2, 1),
    case("bands-without-padding", (3, 32, 50, 44), 8, 3),
    case("bands-dilated", (2, 24, 45, 41), 3, 3, padding=3, dilation=3),
]

# Shapes that break other implementations of this operator: K not a multiple of 16, odd batches, stride 2 and 3, groups.
PEER_CASES = [
    case("K27", (2, 3, 8, 8), 16, 3, padding=1),
    case("K147", (1, 3, 15, 15), 16, 7, stride=2, padding=3),
    *(case(f"batch{n}", (n, 4, 5, 5), 6, 3, padding=1) for n in (3, 5, 6, 7)),
    *(case(f"batch{n}-s2", (n, 4, 6, 7), 6, 3, stride=2, padding=1) for n in (3, 5, 6, 7)),
    *(case(f"stride{s}-k{k}", (2, 5, 11, 12), 7, k, stride=s, padding=k // 2) for s in (2, 3) for k in (1, 2, 3, 5)),
    *(case(f"groups{g}", (2, 8, 6, 5), 16, 3, padding=1, groups=g) for g in (1, 2, 4, 8)),
    *(
        case(f"groups{g}-in{c}-out{o}", (1, c, 5, 6), o, 3, groups=g)
        for g, c, o in ((2, 34, 66), (3, 51, 9), (4, 4, 68))
    ),
    *(
        case(f"depthwise{c}x{m}", (2, c, 7, 6), c * m, 3, padding=1, groups=c)
        for c in (1, 5, 17, 32)
        for m in (1, 2, 3)
    ),
    *(
        case(f"depthwise{c}", (2, c, 5, 4), c, (2, 3), padding=(0, 1), groups=c)
        for c in (4, 15, 16, 31, 48, 64, 65, 130)
    ),
    case("depthwise65x2", (1, 65, 4, 5), 130, 3, groups=65),
    case("depthwise-s2", (2, 20, 9, 9), 20, 3, stride=2, padding=1, groups=20),
    case("depthwise-bands", (1, 64, 40, 33), 64, 3, stride=(2, 1), padding=1, groups=64),
    case("depthwise-images", (70, 9, 6, 6), 9, 3, padding=1, groups=9),
]

GEOMETRY_CASES = [
    case("k1x3", (2, 5, 6, 9), 7, (1, 3), padding=(0, 1)),
    case("k3x1", (2, 5, 9, 6), 7, (3, 1), padding=(1, 0)),
    case("k2x5", (1, 6, 7, 11), 18, (2, 5)),
    case("k5x2-s2x1", (1, 6, 11, 7), 18, (5, 2), stride=(2, 1), padding=(2, 1)),
    case("stride1x3", (2, 4, 7, 13), 5, 3, stride=(1, 3), padding=1),
    case("stride3x2-dilated", (1, 5, 14, 15), 6, 3, stride=(3, 2), padding=(2, 3), dilation=(2, 3)),
    case("dilation2", (2, 6, 9, 9), 9, 3, padding=2, dilation=2),
    case("dilation2x3", (1, 5, 10, 12), 6, (3, 2), dilation=(2, 3)),
    case("dilation-s2", (1, 8, 11, 13), 8, 3, stride=2, padding=2, dilation=2),
    case("padding0123", (2, 5, 6, 7), 6, 3, padding=(0, 1, 2, 3)),
    case("padding3210-s2", (2, 5, 6, 7), 6, 4, stride=2, padding=(3, 2, 1, 0)),
    case("padding-left", (1, 3, 4, 5), 4, (2, 3), padding=(0, 0, 2, 0)),
    case("padding-bottom", (1, 3, 4, 5), 4, (3, 2), padding=(0, 2, 0, 0)),
    case("padding-beyond-kernel", (1, 3, 3, 3), 5, 2, padding=4),
    case("padding-1x1", (2, 6, 3, 4), 17, 1, padding=1),
    case("stride-beyond-kernel", (2, 5, 11, 13), 6, 2, stride=(3, 5)),
    case("stride-beyond-kernel-1x1", (2, 5, 9, 10), 6, 1, stride=(3, 4)),
    case("stride-beyond-input", (2, 5, 4, 4), 6, 3, stride=7, padding=1),
    case("stride-skips-border", (1, 4, 8, 10), 5, 3, stride=(4, 4)),
    case("kernel-is-input", (3, 6, 5, 4), 10, (5, 4)),
    case("kernel-is-padded-input", (2, 6, 3, 2), 10, (5, 6), padding=(1, 2)),
    case("no-padding", (2, 32, 6, 7), 40, 3),
    case("no-padding-s2", (2, 48, 7, 8), 24, 3, stride=2),
    case("no-padding-groups", (2, 64, 5, 6), 48, 3, groups=2),
    case("one-element", (1, 1, 1, 1), 1, 1),
    case("1x1-s2", (2, 17, 8, 7), 33, 1, stride=2),
    case("1x1-s3x2", (2, 16, 7, 9), 16, 1, stride=(3, 2)),
    case("1x1-s2-groups", (2, 12, 7, 7), 20, 1, stride=2, groups=4),
    case("pixel", (4, 30, 1, 1), 40, 1),
    case("pixel-k3", (4, 10, 1, 1), 12, 3, padding=1),
]

# Real layers with a small batch, and fewer output channels where the reference would be slow.
LAYER_CASES = [
    case("resnet20-16", (1, 16, 32, 32), 16, 3, padding=1),
    case("resnet20-32-s2", (1, 16, 32, 32), 32, 3, stride=2, padding=1),
    case("resnet20-64", (2, 64, 8, 8), 64, 3, padding=1),
    case("resnet18-512", (1, 512, 7, 7), 24, 3, padding=1),
    case("resnet18-512-out", (1, 12, 7, 7), 512, 3, padding=1),
    case("resnet50-1x1", (1, 256, 14, 14), 64, 1),
    case("resnet50-1x1-s2", (1, 256, 14, 14), 130, 1, stride=2),
    case("lenet5", (3, 6, 14, 14), 16, 5),
]

# Windows that cover mostly padding, each with a small geometry of the same sums: the same taps of the same outputs see
# the same pixels, and all others see none.
FAR_CASES = [
    (case("far-pixel", (1, 1, 1, 1), 1, 3, padding=2**30, dilation=2**30), dict(padding=3, dilation=3)),
    (
        case("far-sides", (2, 3, 4, 5), 7, 3, padding=(2**15, 2**30 - 1), dilation=(2**15, 2**30 - 1)),
        dict(padding=9, dilation=9),
    ),
    (case("far-groups", (2, 6, 3, 2), 9, 3, padding=2**20, dilation=2**20, groups=3), dict(padding=8, dilation=8)),
    (case("far-depthwise", (1, 5, 3, 4), 10, 3, padding=2**30, dilation=2**30, groups=5), dict(padding=8, dilation=8)),
    (case("far-outputs", (2, 5, 1, 1), 18, 1, stride=2**30, padding=2**30), dict(stride=3, padding=3)),
    (
        case("far-outputs-depthwise", (2, 5, 1, 1), 5, 1, stride=2**30, padding=2**30, groups=5),
        dict(stride=3, padding=3),
    ),
    (
        case("far-both", (1, 4, 1, 1), 3, 3, stride=2**29, padding=2**30, dilation=2**29),
        dict(stride=2, padding=4, dilation=2),
    ),
    (
        case("far-one-side", (1, 3, 3, 3), 4, 1, stride=2**30, padding=(2**31 - 1, 0, 0, 2**31 - 1)),
        dict(stride=4, padding=(7, 0, 0, 7)),
    ),
    (
        case("far-all", (2, 64, 1, 1), 17, (2, 3), padding=(2**28 - 1, 2**28 - 2), dilation=(2**29 - 2, 2**28 - 2)),
        dict(padding=(2, 3), dilation=(4, 3)),
    ),
]


def near(far: Case, geometry: dict) -> Case:
    """The small geometry of a pair of FAR_CASES."""
    kernel = far.KH, far.KW
    found = case(f"{far.name}-near", far.x_shape, far.C_out, kernel, groups=far.groups, **geometry)
    assert found.y_shape == far.y_shape
    return found


CASES = [
    *CHANNEL_CASES,
    *PIXEL_CASES,
    *DEPTH_CASES,
    *BAND_CASES,
    *PEER_CASES,
    *GEOMETRY_CASES,
    *LAYER_CASES,
]
# A few that represent all of them in tests about something other than geometry.
SELECTED_NAMES = (
    "K27 batch5-s2 stride3-k2 groups4 depthwise17x2 k5x2-s2x1 dilation-s2 padding0123 stride-beyond-kernel "
    "kernel-is-input 1x1-s2 1x1-s3x2 no-padding no-padding-groups row13-k3 out33 in65 both17 bands-images pixel-k3 "
    "depth257"
)
SELECTED = [c for c in CASES if c.name in SELECTED_NAMES.split()]
assert len(SELECTED) == len(SELECTED_NAMES.split()) and len({c.name for c in CASES}) == len(CASES)


def random_case(seed: int) -> Case:
    """A random geometry that the operators accept, small enough for a quick reference."""
    r = random.Random(seed)
    groups = r.choice((1, 1, 1, 2, 3, 5))
    channels, filters = r.choice((1, 2, 3, 4, 7, 8, 12, 16, 19, 33)), r.choice((1, 2, 3, 5, 8, 13, 16, 18, 35))
    kernel = r.randint(1, 4), r.randint(1, 4)
    padding = tuple(r.choice((0, 0, 1, 2, 5)) for _ in range(4))
    dilation = r.choice((1, 1, 2, 3)), r.choice((1, 1, 2, 3))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    least = [max(1, spans[0] - sum(padding[:2])), max(1, spans[1] - sum(padding[2:]))]
    size = [low + r.choice((0, 1, 2, 3, 5, 8)) for low in least]
    x = (r.choice((1, 1, 2, 3, 5)), groups * channels, *size)
    stride = r.choice((1, 1, 2, 3, 4)), r.choice((1, 1, 2, 3, 4))
    return case(f"random{seed}", x, groups * filters, kernel, stride, padding, dilation, groups)


@dataclass(frozen=True)
class Inputs:
    x: torch.Tensor
    w: torch.Tensor
    grad_y: torch.Tensor
    bias: torch.Tensor

    def arranged(self, how: Callable[[torch.Tensor], torch.Tensor]) -> "Inputs":
        """The same numbers with x, w and grad_y in the memory layout `how`, such as one of FORMATS or VIEWS."""
        return replace(self, x=how(self.x), w=how(self.w), grad_y=how(self.grad_y))

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Inputs":
        return Inputs(*(t.to(device, dtype) for t in (self.x, self.w, self.grad_y, self.bias)))


def generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(case.name.encode()))


@cache
def exact_inputs(case: Case, offset: int = 0) -> Inputs:
    """Small multiples of 1/4: no sum of any pass rounds in float32, and every dtype represents the inputs exactly.

    x - w is a multiple of 1/4 in [-4, 4], so that its clamp takes inner values too; grad_y and bias are integers in
    [-4, 4].
    """
    g = generator(case)

    def draw(shape, limit):
        return torch.randint(-limit, limit + 1, shape, generator=g).double()

    x, w = draw(case.x_shape, 8) / 4 + offset, draw(case.w_shape, 8) / 4 + offset
    return Inputs(x, w, draw(case.y_shape, 4), draw((case.C_out,), 4))


def quarters(*shape: int) -> torch.Tensor:
    """Random multiples of 1/4 from -2 to 2: sums of their distances do not round."""
    return torch.randint(-8, 9, shape) / 4


def opposite_offsets(case: Case, inputs: Inputs, offset: float) -> Inputs:
    """+offset in the first half of the channels of x and w, -offset in the others: the sum of each is small."""
    channels = case.C_in // case.groups
    of_w = torch.where(torch.arange(channels) < channels // 2, offset, -offset)[:, None, None]
    return Inputs(inputs.x + of_w.repeat(case.groups, 1, 1), inputs.w + of_w, inputs.grad_y, inputs.bias)


@cache
def random_inputs(case: Case, dtype: torch.dtype, x_scale=1.0, w_scale=1.0, offset=0.0) -> Inputs:
    """Normal random numbers, rounded to `dtype`: every computation starts from the same bits."""
    g = generator(case)
    shapes = case.x_shape, case.w_shape, case.y_shape, (case.C_out,)
    x, w, grad_y, bias = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return Inputs(x * x_scale + offset, w * w_scale + offset, grad_y, bias * x_scale).to(dtype)


@contextmanager
def one_thread():
    """One thread within: for many small operations, where threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compute(name: str, case: Case, inputs: Inputs, bias: bool = True) -> torch.Tensor:
    """One pass, by the operator under test."""
    ops, i = torch.ops.adderops, inputs
    if name == "forward":
        return ops.adder_conv2d(i.x, i.w, i.bias if bias else None, *case.geometry)
    op = ops.adder_conv2d_grad_x if name == "grad_x" else ops.adder_conv2d_grad_w
    return op(i.grad_y, i.x, i.w, *case.geometry)


@one_thread()
def define(name: str, case: Case, inputs: Inputs, bias: bool = True) -> torch.Tensor:
    """One pass, by the reference definition in float64."""
    i = inputs.to(torch.float64)
    if name == "forward":
        return reference.adder_conv2d(i.x, i.w, i.bias if bias else None, *case.geometry)
    op = reference.adder_conv2d_grad_x if name == "grad_x" else reference.adder_conv2d_grad_w
    return op(i.grad_y, i.x, i.w, *case.geometry)


@cache
def exact_result(name: str, case: Case, offset: int = 0) -> torch.Tensor:
    return define(name, case, exact_inputs(case, offset))


def assert_same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    """Asserts equal values and NaN in the same places; the message locates the first difference."""
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: expected {want.dtype} {tuple(want.shape)}, got {got.dtype} {tuple(got.shape)}"
    )
    wrong = ~((got == want) | (got.isnan() & want.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {got.numel()} differ, first at {at}: "
            f"got {got[at].item()}, expected {want[at].item()}"
        )


def sliced(t: torch.Tensor) -> torch.Tensor:
    """Every second column in the interior of a larger tensor of NaN."""
    n, c, h, w = t.shape
    around = t.new_full((n + 2, c + 2, h + 2, 2 * w + 2), float("nan"))
    return around[1:-1, 1:-1, 1:-1, 1 : 1 + 2 * w : 2].copy_(t)


def channel_slice(t: torch.Tensor) -> torch.Tensor:
    """Some channels, dense in memory, of a channels_last tensor of NaN."""
    n, c, h, w = t.shape
    around = t.new_full((n, c + 5, h + 1, w + 1), float("nan")).contiguous(memory_format=torch.channels_last)
    return around[:, 3 : 3 + c, 1:, :-1].copy_(t)


def channel_stride(t: torch.Tensor) -> torch.Tensor:
    """Every second channel of a channels_last tensor of NaN."""
    n, c, h, w = t.shape
    around = t.new_full((n, 2 * c + 1, h, w), float("nan")).contiguous(memory_format=torch.channels_last)
    return around[:, 1::2].copy_(t)


FORMATS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}
VIEWS = {
    "sliced": sliced,
    "channel_slice": channel_slice,
    "channel_stride": channel_stride,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "misaligned": lambda t: torch.cat((t.new_full((1,), float("nan")), t.flatten()))[1:].view(t.shape),
}
