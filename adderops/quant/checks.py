"""What is checked of a file besides its form: arguments that operators do not check on the meta device, and indices."""

import torch

from adderops import _ops

MOST = 2**31 - 1
LEAST = dict.fromkeys(("stride", "dilation", "groups", "num_groups", "kernel_size", "output_size", "step"), 1)
LEAST |= {"padding": 0, "output_padding": 0, "scale_factors": 2**-10}  # of attributes, whatever the operation


def check(valid: bool, where: str, expected: str, got: object) -> None:
    """Raises the ValueError of a document that is not as expected."""
    if not valid:
        text = got if isinstance(got, str) else repr(got)
        raise ValueError(f"{where}: expected {expected}, got {text[:100].encode('unicode_escape').decode()}")


def check_keys(where: str, value: object, required: set[str], optional: frozenset[str] = frozenset()) -> None:
    check(isinstance(value, dict), where, "an object", value)
    missing, unknown = required - value.keys(), value.keys() - required - optional
    check(not missing and not unknown, where, f"the keys {', '.join(sorted(required))}", ", ".join(sorted(value)))


def _check_window(where, x, w, stride, padding, dilation, groups) -> None:
    check(x.dim() == 4 and w.dim() == 4 and w.numel() > 0, where, "x and w of 4 dimensions", list(w.shape))
    lengths = [len(stride), len(padding), len(dilation)]
    check(lengths == [2, 4, 2], where, "two strides, four paddings, two dilations", lengths)
    fits = w.size(0) % groups == 0 and w.size(1) * groups == x.size(1)
    check(fits, f"{where}: groups", f"a divisor that fits {list(x.shape)} and {list(w.shape)}", groups)
    for axis in range(2):
        size = x.size(2 + axis) + padding[2 * axis] + padding[2 * axis + 1]
        span = dilation[axis] * (w.size(2 + axis) - 1) + 1
        check(span <= size <= MOST, where, f"a kernel no larger than the padded input, {size}", span)


def _check_adder_int8(where, x, w, scale, offset, residual, r, relu, quantize, zero_point, most, outside, *geometry):
    check((x.dtype, w.dtype) == (torch.uint8, torch.uint8), where, "bytes x and w", f"{x.dtype}, {w.dtype}")
    _check_window(where, x, w, *geometry)
    for name, value in (("scale", scale), ("offset", offset)):
        valid = value is not None and value.dtype == torch.float32 and list(value.shape) == [w.size(0)]
        check(valid, f"{where}: {name}", "float32 of shape (C_out)", value if value is None else list(value.shape))
    if residual is not None:
        check(residual.dtype in (torch.uint8, torch.float32), f"{where}: residual", "uint8 or float32", residual.dtype)
        shape = _ops.output_shape(x, w, *geometry[:3])
        check(residual.shape == shape, f"{where}: residual", f"shape {list(shape)}", list(residual.shape))
    _check_grid(where, zero_point, most)
    check(0 <= outside <= 255, f"{where}: padding_value", "a byte", outside)


def _check_adder(where, x, w, bias, *geometry) -> None:
    check(x.dtype == w.dtype == torch.float32, where, "float32 x and w", f"{x.dtype}, {w.dtype}")
    valid = bias is None or (bias.dtype == torch.float32 and list(bias.shape) == [w.size(0)])
    check(valid, f"{where}: bias", "float32 of shape (C_out)", bias if bias is None else list(bias.shape))
    _check_window(where, x, w, *geometry)


def _check_quantize(where, x, scale, zero_point, most) -> None:
    check(x.dim() == 4, f"{where}: x", "4 dimensions", list(x.shape))
    check(x.dtype in (torch.float32, torch.bfloat16, torch.float16), f"{where}: x", "a float of up to 32 bits", x.dtype)
    check(2**-126 <= scale <= 2**126, f"{where}: scale", "a positive number whose inverse is one in float32", scale)
    _check_grid(where, zero_point, most)


def _check_batch_norm(where, x, weight, bias, mean, var, training, *_) -> None:
    check(mean is not None and var is not None and not training, where, "running statistics, in evaluation", training)


def _check_convolution(where, x, weight, bias, *arguments) -> None:
    lengths = [len(value) for value in arguments if isinstance(value, list)]
    check(set(lengths) <= {x.dim() - 2}, where, f"lists of {x.dim() - 2} numbers", lengths)


def _check_softmax(where, x, dim, dtype) -> None:
    check(-x.dim() <= dim < x.dim(), f"{where}: dim", f"one of {x.dim()}", dim)


def _check_grid(where, zero_point, most) -> None:
    check(1 <= most <= 255, f"{where}: quant_max", "1 to 255", most)
    check(0 <= zero_point <= most, f"{where}: zero_point", f"0 to {most}", zero_point)


ARGUMENTS = {
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


def _check_index_select(where, entry, tensors, before, made) -> None:
    index = tensors.get(entry["inputs"]["index"])
    check(index is not None and index.dtype == torch.int64, f"{where}: index", "a tensor of integers", None)
    source = next((e["shape"] for e in before if e["name"] == entry["inputs"]["input"]), None)
    dim = entry["attributes"]["dim"]
    check(dim > 0 and source is not None, where, "a node, and a dimension other than the batch", dim)
    valid = index.numel() > 0 and 0 <= int(index.min()) and int(index.max()) < source[dim]
    check(valid, f"{where}: index", f"0 to {source[dim] - 1}", "others")


def _check_take(where, entry, tensors, before, made) -> None:
    """A table of 256 that bytes look up."""
    table, index = tensors.get(entry["inputs"]["input"]), entry["inputs"]["index"]
    check(table is not None and table.numel() >= 256, f"{where}: input", "a table of 256 values", None)
    cast = next((e for e in before if e["name"] == index and e["op"] == "to"), {"inputs": {}})
    read = next((e for e in before if e["name"] == cast["inputs"].get("input")), {"dtype": None})
    check(read["dtype"] == "uint8", f"{where}: index", "bytes", read["dtype"])


INDICES = {"index_select": _check_index_select, "take": _check_take}
