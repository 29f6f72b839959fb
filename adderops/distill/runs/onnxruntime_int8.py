"""CNNs in int8: the static quantization of onnxruntime, whose counterpart for adder networks is `adderops.quant`."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adderops.export import export_onnx


def quantize_cnn(cnn: nn.Module, batches: Sequence[Tensor]) -> bytes:
    """Returns the ONNX file of a CNN in int8: QDQ, weights with one scale per filter.

    Args:
        cnn: in evaluation mode.
        batches: images (N, C, H, W) for the ranges of the activations.

    Raises:
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed.
    """
    _require_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # Any without types
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter({"input": batch.numpy()} for batch in batches)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        floats, fused, integers = (Path(folder) / f"{name}.onnx" for name in ("floats", "fused", "integers"))
        export_onnx(cnn, batches[0], floats)
        quant_pre_process(str(floats), str(fused))  # BatchNorm becomes part of the convolutions
        options = {"quant_format": QuantFormat.QDQ, "per_channel": True}
        types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        quantize_static(str(fused), str(integers), Reader(), **options, **types)
        return integers.read_bytes()


def with_facts(content: bytes, facts: dict[str, str]) -> bytes:
    """Returns an ONNX file with facts among its properties."""
    import onnx  # installed, or there would be no file

    model = onnx.load_model_from_string(content)
    onnx.helper.set_model_props(model, facts)
    return model.SerializeToString()


class OnnxNetwork(nn.Module):
    """An ONNX file as a network for inference by onnxruntime.

    Attributes:
        facts: the properties of the file.

    Args:
        content: of the file.
        optimized: fuse operators into int8 kernels; otherwise they run one by one, as the file defines them.

    Raises:
        ModuleNotFoundError: onnxruntime is not installed.
    """

    def __init__(self, content: bytes, optimized: bool = True) -> None:
        super().__init__()
        onnxruntime = _require_onnxruntime()
        options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        options.add_session_config_entry("session.x64quantprecision", "1")  # without instructions that saturate
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self.facts: dict[str, str] = self._session.get_modelmeta().custom_metadata_map

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (N, classes)."""
        return torch.from_numpy(self._session.run(None, {"input": images.contiguous().numpy()})[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxNetwork":
        return self  # a session has no state


def _require_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "CNNs in int8 need onnxruntime: pip install adderops[export] onnxruntime"
        ) from missing
    return onnxruntime
