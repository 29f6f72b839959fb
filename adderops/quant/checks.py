"""Checks of a file's content beyond its form: arguments that the meta device does not check, and indices."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from adderops import _ops

MOST = 2**31 - 1
# Lower bounds of attributes, in every operation that has them
LEAST: dict[str, float] = dict.fromkeys(
    ("stride", "dilation", "groups", "num_groups", "kernel_size", "output_size", "step"), 1
)
LEAST |= {"padding": 0, "output_padding": 0, "scale_factors": 2**-10}


def invalid(where: str, expected: str, got: object) -> ValueError:
    """Returns the error for a document that is not as expected."""
    text = got if isinstance(got, str) else repr(got)
    return ValueError(f"{where}: expected {expected}, got {text[:100].encode('unicode_escape').decode()}")


def check(valid: bool, where: str, expected: str, got: object) -> None:
    """Raises `invalid` unless the document is valid here."""
    if not valid:
        raise invalid(where, expected, got)


def check_keys(where: str, value: Any, required: set[str], optional: frozenset[str] = frozenset()) -> None:
    """Raises ValueError unless `value` is an object that has all required keys and no unknown one."""
    check(isinstance(value, dict), where, "an object", value)
    missing, unknown = required - value.keys(), value.keys() - required - optional
    check(not missing and not unknown, where, f"the keys {', '.join(sorted(required))}", ", ".join(sorted(value)))


# --- arguments of operations, on the meta device ---


def _check_window(
    where: str, x: Tensor, w: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int
) -> None:
    check(x.dim() == 4 and w.dim() == 4 and w.numel() > 0, where, "x and w of 4 dimensions", list(w.shape))
    lengths = [len(stride), len(padding), len(dilation)]
    check(lengths == [2, 4, 2], where, "two strides, four paddings, two dilations", lengths)
    fits = w.size(0) % groups == 0 and w.size(1) * groups == x.size(1)
    check(fits, f"{where}: groups", f"a divisor that fits {list(x.shape)} and {list(w.shape)}", groups)
    for axis in range(2):
        size = x.size(2 + axis) + padding[2 * axis] + padding[2 * axis + 1]
        span = dilation[axis] * (w.size(2 + axis) - 1) + 1
        check(span <= size <= MOST, where, f"a kernel no larger than the padded input, {size}", span)


def _check_adder_int8(
    where: str,
    x: Tensor,
    w: Tensor,
    scale: Tensor | None,
    offset: Tensor | None,
    residual: Tensor | None,
    residual_scale: float,
    relu: bool,
    quantize: bool,
    zero_point: int,
    quant_max: int,
    padding_value: int,
    *geometry: Any,
) -> None:
    check((x.dtype, w.dtype) == (torch.uint8, torch.uint8), where, "bytes x and w", f"{x.dtype}, {w.dtype}")
    _check_window(where, x, w, *geometry)
    for name, value in (("scale", scale), ("offset", offset)):
        valid = value is not None and value.dtype == torch.float32 and list(value.shape) == [w.size(0)]
        check(valid, f"{where}: {name}", "float32 of shape (C_out)", value if value is None else list(value.shape))
    if residual is not None:
        check(residual.dtype in (torch.uint8, torch.float32), f"{where}: residual", "uint8 or float32", residual.dtype)
        shape = _ops.output_shape(x, w, *geometry[:3])
        check(residual.shape == shape, f"{where}: residual", f"shape {list(shape)}", list(residual.shape))
    _check_grid(where, zero_point, quant_max)
    check(0 <= padding_value <= 255, f"{where}: padding_value", "a byte", padding_value)


def _check_adder(where: str, x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> None:
    check(x.dtype == w.dtype == torch.float32, where, "float32 x and w", f"{x.dtype}, {w.dtype}")
    valid = bias is None or (bias.dtype == torch.float32 and list(bias.shape) == [w.size(0)])
    check(valid, f"{where}: bias", "float32 of shape (C_out)", bias if bias is None else list(bias.shape))
    _check_window(where, x, w, *geometry)


def _check_quantize(where: str, x: Tensor, scale: float, zero_point: int, quant_max: int) -> None:
    check(x.dim() == 4, f"{where}: x", "4 dimensions", list(x.shape))
    check(x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"{where}: x", "a float of up to 32 bits", x.dtype)
    check(2**-126 <= scale <= 2**126, f"{where}: scale", "a positive number whose inverse is one in float32", scale)
    _check_grid(where, zero_point, quant_max)


def _check_batch_norm(
    where: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    *_: Any,
) -> None:
    check(mean is not None and var is not None and not training, where, "running statistics, in evaluation", training)


def _check_convolution(where: str, x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> None:
    lengths = [len(value) for value in arguments if isinstance(value, list)]
    check(set(lengths) <= {x.dim() - 2}, where, f"lists of {x.dim() - 2} numbers", lengths)


def _check_softmax(where: str, x: Tensor, dim: int, dtype: torch.dtype | None) -> None:
    check(-x.dim() <= dim < x.dim(), f"{where}: dim", f"one of {x.dim()}", dim)


def _check_grid(where: str, zero_point: int, quant_max: int) -> None:
    check(1 <= quant_max <= 255, f"{where}: quant_max", "1 to 255", quant_max)
    check(0 <= zero_point <= quant_max, f"{where}: zero_point", f"0 to {quant_max}", zero_point)


ARGUMENTS: dict[str, Callable[..., None]] = {
    "adder_conv2d_int8": _check_adder_int8,
    "adder_conv2d": _check_adder,
    "batch_norm": _check_batch_norm,
    "conv1d": _check_convolution,
    "conv2d": _check_convolution,
    "conv2d_same": _check_convolution,
    "conv_transpose2d": _check_convolution,
    "softmax": _check_softmax,
    "log_softmax": _check_softmax,
    "quantize": _check_quantize,
}

# --- indices: `entry` is a node of the document, `before` are the nodes before it ---

_Entry = dict[str, Any]


def _check_index_select(where: str, entry: _Entry, tensors: Mapping[str, Tensor], before: list[_Entry]) -> None:
    index = tensors.get(entry["inputs"]["index"])
    if index is None or index.dtype != torch.int64:
        raise invalid(f"{where}: index", "a tensor of integers", None)
    source = next((e["shape"] for e in before if e["name"] == entry["inputs"]["input"]), None)
    dim = entry["attributes"]["dim"]
    if source is None or dim <= 0:
        raise invalid(where, "a node, and a dimension other than the batch", dim)
    valid = index.numel() > 0 and 0 <= int(index.min()) and int(index.max()) < source[dim]
    check(valid, f"{where}: index", f"0 to {source[dim] - 1}", "others")


def _check_take(where: str, entry: _Entry, tensors: Mapping[str, Tensor], before: list[_Entry]) -> None:
    """A table of 256 values, indexed by bytes."""
    table, index = tensors.get(entry["inputs"]["input"]), entry["inputs"]["index"]
    check(table is not None and table.numel() >= 256, f"{where}: input", "a table of 256 values", None)
    cast: _Entry = next((e for e in before if e["name"] == index and e["op"] == "to"), {"inputs": {}})
    read: _Entry = next((e for e in before if e["name"] == cast["inputs"].get("input")), {"dtype": None})
    check(read["dtype"] == "uint8", f"{where}: index", "bytes", read["dtype"])


INDICES = {"index_select": _check_index_select, "take": _check_take}
