"""Exports trained models with adder layers: as a `torch.export` program or as an ONNX file.

The adder convolution is exported in one of three forms:
    the operator adderops::adder_conv2d   fast; `import adderops` before the program is loaded
    pad, im2col, cdist                    aten operators only; runs with torch alone
    an ONNX Scan over the terms k         Y <- Y - |X_k - W_k|, no tensor larger than the padded input or the output
"""

import copy
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.optim.swa_utils import AveragedModel

from adderops import _ops
from adderops.atomic import write_atomically

_LEAST_OPSET = 18


def export_program(
    model: nn.Module, example: Tensor, path: str | os.PathLike[str] | None = None, *, decompose: bool = False
) -> ExportedProgram:
    """Exports a model in evaluation mode as a `torch.export` program for any batch size.

    Args:
        model: a model with one input; it is left unchanged, and the program gets its own weights. Wrappers are removed:
            DataParallel, DistributedDataParallel, AveragedModel and torch.compile.
        example: an input (N, ...), N >= 1; it fixes the other dimensions.
        path: file to save the program to as well, usually *.pt2, written atomically; None saves nothing.
        decompose: replaces the operator adderops::adder_conv2d by pad, im2col and cdist, so that the program loads and
            runs with torch alone. Otherwise `import adderops` before `torch.export.load`, or, for a package that
            AOTInductor has compiled from the program, before `torch._inductor.aoti_load_package`.

    Returns:
        The program; `program.module()` is callable.

    Raises:
        TypeError: example is not a tensor.
        ValueError: example is empty or has no dimension.
        FileNotFoundError: the folder of path does not exist.
        Also what `torch.export.export` raises for a model that it cannot export for any batch size.

    >>> from adderops import AdderConv2d
    >>> model = nn.Sequential(AdderConv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    >>> program = export_program(model, torch.zeros(1, 3, 8, 8), decompose=True)
    >>> images = torch.randn(5, 3, 8, 8)
    >>> torch.allclose(program.module()(images), model(images), atol=1e-4)
    True
    """
    file = None if path is None else _writable("export_program", path)
    program = _trace("export_program", model, example)
    if decompose:
        program = program.run_decompositions({_ops.adder_conv2d: _adder_conv2d_by_cdist})
    if file is not None:
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        write_atomically(file, buffer.getbuffer())
    return program


def export_onnx(model: nn.Module, example: Tensor, path: str | os.PathLike[str], *, opset: int = 20) -> None:
    """Writes a model in evaluation mode as one ONNX file for any batch size, without custom operators.

    The file has one input, `input`, of shape (batch, ...). It has passed `onnx.checker` and is written atomically.

    Args:
        model: a model with one input; it is left unchanged. Wrappers are removed: DataParallel,
            DistributedDataParallel, AveragedModel and torch.compile.
        example: an input (N, ...), N >= 1; it fixes the other dimensions.
        path: the file to write, usually *.onnx. It contains the weights, so it is limited to 2 GiB.
        opset: version of the ONNX operators, from 18 to the latest that onnx knows.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is not installed.
        TypeError: example is not a tensor, or opset not an integer.
        ValueError: example is empty or has no dimension, or opset is out of range.
        FileNotFoundError: the folder of path does not exist.
        Also what `torch.export.export` and `torch.onnx.export` raise for a model that they cannot export.

    >>> import tempfile
    >>> from adderops import AdderConv2d
    >>> model = nn.Sequential(AdderConv2d(3, 4, 3), nn.BatchNorm2d(4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, torch.zeros(1, 3, 8, 8), f"{folder}/model.onnx")
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (of torch.onnx.export)
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass

        from adderops._onnx import adder_conv2d
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"export_onnx: {error.name} is missing: install the extra adderops[export]", name=error.name
        ) from error
    if not isinstance(opset, int):
        raise TypeError(f"export_onnx: opset: expected an integer, got {type(opset).__name__}")
    if not _LEAST_OPSET <= opset <= onnx.defs.onnx_opset_version():  # above it the converter only warns
        supported = f"{_LEAST_OPSET} to {onnx.defs.onnx_opset_version()}"
        raise ValueError(f"export_onnx: opset: expected {supported}, got {opset}")
    file = _writable("export_onnx", path)
    converted = torch.onnx.export(
        _trace("export_onnx", model, example),
        dynamo=True,
        dynamic_shapes=({0: "batch"},),
        opset_version=opset,
        input_names=["input"],
        custom_translation_table={_ops.adder_conv2d: adder_conv2d},
        verbose=False,
    )
    assert converted is not None  # with dynamo=True it is a program
    ClearMetadataAndDocStringPass()(converted.model)  # removes stack traces, with paths of this machine
    content = converted.model_proto.SerializeToString()
    onnx.checker.check_model(content, full_check=True)
    write_atomically(file, content)


def _trace(function: str, model: nn.Module, example: Tensor) -> ExportedProgram:
    if not isinstance(example, Tensor):
        raise TypeError(f"{function}: example: expected a tensor, got {type(example).__name__}")
    if example.dim() == 0 or len(example) == 0:
        raise ValueError(f"{function}: example: expected (N, ...) with N >= 1, got shape {tuple(example.shape)}")
    replica = copy.deepcopy(_unwrapped(model)).eval().requires_grad_(False)
    # two images, because torch.export takes a batch of 1 for a constant; zeros, because the program file contains them
    images = example.new_zeros((2, *example.shape[1:]))
    return torch.export.export(replica, (images,), dynamic_shapes=({0: Dim("batch")},))


def _unwrapped(model: nn.Module) -> nn.Module:
    """Returns a model without the wrappers of torch.compile, data parallelism and weight averaging, in any order."""
    wrappers = nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _positions(padded: int, kernel: int, stride: int, dilation: int) -> int:
    """Returns the number of windows along an axis."""
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _adder_conv2d_by_cdist(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The operator in plain PyTorch: an L1 `cdist` of patches (groups, N*OH*OW, K) and filters (groups, M, K)."""
    top, bottom, left, right = padding
    dtype = torch.promote_types(x.dtype, torch.float32)  # float16 is summed in float32, as in the operator
    x = F.pad(x.to(dtype), (left, right, top, bottom))
    OH, OW = map(_positions, x.shape[2:], w.shape[2:], stride, dilation)
    patches = F.unfold(x, w.shape[2:], tuple(dilation), stride=tuple(stride))  # (N, groups*K, OH*OW)
    patches = patches.unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    filters = w.to(dtype).unflatten(0, (groups, -1)).flatten(2)
    y = -torch.cdist(patches, filters, p=1.0).unflatten(1, (-1, OH, OW)).permute(1, 0, 4, 2, 3).flatten(1, 2)
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y.to(w.dtype)


def _writable(function: str, path: str | os.PathLike[str]) -> Path:
    """Returns the path; refuses one without a folder early, before minutes of work."""
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{function}: path: expected a file in an existing folder, got {os.fspath(path)!r}")
    return Path(path)
