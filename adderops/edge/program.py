"""An integer network as a program for one image: layers with literal sizes and constants, as data.

`interpreter.py` defines what they compute. A program has values (activations: H x W x C of bytes or floats) and layers
in the order of computation. Each layer writes one value; it reads earlier ones by name. In tensors the dimensions are
in PyTorch's order, (N, C, H, W); C has one image, as (H, W, C).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

BYTES_OF = {"uint8": 1, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Value:
    """An activation of one image.

    Attributes:
        name: as in the graph of the integer network.
        height, width, channels: its shape.
        dtype: 'uint8', 'float32', or 'int32' (counts before a pool, without floats).
    """

    name: str
    height: int
    width: int
    channels: int
    dtype: str

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return self.height * self.width * self.channels * BYTES_OF[self.dtype]

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels} {self.dtype}"


@dataclass(frozen=True)
class Window:
    """Where the kernel of a layer lies: `padding` is (top, bottom, left, right), other pairs are (height, width)."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns that one window covers."""
        return self.dilation[0] * (self.kernel[0] - 1) + 1, self.dilation[1] * (self.kernel[1] - 1) + 1

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel reads the input pixel of the same place only."""
        return (self.kernel, self.stride, self.padding) == ((1, 1), (1, 1), (0, 0, 0, 0))

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Returns the size of the output for an input size."""
        (top, bottom, left, right), (rows, columns) = self.padding, self.span
        return (height + top + bottom - rows) // self.stride[0] + 1, (width + left + right - columns) // self.stride[
            1
        ] + 1

    def __str__(self) -> str:
        text = f"{self.kernel[0]}x{self.kernel[1]}"
        text += f" stride {_pair(self.stride)}" if self.stride != (1, 1) else ""
        text += f" dilation {_pair(self.dilation)}" if self.dilation != (1, 1) else ""
        return text + (f" padding {_sides(self.padding)}" if any(self.padding) else "")


@dataclass(frozen=True)
class Floats:
    """The output z itself, float32; max(z, 0) with `relu`."""

    relu: bool = False


@dataclass(frozen=True)
class Bytes:
    """The output as uint8: round(z) clamped to `least` ... `most`, ties to even.

    With `inverse` (a float32), z is first taken to the grid: round(z * inverse) + zero_point, clamped.
    A ReLU is a `least` of the zero point.
    """

    least: int
    most: int
    inverse: float | None = None
    zero_point: int = 0


@dataclass(frozen=True)
class Counts:
    """The output on the fine grid of an average pool: u = clamp(round(z * inverse), -bound, bound), int32.

    `relu` clamps to 0 ... bound. With `total`, the output is one pixel, the sum of u over all pixels.
    """

    inverse: float
    bound: int
    relu: bool = False
    total: bool = False


Output = Floats | Bytes | Counts


@dataclass(frozen=True, eq=False)
class AdderSums:
    """z[co] = offset[co] + scale[co] * Y[co], Y = - sum |x - w| over the window, in float32.

    Attributes:
        x: name of the input, bytes.
        weight: uint8, (C_out, C_in/groups, KH, KW).
        scale, offset: float32, (C_out).
        window, groups: geometry.
        padding_value: byte that stands for what lies outside of the input.
    """

    x: str
    weight: Tensor
    scale: Tensor
    offset: Tensor
    window: Window
    groups: int
    padding_value: int

    def terms(self, height: int, width: int) -> int:
        """Returns the number of |x - w| for an output of this size."""
        return self.weight.numel() * height * width


@dataclass(frozen=True, eq=False)
class Layer(ABC):
    """Base of the layers.

    Attributes:
        name: of the module in the original network, for messages and comments; '' for operations without one.
        y: name of the value that it writes.
    """

    name: str
    y: str

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]:
        """Names of the values that it reads."""

    @abstractmethod
    def renamed(self, old: str, new: str) -> "Layer":
        """Returns the layer reading `new` wherever it read `old`."""


