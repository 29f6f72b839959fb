"""The operators in ONNX, as functions of onnxscript; importing this needs onnxscript."""

from collections.abc import Sequence
from typing import Any

from onnxscript import ir
from onnxscript import opset18 as op
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat


def adder_conv2d(
    x: TFloat,
    w: TFloat,
    bias: TFloat | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> TFloat:
    """The adder convolution as a Scan over the K terms of each output, with x as (N, groups, C_in/groups, H, W).

    y (N, groups, M, OH, OW) starts as the bias. Step k = (ci, kh, kw) subtracts |x_k - w_k|, where x_k
    (N, groups, 1, OH, OW) is the strided slice of x that begins at `begin_k`, and w_k is (groups, M, 1, 1). Unrolled
    into operators, per tap or per filter, it would be hundreds of nodes, slower and larger in memory. N, H and W may
    be dynamic.
    """
    C_out, K_in, KH, KW = w.shape
    top, bottom, left, right = padding
    dtype, dtype_of_y = x.dtype, x.dtype
    if dtype != ir.DataType.DOUBLE:  # float16 is summed in float32, as in the operator
        dtype = ir.DataType.FLOAT
        x, w, bias = (t if t is None else op.Cast(t, to=dtype) for t in (x, w, bias))

    if any(padding):
        x = op.Pad(x, _integers([0, 0, top, left, 0, 0, bottom, right]))
    image = op.Shape(x, start=2)  # (H, W)
    spans = [dilation[0] * (KH - 1) + 1, dilation[1] * (KW - 1) + 1]
    steps = op.Div(op.Sub(image, _integers(spans)), _integers(stride))  # (OH - 1, OW - 1)
    output = op.Add(steps, _integers([1, 1]))
    size = op.Concat(_integers([1]), op.Add(op.Mul(steps, _integers(stride)), _integers([1, 1])), axis=0)
    batch = op.Shape(x, start=0, end=1)
    start = op.CastLike(0.0, x) if bias is None else op.Reshape(bias, _integers([groups, -1, 1, 1]))
    y = op.Expand(start, op.Concat(batch, _integers([groups, C_out // groups]), output, axis=0))
    x = op.Reshape(x, op.Concat(_integers([0, groups, K_in]), image, axis=0))
    w = op.Transpose(op.Reshape(w, _integers([groups, C_out // groups, -1])), perm=[2, 0, 1])
    w = op.Reshape(w, _integers([0, 0, 0, 1, 1]))
    begin = [[ci, kh * dilation[0], kw * dilation[1]] for ci in range(K_in) for kh in range(KH) for kw in range(KW)]
    body = _step_k(x, size, _integers([1, *stride]), _integers([2, 3, 4]), dtype)
    y = op.Scan(y, w, _integers(begin), body=body, num_scan_inputs=2)
    y = op.Reshape(y, op.Concat(_integers([0, C_out]), output, axis=0))
    return y if dtype_of_y == dtype else op.Cast(y, to=dtype_of_y)


def _step_k(x: ir.Value, size: ir.Value, stride: ir.Value, axes: ir.Value, dtype: ir.DataType) -> ir.Graph:
    y, w_k = (ir.Value(name=name, type=ir.TensorType(dtype)) for name in ("y", "w_k"))
    begin_k = ir.Value(name="begin_k", type=ir.TensorType(ir.DataType.INT64))
    tape = ir.tape.Tape()
    end_k = tape.op("Add", [begin_k, size])
    x_k = tape.op("Slice", [x, begin_k, end_k, axes, stride])
    term = tape.op("Abs", [tape.op("Sub", [x_k, w_k])])
    y_next = tape.op("Sub", [y, term])
    return ir.Graph([y, w_k, begin_k], [y_next], nodes=tape.nodes, name="step_k")


def _integers(values: Sequence[Any]) -> ir.Value:
    return op.Constant(value=ir.tensor(values, dtype=ir.DataType.INT64))
