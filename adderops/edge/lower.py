"""From the graph of an integer network to the layers of a program, one operation after the other.

Each node becomes a `_Symbol`: a value of the program, or what an unfinished pattern has gathered so far, such as
"value v times 1/s, rounded". The patterns are those that `adderops.quant.convert` writes. `rewrite.py` then merges
layers. What is no part of a pattern is refused by the names of the node and its layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adderops.edge.program import (
    Add,
    AdderConv,
    AdderSums,
    Bytes,
    Dequantize,
    Floats,
    Layer,
    MaxPool,
    MultiplyConv,
    Output,
    Quantize,
    Relu,
    SumPool,
    Value,
    Window,
)

_LARGEST_SUM = 2**31 - 1


@dataclass(frozen=True)
class _Symbol:
    """What a node of the graph stands for.

    Attributes:
        kind: 'value'; 'scaled' (value * factor), 'rounded', 'clamped' (to least ... most); 'cast' (bytes as floats),
            'shifted' (minus `least`); 'counted' (the sums of a pool), 'sums' and 'products' (of a multiplying layer,
            without and with its scale); 'constant'.
        value: name of the value of the program.
        factor, least, most: as above.
        shape: of the node, without the batch.
        layer: the unfinished layer of 'counted', 'sums' and 'products'.
        tensor: of a 'constant'.
    """

    kind: str
    shape: tuple[int, ...] = ()
    value: str = ""
    factor: float = 1.0
    least: int = 0
    most: int = 0
    layer: SumPool | MultiplyConv | None = None
    tensor: Tensor | None = None


class Lowering:
    """The layers of a document's graph (`adderops.quant.graph`), before any of them are merged.

    Attributes:
        values, layers: of the program; the input is a value of floats.
        symbols: of the document's names.
    """

    def __init__(self, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.values: dict[str, Value] = {}
        self.layers: list[Layer] = []
        self.symbols = {name: _Symbol("constant", tuple(t.shape), tensor=t) for name, t in tensors.items()}
        self.node: dict[str, Any] = document["input"] | {"op": "input", "layer": None}
        source = self.node
        if source["dtype"] != "float32":
            raise self._refusal(f"expected float32, got {source['dtype']}: convert with an example in float32")
        if len(source["shape"]) != 4:
            raise self._refusal(f"expected images (N, C, H, W), got {source['shape']}")
        self.input = source["name"]
        self.symbols[self.input] = self._value(self.input, tuple(source["shape"][1:]), "float32")
        for self.node in document["nodes"]:
            self.symbols[self.node["name"]] = self._lowered()
        if not isinstance(document["output"], str):
            raise ValueError("output: expected one tensor, got several: return only the logits")
        self.node = next((n for n in document["nodes"] if n["name"] == document["output"]), document["input"])
        self.node = {"op": "output", "layer": None} | self.node
        result = self._floats(self.symbols[document["output"]])
        self.output, self.shape = result.value, result.shape
        if result.value == self.input or self.values[self.output].dtype != "float32":
            raise self._refusal("expected floats that layers computed as the output: the logits, for example")

    # --- one node ---

    def _lowered(self) -> _Symbol:
        op = self.node["op"]
        handler: Callable[[], _Symbol] | None = getattr(self, f"_op_{op}", None)
        if handler is not None:
            return handler()
        hint = _HINTS.get(op, "this operation has no kernel; take it out of the network")
        raise self._refusal(f"expected an operation that C code exists for, got {op!r}: {hint}")

    def _op_adder_conv2d_int8(self) -> _Symbol:
        x, w = self._input("x"), self._tensor("w")
        if x.kind != "value" or self._dtype(x) != "uint8":
            raise self._refusal("expected bytes, as of another adder layer or quantize, as its input")
        window, groups = self._window(), self._attribute("groups")
        w, window = self._over_flat(x, w, window, groups)
        sums = AdderSums(
            x.value,
            w.contiguous(),
            self._tensor("scale"),
            self._tensor("offset"),
            window,
            groups,
            self._attribute("padding_value"),
        )
        if 255 * w[0].numel() > _LARGEST_SUM:
            raise self._refusal(f"expected sums below 2^31, got {w[0].numel()} terms")
        relu, least, most = self._attribute("relu"), self._attribute("zero_point"), self._attribute("quant_max")
        output: Output = Bytes(least if relu else 0, most) if self._attribute("quantize") else Floats(relu)
        residual, factor = None, 1.0
        if self.node["inputs"].get("residual") is not None:
            other, factor = self._input("residual"), self._attribute("residual_scale")
            if other.kind not in ("value", "products"):
                raise self._refusal("expected a layer's bytes or floats as its residual")
            residual = self._materialized(other).value
        y = self._own_value("uint8" if isinstance(output, Bytes) else "float32")
        self._check_range(sums, output)
        self._add(AdderConv(self._layer(), y.value, sums, output, residual, None, factor))
        return y

    def _op_conv2d(self) -> _Symbol:
        return self._multiply(self._tensor("weight"), self._window(), self._attribute("groups"))

    def _op_linear(self) -> _Symbol:
        weight = self._tensor("weight")
        return self._multiply(weight[:, :, None, None], Window((1, 1)), 1)

    def _multiply(self, weight: Tensor, window: Window, groups: int) -> _Symbol:
        x = self._input("input")
        if self.node["inputs"].get("bias") is not None or x.kind != "clamped" or weight.dtype != torch.int8:
            raise self._refusal("computes in floats: calibrate with Scheme(ends='int8') and inputs for this layer")
        if x.least > 0 or x.most - x.least > 255:
            raise self._refusal(f"expected inputs of 8 bits, got {x.least} to {x.most}")
        weight, window = self._over_flat(x, weight, window, groups)
        largest = int(weight.int().abs().flatten(1).sum(1).max()) * max(-x.least, x.most)
        if largest > _LARGEST_SUM:
            raise self._refusal(f"expected sums below 2^31, got up to {largest}")
        bytes_ = self._quantized(x)
        ones = torch.ones(len(weight))
        layer = MultiplyConv(
            self._layer(), self.node["name"], bytes_, weight, ones, None, window, groups, -x.least, Floats()
        )
        return _Symbol("sums", self._shape(), layer=layer)

    def _op_quantize(self) -> _Symbol:
        x, scale = self._input("x"), self._attribute("scale")
        zero_point, most = self._attribute("zero_point"), self._attribute("quant_max")
        return self._on_grid(x, float(np.float32(1 / scale)), Bytes(0, most, None, zero_point))

    def _op_mul(self) -> _Symbol:
        x, factor = self._input("input"), self.node["attributes"].get("other")
        if factor is not None:
            number = float(np.float32(factor))
            if x.kind == "shifted":
                floats = self._own_value("float32")
                self._add(Dequantize(self._layer(), floats.value, x.value, number, x.least))
                return floats
            if x.kind == "counted" and isinstance(x.layer, SumPool):
                return replace(x, kind="scaled", layer=replace(x.layer, factor=number), shape=self._shape())
            x = self._floats(x)
            return replace(x, kind="scaled", factor=number, shape=self._shape())
        other = self.symbols[self.node["inputs"]["other"]]
        if x.kind == "sums" and isinstance(x.layer, MultiplyConv) and other.tensor is not None:
            scale = self._channels(other.tensor, len(x.layer.weight))
            return replace(x, kind="products", layer=replace(x.layer, scale=scale, y=self.node["name"]))
        raise self._refusal("expected the product of an integer sum and its scale, or of a value and a number")

    def _op_add(self) -> _Symbol:
        if self.node["attributes"].get("alpha", 1) != 1 or "other" in self.node["attributes"]:
            raise self._refusal("expected the sum of two layers' outputs")
        x, other = self._input("input"), self._input("other")
        if other.kind == "constant" and other.tensor is not None:
            if x.kind != "products" or not isinstance(x.layer, MultiplyConv) or x.layer.bias is not None:
                raise self._refusal("expected a constant to be the bias of a layer")
            bias = self._channels(other.tensor, len(x.layer.weight))
            return replace(x, layer=replace(x.layer, bias=bias, y=self.node["name"]))
        x, other = self._floats(x), self._floats(other)
        if x.shape != other.shape or self._size(x) != self._size(other):
            raise self._refusal(f"expected two values of one shape, got {x.shape} and {other.shape}")
        y = self._like(x, "float32")
        self._add(Add(self._layer(), y.value, x.value, other.value))
        return y

    def _op_relu(self) -> _Symbol:
        x = self._floats(self._input("input"))
        y = self._like(x, "float32")
        self._add(Relu(self._layer(), y.value, x.value))
        return y

    def _op_round(self) -> _Symbol:
        x = self._input("input")
        if x.kind != "scaled":
            raise self._refusal("expected a value divided by the step of a grid")
        return replace(x, kind="rounded", shape=self._shape())

    def _op_clamp(self) -> _Symbol:
        x = self._input("input")
        least, most = (self.node["attributes"].get(name) for name in ("min", "max"))
        if x.kind != "rounded" or not all(isinstance(bound, int) for bound in (least, most)):
            raise self._refusal("expected integers, rounded by the grid of a layer")
        return replace(x, kind="clamped", least=least, most=most, shape=self._shape())

    def _op_sum(self) -> _Symbol:
        x = self._input("input")
        dims = sorted(d % 4 for d in self._attribute("dim"))
        if dims != [2, 3] or len(x.shape) != 3:
            raise self._refusal("expected a sum over height and width")
        return self._summed(x, Window(x.shape[1:], x.shape[1:]))

    def _op_avg_pool2d(self) -> _Symbol:
        x, given = self._input("input"), self.node["attributes"]
        if x.kind != "clamped" or given.get("divisor_override") != 1:
            raise self._refusal(_POOL_HINT)
        kernel, stride = _two(given["kernel_size"]), _two(given["stride"])
        vertical, horizontal = _two(given.get("padding", 0))
        if given.get("ceil_mode"):
            raise self._refusal("expected ceil_mode=False")
        return self._summed(x, Window(kernel, stride, (vertical, vertical, horizontal, horizontal)))

    def _summed(self, x: _Symbol, window: Window) -> _Symbol:
        if x.kind != "clamped" or x.least != -x.most or x.layer is not None:
            raise self._refusal(_POOL_HINT)
        source = self.values[x.value]
        if x.shape != (source.channels, source.height, source.width):
            raise self._refusal("expected images (N, C, H, W) as its input")
        layer = SumPool(self._layer(), self.node["name"], x.value, window, x.factor, x.most, 1.0, Floats())
        return _Symbol("counted", self._shape(), layer=layer)

    def _op_max_pool2d(self) -> _Symbol:
        x, given = self._materialized(self._input("input")), self.node["attributes"]
        if x.kind != "value" or len(x.shape) != 3 or self._is_flat(x):
            raise self._refusal("expected a layer's output (N, C, H, W) as its input")
        kernel, stride, dilation = _two(given["kernel_size"]), _two(given["stride"]), _two(given.get("dilation", 1))
        vertical, horizontal = _two(given.get("padding", 0))
        y = self._own_value(self._dtype(x))
        window = Window(kernel, stride, (vertical, vertical, horizontal, horizontal), dilation)
        made, source = self.values[y.value], self.values[x.value]
        # with ceil_mode, the windows at the end reach further
        bottom = max(0, (made.height - 1) * stride[0] + window.span[0] - source.height - vertical)
        right = max(0, (made.width - 1) * stride[1] + window.span[1] - source.width - horizontal)
        if window.output(source.height, source.width) != (made.height, made.width):
            window = replace(window, padding=(vertical, bottom, horizontal, right))
        self._add(MaxPool(self._layer(), y.value, x.value, window))
        return y

    def _op_to(self) -> _Symbol:
        x, dtype = self._input("input"), self._attribute("dtype")
        if x.kind == "constant" and dtype in ("float32", "float64"):
            return x
        if x.kind == "value" and self._dtype(x) == "uint8" and dtype == "float32":
            return replace(x, kind="cast", shape=self._shape())
        if (x.kind == "clamped" and dtype in ("float32", "float64")) or (x.kind == "sums" and dtype == "float32"):
            return replace(x, shape=self._shape())
        if x.kind == "value" and self._dtype(x) == dtype:
            return x
        hint = f"; after filter groups, {_GROUPS_HINT}" if dtype == "int64" else ""
        raise self._refusal(f"expected a conversion that changes no value, got one to {dtype}{hint}")

    def _op_sub(self) -> _Symbol:
        x, zero_point = self._input("input"), self.node["attributes"].get("other")
        if x.kind != "cast" or not isinstance(zero_point, int):
            raise self._refusal("expected bytes minus their zero point")
        return replace(x, kind="shifted", least=zero_point, shape=self._shape())

    def _reshaped(self) -> _Symbol:
        x, shape = self._input("input"), self._shape()
        if x.kind == "constant":
            raise self._refusal("expected the output of a layer")
        whole = (math.prod(x.shape), 1, 1)
        if shape != x.shape and (*shape, 1, 1)[:3] != whole:
            raise self._refusal(f"expected the same shape or (N, C), got {x.shape} to {shape}: only flatten is known")
        if x.kind in ("sums", "products"):
            x = self._materialized(x)
        return replace(x, shape=shape)

    _op_reshape = _op_squeeze = _op_squeeze_dim = _op_unsqueeze = _reshaped
    _op_contiguous = _op_clone = _reshaped

    # --- symbols ---

    def _input(self, name: str) -> _Symbol:
        given = self.node["inputs"].get(name)
        if not isinstance(given, str):
            raise self._refusal(f"expected a tensor as {name}")
        return self.symbols[given]

    def _tensor(self, name: str) -> Tensor:
        symbol = self._input(name)
        if symbol.tensor is None:
            raise self._refusal(f"expected a constant as {name}")
        return symbol.tensor.contiguous()

    def _materialized(self, x: _Symbol) -> _Symbol:
        """Returns a symbol as a value; an unfinished layer writes floats."""
        if x.kind == "products" and x.layer is not None:
            if x.layer.y not in self.values:
                weight = x.layer.weight if isinstance(x.layer, MultiplyConv) else None
                assert weight is not None
                made = self._value(x.layer.y, _three(x.shape), "float32")
                self._add(x.layer)
                return replace(made, shape=x.shape)
            return _Symbol("value", x.shape, x.layer.y)
        return x

    def _floats(self, x: _Symbol) -> _Symbol:
        x = self._materialized(x)
        if x.kind != "value" or self._dtype(x) != "float32":
            raise self._refusal("expected the floats of a layer as its input")
        return x

    def _on_grid(self, x: _Symbol, inverse: float, output: Bytes) -> _Symbol:
        """Adds round(x * inverse) + zero_point, of a value or of the sums of a pool."""
        if x.kind == "counted" and isinstance(x.layer, SumPool):
            y = self._own_value("uint8")
            rounding = replace(output, inverse=1.0)
            self._add(replace(x.layer, y=y.value, factor=inverse, output=rounding))
            return y
        x = self._floats(x)
        y = self._like(x, "uint8")
        self._add(Quantize(self._layer(), y.value, x.value, replace(output, inverse=inverse)))
        return y

    def _quantized(self, x: _Symbol) -> str:
        """Adds the bytes of clamped integers, plus their zero point; returns their name."""
        output = Bytes(0, x.most - x.least, x.factor, -x.least)
        name = f"{self.node['name']}_input"
        if isinstance(x.layer, SumPool):
            size = x.layer.window.output(*self._source_size(x.layer.x))
            self.values[name] = Value(name, *size, self.values[x.layer.x].channels, "uint8")
            self._add(replace(x.layer, y=name, output=replace(output, inverse=1.0)))
        else:
            source = self.values[x.value]
            self.values[name] = replace(source, name=name, dtype="uint8")
            self._add(Quantize(self._layer(), name, x.value, output))
        return name

    def _like(self, x: _Symbol, dtype: str) -> _Symbol:
        """Returns a new value of the size of another, in the shape of the node."""
        name = self.node["name"]
        self.values[name] = replace(self.values[x.value], name=name, dtype=dtype)
        return _Symbol("value", self._shape(), name)

    def _own_value(self, dtype: str) -> _Symbol:
        return self._value(self.node["name"], self._shape(), dtype)

    def _value(self, name: str, shape: tuple[int, ...], dtype: str) -> _Symbol:
        channels, height, width = _three(shape)
        self.values[name] = Value(name, height, width, channels, dtype)
        return _Symbol("value", shape, name)

    def _add(self, layer: Layer) -> None:
        self.layers.append(layer)

    def _over_flat(self, x: _Symbol, weight: Tensor, window: Window, groups: int) -> tuple[Tensor, Window]:
        """Returns weights and window over the value itself: for x flattened from (C, H, W), an H x W kernel."""
        size = self._size(x)
        if x.shape == size or (x.layer is None and size[1:] == (1, 1)) or x.layer is not None:
            return weight, window
        if window != Window((1, 1)) or groups != 1:
            raise self._refusal("expected a linear layer or an ungrouped 1x1 kernel after flatten")
        return weight.reshape(len(weight), *size), Window(size[1:])

    def _is_flat(self, x: _Symbol) -> bool:
        return _three(x.shape) != self._size(x)

    def _size(self, x: _Symbol) -> tuple[int, int, int]:
        """Returns (C, H, W) of the value of a symbol."""
        if isinstance(x.layer, SumPool):
            return (self.values[x.layer.x].channels, *x.layer.window.output(*self._source_size(x.layer.x)))
        value = self.values[x.value]
        return value.channels, value.height, value.width

    def _source_size(self, name: str) -> tuple[int, int]:
        return self.values[name].height, self.values[name].width

    # --- attributes of the node ---

    def _window(self) -> Window:
        given = self.node["attributes"]
        weight = self.symbols[self.node["inputs"].get("w", self.node["inputs"].get("weight"))].tensor
        assert weight is not None
        padding = given["padding"]
        sides = tuple(padding) if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
        return Window(_two(weight.shape[2:]), _two(given["stride"]), sides, _two(given["dilation"]))

    def _channels(self, tensor: Tensor, channels: int) -> Tensor:
        if tensor.numel() != channels or tensor.dtype != torch.float32:
            raise self._refusal(f"expected {channels} float32, one per channel, got {tuple(tensor.shape)}")
        return tensor.flatten().contiguous()

    def _check_range(self, sums: AdderSums, output: Output) -> None:
        largest = sums.scale.double().abs() * 255 * sums.weight[0].numel() + sums.offset.double().abs()
        if not largest.max() < torch.finfo(torch.float32).max / 4:
            raise self._refusal(f"expected results that float32 holds, got up to {largest.max().item():.3g}")

    def _attribute(self, name: str) -> Any:
        return self.node["attributes"][name]

    def _dtype(self, x: _Symbol) -> str:
        return self.values[x.value].dtype

    def _shape(self) -> tuple[int, ...]:
        return tuple(self.node["shape"][1:])

    def _layer(self) -> str:
        return self.node["layer"] or ""

    def _refusal(self, text: str) -> ValueError:
        layer = f" of layer {self.node['layer']!r}" if self.node.get("layer") else ""
        return ValueError(f"node {self.node['name']!r} ({self.node['op']}){layer}: {text}")


_POOL_HINT = (
    "expected an average pool of integers that leads to a layer on a grid: calibrate with Scheme(ends='int8'), and let "
    "only one layer read the pool"
)
_GROUPS_HINT = "calibrate with Scheme(filter_groups=1)"
_HINTS = {
    "adaptive_avg_pool2d": _POOL_HINT,
    "mean": _POOL_HINT,
    "take": _GROUPS_HINT,
    "cat": f"concatenation has no kernel; after filter groups, {_GROUPS_HINT}",
    "index_select": f"channels cannot be selected; after filter groups, {_GROUPS_HINT}",
    "adder_conv2d": "this layer has not been calibrated; calibrate with inputs that reach it",
    "batch_norm": "a BatchNorm is folded into the adder layer or the first convolution before it; move it there",
    "softmax": "return the logits; their order is the same",
    "log_softmax": "return the logits; their order is the same",
    "conv2d_same": "give the padding of this convolution as numbers",
    "hardtanh": "use ReLU",
    "relu6": "use ReLU",
}


def _two(value: Any) -> tuple[int, int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values[0], values[-1]


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    channels, height, width = (*shape, 1, 1)[:3]
    return channels, height, width
