"""Runs the int8 kernels of csrc/cuda on the host, on torch tensors.

kernels = build("race")
y = kernels.forward(x, w, *epilogue, *geometry, order="random", seed=3)
"""

import ctypes
import math
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from simt import builder, host

SOURCES = ("int8.cu", "quantize.cu")


class Args(ctypes.Structure):
    """Int8Args of csrc/args/int8.h."""

    _fields_ = [
        ("problem", host.Problem),
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "residual", "scale", "offset")),
        ("float_residual", ctypes.c_bool),
        *((name, ctypes.c_float) for name in ("residual_scale", "least", "most")),
        ("padding", ctypes.c_uint8),
        ("output", ctypes.c_int),
    ]


class QuantizeArgs(ctypes.Structure):
    """QuantizeArgs of csrc/args/int8.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "H", "W")),
        ("type", ctypes.c_int),
        ("x", host.Operand),
        ("y", ctypes.c_void_p),
        ("inverse_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("zero_point", "quant_max")),
    ]


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Dense in (N, H, W, C), at its own address where it is so already."""
    strides = tensor.permute(0, 2, 3, 1)
    return tensor if strides.is_contiguous() else strides.contiguous().permute(0, 3, 1, 2)


class Kernels(builder.Library):
    """The int8 kernels of one build of the sources."""

    def __init__(self, path: Path):
        super().__init__(path)
        pointers = (ctypes.POINTER(structure) for structure in (Args, host.Device, host.Choice))
        self.c.simt_forward_int8.argtypes = tuple(pointers)
        self.c.simt_quantize.argtypes = (ctypes.POINTER(QuantizeArgs),)
        self.c.simt_forward_int8.restype = self.c.simt_quantize.restype = ctypes.c_char_p

    def tiles(self) -> int:
        return self.c.simt_int8_tiles()

    def forward(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        scale: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        residual_scale: float = 1.0,
        relu: bool = False,
        quantize: bool = False,
        zero_point: int = 0,
        quant_max: int = 255,
        padding_value: int = 0,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        *,
        tile: int = -1,
        capability: int = 80,
        multiprocessors: int = 16,
        order: str = "forward",
        seed: int = 1,
        poison: int = 0xFF,
    ) -> torch.Tensor:
        """adder_conv2d_int8 as csrc/checks.cpp hands it to the kernels; raises host.KernelError if it goes wrong."""
        tensors = {"x": channels_last(x), "w": channels_last(w)}
        problem = host._problem(x.shape, w.shape, stride, padding, dilation, groups)
        output = 0 if scale is None else 2 if quantize else 1
        y = torch.empty(
            x.shape[0], problem.OH, problem.OW, w.shape[0], dtype=(torch.int32, torch.float32, torch.uint8)[output]
        )
        if scale is not None:
            tensors |= {"scale": scale.contiguous(), "offset": offset.contiguous()}
        if residual is not None:
            tensors["residual"] = channels_last(residual)
        zero = float(zero_point) if quantize else 0.0
        args = Args(
            problem=problem,
            float_residual=residual is not None and residual.dtype == torch.float32,
            residual_scale=residual_scale if residual is not None else 0.0,
            least=zero if relu else 0.0 if quantize else -math.inf,
            most=quant_max,
            padding=padding_value,
            output=output,
        )
        self.configure(order, seed, poison)
        buffers = self._place(args, tensors, y.permute(0, 3, 1, 2), poison)
        device, choice = host.Device(capability, multiprocessors), host.Choice(tile, -1, -1)
        return self._finish(self.c.simt_forward_int8(args, device, choice), buffers)

    def quantize(
        self,
        x: torch.Tensor,
        scale: float,
        zero_point: int,
        quant_max: int = 255,
        *,
        order: str = "forward",
        seed: int = 1,
        poison: int = 0xFF,
    ) -> torch.Tensor:
        """The operator quantize; raises host.KernelError if it goes wrong."""
        n, c, h, w = x.shape
        args = QuantizeArgs(n, c, h, w, host.ELEMENT_TYPES[x.dtype])
        args.inverse_scale, args.zero_point, args.quant_max = 1 / scale, zero_point, quant_max
        y = torch.empty(n, h, w, c, dtype=torch.uint8).permute(0, 3, 1, 2)
        self.configure(order, seed, poison)
        buffers = self._place(args, {"x": x}, y, poison)
        return self._finish(self.c.simt_quantize(args), buffers)

    def _place(self, args, tensors: dict, y: torch.Tensor, poison: int) -> dict[str, host.Buffer]:
        buffers = {key: host.Buffer(key, tensor, poison, False) for key, tensor in tensors.items()}
        buffers["y"] = host.Buffer("y", y, poison, True)
        for key, buffer in buffers.items():
            if isinstance(args, QuantizeArgs) and key == "x":
                args.x = host.Operand(buffer.data, (ctypes.c_int64 * 4)(*buffer.tensor.stride()))
            else:
                setattr(args, key, buffer.data)
            buffer.watch(self)
        return buffers

    def _finish(self, error: bytes | None, buffers: dict[str, host.Buffer]) -> torch.Tensor:
        findings = self.findings()
        if error:
            raise host.KernelError("\n".join((self.with_places(error.decode()), *findings)))
        if findings:
            raise host.KernelError("\n".join(findings))
        for buffer in buffers.values():
            buffer.check()
        return buffers["y"].tensor


def library(variant: str, csrc: Path = builder.CSRC) -> Path:
    return builder.build(variant, tuple(csrc / "cuda" / name for name in SOURCES), csrc, more=("simt_int8",))


@cache
def build(variant: str = "plain") -> Kernels:
    """This checkout's kernels, compiled as "plain" or with the "race" checker."""
    return Kernels(library(variant))


def run_sanitized(calls: list[tuple[str, tuple, dict]], timeout: float = 300) -> list[torch.Tensor]:
    """getattr(kernels, name)(*positional, **named) for each call, under AddressSanitizer and UBSan."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(calls, f"{folder}/calls")
        code = "import sys; from simt import host_int8; host_int8.serve(*sys.argv[1:])"
        arguments = (str(library("asan")), f"{folder}/calls", f"{folder}/results")
        process = builder.sanitized_python(code, *arguments, timeout=timeout)
        if process.returncode:
            raise host.KernelError(process.stderr)
        return torch.load(f"{folder}/results")


def serve(path: str, calls: str, results: str) -> None:
    """The other side of run_sanitized()."""
    kernels = Kernels(Path(path))
    try:
        torch.save([getattr(kernels, name)(*args, **named) for name, args, named in torch.load(calls)], results)
    except host.KernelError as error:
        sys.exit(str(error))
