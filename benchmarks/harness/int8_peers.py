"""The peers of the int8 adder layer: int8 convolutions of onnxruntime and torch, and whole networks."""

import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness.layers import Layer

SCALES = (0.02, 0.01, 0.5)  # of x, w and y; any values will do


class Unavailable(Exception):
    """Why a contestant cannot take part."""


def _onnxruntime():
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from None
    return onnx, onnxruntime


def _session(model: bytes, threads: int):
    _, onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # otherwise its threads keep spinning between calls and halve the speed of the next contestant
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnxruntime_layer(layer: Layer, x: Tensor, w: Tensor, threads: int) -> Callable[[], np.ndarray]:
    """QLinearConv of uint8 x and int8 w, in onnxruntime's native format (NCHW), with one scale per tensor."""
    onnx, _ = _onnxruntime()
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "x_scale": np.float32(SCALES[0]),
        "x_zero": np.uint8(0),
        "w": w.numpy(),
        "w_scale": np.float32(SCALES[1]),
        "w_zero": np.int8(0),
        "y_scale": np.float32(SCALES[2]),
        "y_zero": np.uint8(0),
    }
    names = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"]
    node = helper.make_node(
        "QLinearConv",
        names,
        ["y"],
        kernel_shape=[layer.kernel] * 2,
        pads=[layer.padding] * 4,
        strides=[layer.stride] * 2,
    )
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session, feed = _session(model.SerializeToString(), threads), {"x": x.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


def torch_layer(layer: Layer, x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """torch's own int8 convolution, channels_last, with weights packed in advance."""
    engines = torch.backends.quantized.supported_engines
    engine = next((name for name in ("x86", "onednn", "fbgemm", "qnnpack") if name in engines), None)
    if engine is None:
        raise Unavailable("this torch has no int8 engine")
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_tensor(w.float() * SCALES[1], SCALES[1], 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(weight, None, [layer.stride] * 2, [layer.padding] * 2, [1, 1], 1)
        values = (x.float() * SCALES[0]).contiguous(memory_format=torch.channels_last)
        quantized = torch.quantize_per_tensor(values, SCALES[0], 0, torch.quint8)
    return lambda: torch.ops.quantized.conv2d_relu(quantized, packed, SCALES[2], 0)


def convolution_of_integers(layer: Layer, x: Tensor, w: Tensor) -> Tensor:
    """The result expected of both, up to one step of the grid: ReLU of the exact sum, rounded to the grid of y."""
    exact = nn.functional.conv2d(x.double(), w.double(), stride=layer.stride, padding=layer.padding)
    return (exact * (SCALES[0] * SCALES[1] / SCALES[2])).round().clamp(0, 255)


def onnxruntime_network(network: nn.Module, images: Tensor, threads: int) -> Callable[[], np.ndarray]:
    """A CNN quantized by onnxruntime: integer operators, 8-bit weights with one scale per filter."""
    onnx, _ = _onnxruntime()
    try:
        import onnxscript  # noqa: F401  (torch.onnx.export needs it)
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from None

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: images.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floats, integers = Path(folder) / "floats.onnx", Path(folder) / "integers.onnx"
        torch.onnx.export(network, (images,), floats, dynamo=True, verbose=False)
        name = onnx.load(floats).graph.input[0].name
        quantize_static(
            floats,
            integers,
            Reader(name),
            quant_format=QuantFormat.QOperator,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        content = io.BytesIO(integers.read_bytes()).getvalue()
    session, feed = _session(content, threads), {name: images.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]