@dataclass(frozen=True, eq=False)
class AdderConv(Layer):
    """An adder convolution with its epilogue: output(z [+ residual_scale * R]).

    R is a value, bytes or floats, or the z of another adder convolution with the same output size, `shortcut`, which
    is computed beside the first.
    """

    sums: AdderSums
    output: Output
    residual: str | None = None
    shortcut: AdderSums | None = None
    residual_scale: float = 1.0

    @property
    def reads(self) -> tuple[str, ...]:
        names = [
            self.sums.x,
            *([self.shortcut.x] if self.shortcut else []),
            *([self.residual] if self.residual else []),
        ]
        return tuple(names)

    def renamed(self, old: str, new: str) -> "AdderConv":
        shortcut = self.shortcut and replace(self.shortcut, x=_name(self.shortcut.x, old, new))
        residual = self.residual and _name(self.residual, old, new)
        sums = replace(self.sums, x=_name(self.sums.x, old, new))
        return replace(self, sums=sums, shortcut=shortcut, residual=residual)

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads the input channel of the same number only."""
        return self.sums.groups > 1 and self.sums.groups == len(self.sums.weight) and self.sums.weight.size(1) == 1


@dataclass(frozen=True, eq=False)
class MultiplyConv(Layer):
    """An ordinary convolution or linear layer of bytes: output(scale[co] * S[co] [+ bias[co]]), float32 in this order.

    S = sum (x - zero_point) * w exactly, in int32; outside of the input, x = zero_point.

    Attributes:
        weight: int8, (C_out, C_in/groups, KH, KW).
        scale: float32, (C_out).
        bias: float32, (C_out), or None.
    """

    x: str
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    window: Window
    groups: int
    zero_point: int
    output: Output

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "MultiplyConv":
        return replace(self, x=_name(self.x, old, new))

    def terms(self, height: int, width: int) -> int:
        """Returns the number of products for an output of this size."""
        return self.weight.numel() * height * width


@dataclass(frozen=True, eq=False)
class MaxPool(Layer):
    """The largest value in each window, of bytes or floats; what lies outside of the input does not count."""

    x: str
    window: Window

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "MaxPool":
        return replace(self, x=_name(self.x, old, new))


@dataclass(frozen=True, eq=False)
class SumPool(Layer):
    """An average pool with exact sums: output(factor * sum u), u = clamp(round(x * inverse), -bound, bound).

    x are floats, or bytes that stand for step * (x - zero_point), or int32 that are u already. factor, inverse and step
    are float32.

    Attributes:
        step: (step, zero_point) of bytes, otherwise None.
    """

    x: str
    window: Window
    inverse: float
    bound: int
    factor: float
    output: Floats | Bytes
    step: tuple[float, int] | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "SumPool":
        return replace(self, x=_name(self.x, old, new))


@dataclass(frozen=True, eq=False)
class Quantize(Layer):
    """Bytes of floats: output(x)."""

    x: str
    output: Bytes

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "Quantize":
        return replace(self, x=_name(self.x, old, new))


@dataclass(frozen=True, eq=False)
class Dequantize(Layer):
    """Floats of bytes: (x - zero_point) * step, float32."""

    x: str
    step: float
    zero_point: int

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "Dequantize":
        return replace(self, x=_name(self.x, old, new))


@dataclass(frozen=True, eq=False)
class Relu(Layer):
    """max(x, 0) of floats."""

    x: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.x,)

    def renamed(self, old: str, new: str) -> "Relu":
        return replace(self, x=_name(self.x, old, new))


@dataclass(frozen=True, eq=False)
class Add(Layer):
    """a + b of floats."""

    a: str
    b: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def renamed(self, old: str, new: str) -> "Add":
        return replace(self, a=_name(self.a, old, new), b=_name(self.b, old, new))


@dataclass(frozen=True, eq=False)
class Program:
    """What is computed from one image of bytes.

    Attributes:
        values: by name.
        layers: in the order of computation.
        input: name of the bytes that the program starts from.
        first: how bytes come from the network's inputs.
        output: name of the result, floats.
        shape: of the result as the network returns it, without the batch.
        epilogue: 'float32', or 'integer' (`fixed_point.py`).
    """

    values: Mapping[str, Value]
    layers: tuple[Layer, ...]
    input: str
    first: Bytes
    output: str
    shape: tuple[int, ...]
    epilogue: str = "float32"


def _name(name: str, old: str, new: str) -> str:
    return new if name == old else name


def _pair(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _sides(sides: tuple[int, int, int, int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else ",".join(map(str, sides))
