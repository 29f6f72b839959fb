"""Runs the passes of csrc/cuda on the host, on torch tensors.

passes = build("race")
y = passes.run("forward", x, w, padding=(1, 1, 1, 1), order="random", seed=3)
"""

import ctypes
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from simt import builder

PASSES = ("forward", "grad_x", "grad_w")
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PADDING = 4096  # bytes around every array that belong to nobody, kPadding of executor.h


class KernelError(RuntimeError):
    """A kernel went wrong: an error of the executor, findings of the race checker, or writes where none may be."""


class Problem(ctypes.Structure):
    """Conv2dProblem of csrc/args/conv2d.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("N", "C_in", "H", "W", "C_out", "KH", "KW", "OH", "OW"),
            *("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups"),
        )
    ]


class Operand(ctypes.Structure):
    """Operand of csrc/args/conv2d.h."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class Args(ctypes.Structure):
    """Conv2dArgs of csrc/args/conv2d.h."""

    _fields_ = [
        ("problem", Problem),
        ("type", ctypes.c_int),
        *((name, Operand) for name in ("x", "w", "grad_y", "out")),
        ("bias", ctypes.c_void_p),
    ]


class Device(ctypes.Structure):
    """Device of csrc/cuda/kernels.h."""

    _fields_ = [("capability", ctypes.c_int), ("multiprocessors", ctypes.c_int)]


class Choice(ctypes.Structure):
    """Choice of csrc/cuda/kernels.h."""

    _fields_ = [("tile", ctypes.c_int), ("layout", ctypes.c_int), ("form", ctypes.c_int)]


class Buffer:
    """A copy of a tensor with its strides and alignment, padded, everything but its elements filled with poison."""

    def __init__(self, name: str, tensor: torch.Tensor, poison: int, writable: bool):
        self.name, self.writable = name, writable
        offsets = torch.zeros((), dtype=torch.int64)
        for dimension, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            shape = [-1 if i == dimension else 1 for i in range(tensor.dim())]
            offsets = offsets + (torch.arange(size) * stride).view(shape)
        span = int(offsets.max()) + 1 if tensor.numel() else 0
        self.bytes = span * tensor.element_size()
        raw = torch.full((2 * PADDING + self.bytes + 256,), poison, dtype=torch.uint8)
        begin = PADDING + (tensor.data_ptr() - raw.data_ptr() - PADDING) % 256
        self.elements = torch.zeros(span, tensor.element_size(), dtype=torch.uint8)
        self.elements[offsets.flatten()] = 1
        self.raw, self.data = raw, raw.data_ptr() + begin
        flat = raw[begin : begin + self.bytes].view(tensor.dtype)
        if not writable:
            flat[offsets.flatten()] = tensor.flatten()
        self.tensor = flat.as_strided(tensor.shape, tensor.stride())
        outside = torch.ones_like(raw)
        if writable:
            outside[begin : begin + self.bytes] = 1 - self.elements.flatten()
        self.outside, self.before = outside.bool(), raw.clone()

    def watch(self, library: builder.Library) -> None:
        """Tells the race checker, and the sanitizer, which bytes a kernel may touch."""
        elements = self.elements.data_ptr()
        library.c.simt_watch(self.name.encode(), self.data, self.bytes, self.writable, not self.writable, elements)

    def check(self) -> None:
        """Raises where a byte has changed that is not an element of the output."""
        if not torch.equal(self.raw[self.outside], self.before[self.outside]):
            raise KernelError(f"{self.name}: a kernel wrote beside its elements")


class Passes(builder.Library):
    """The passes of one build of the sources."""

    def __init__(self, path: Path):
        super().__init__(path)
        pointers = (ctypes.POINTER(structure) for structure in (Args, Device, Choice))
        self.c.simt_run.argtypes = (ctypes.c_int, *pointers)
        self.c.simt_run.restype = ctypes.c_char_p

    def tiles(self, name: str) -> int:
        """How many tiles a pass has: `tile` of run() counts from 0."""
        return self.c.simt_tiles(PASSES.index(name))

    def run(
        self,
        name: str,
        *operands: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        out: torch.Tensor | None = None,
        tile: int = -1,
        layout: int = -1,
        form: int = -1,
        capability: int = 80,
        multiprocessors: int = 16,
        order: str = "forward",
        seed: int = 1,
        poison: int = 0xFF,
    ) -> torch.Tensor:
        """A pass on (x, w) for "forward", (grad_y, x, w) for the others; raises KernelError if it goes wrong.

        `padding` is (top, bottom, left, right). `out` gives the strides of the result, and is not written; without it
        the result is channels last where the first operand is. Elements that no kernel wrote are poison.
        """
        names = ("x", "w") if name == "forward" else ("grad_y", "x", "w")
        tensors = dict(zip(names, operands, strict=True))
        x, w = tensors["x"], tensors["w"]
        problem = _problem(x.shape, w.shape, stride, padding, dilation, groups)
        shapes = {"forward": (x.shape[0], w.shape[0], problem.OH, problem.OW), "grad_x": x.shape, "grad_w": w.shape}
        if out is None:
            last = operands[0].is_contiguous(memory_format=torch.channels_last) and not operands[0].is_contiguous()
            out = torch.empty(shapes[name], dtype=x.dtype)
            out = out.contiguous(memory_format=torch.channels_last) if last else out
        elif out.shape != torch.Size(shapes[name]):
            raise ValueError(f"out: expected the shape {tuple(shapes[name])}, got {tuple(out.shape)}")
        if bias is not None:
            tensors["bias"] = bias
        if len({t.dtype for t in (*tensors.values(), out)}) != 1:
            raise ValueError("expected all tensors of one dtype")

        buffers = {key: Buffer(key, tensor, poison, False) for key, tensor in tensors.items()}
        buffers["out"] = Buffer("out", out, poison, True)
        args = Args(problem=problem, type=ELEMENT_TYPES[x.dtype])
        for key, buffer in buffers.items():
            if key == "bias":
                args.bias = buffer.data
            else:
                setattr(args, key, Operand(buffer.data, (ctypes.c_int64 * 4)(*buffer.tensor.stride())))
            buffer.watch(self)
        self.configure(order, seed, poison)
        device, choice = Device(capability, multiprocessors), Choice(tile, layout, form)
        error = self.c.simt_run(PASSES.index(name), args, device, choice)
        findings = self.findings()
        if error:
            raise KernelError("\n".join((self.with_places(error.decode()), *findings)))
        if findings:
            raise KernelError("\n".join(findings))
        for buffer in buffers.values():
            buffer.check()
        return buffers["out"].tensor


def _problem(x, w, stride, padding, dilation, groups) -> Problem:
    top, bottom, left, right = padding
    oh = (x[2] + top + bottom - dilation[0] * (w[2] - 1) - 1) // stride[0] + 1
    ow = (x[3] + left + right - dilation[1] * (w[3] - 1) - 1) // stride[1] + 1
    return Problem(*x, w[0], *w[2:], oh, ow, *stride, top, left, *dilation, groups)


def library(variant: str, kernels: tuple[Path, ...] | None = None, csrc: Path = builder.CSRC) -> Path:
    """The path of a library of the passes, of csrc/cuda/<pass>.cu unless other `kernels` define them."""
    kernels = tuple(csrc / "cuda" / f"{name}.cu" for name in PASSES) if kernels is None else kernels
    return builder.build(variant, kernels, csrc, more=("simt_library",))


@cache
def build(variant: str = "plain", kernels: tuple[Path, ...] | None = None) -> Passes:
    """This checkout's passes, compiled as "plain" or with the "race" checker."""
    return Passes(library(variant, kernels))


def mutant(file: str, old: str, new: str, variant: str = "plain", kernels: tuple[Path, ...] | None = None) -> Passes:
    """The passes with one deliberate change: `old` occurs exactly once in csrc/`file` and becomes `new`."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(builder.CSRC, csrc)
        text = (csrc / file).read_text()
        if text.count(old) != 1:
            raise ValueError(f"{file}: expected {old!r} once, found it {text.count(old)} times")
        (csrc / file).write_text(text.replace(old, new))
        return Passes(library(variant, kernels, csrc))


def run_sanitized(
    calls: list[tuple[tuple, dict]], kernels: tuple[Path, ...] | None = None, timeout: float = 300
) -> list[torch.Tensor]:
    """Passes.run(*positional, **named) for each call, under AddressSanitizer and UBSan in a process of its own.

    That process needs seconds to import torch: put many calls into one.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(calls, f"{folder}/calls")
        code = "import sys; from simt import host; host.serve(*sys.argv[1:])"
        arguments = (str(library("asan", kernels)), f"{folder}/calls", f"{folder}/results")
        process = builder.sanitized_python(code, *arguments, timeout=timeout)
        if process.returncode:
            raise KernelError(process.stderr)
        return torch.load(f"{folder}/results")


def serve(path: str, calls: str, results: str) -> None:
    """The other side of run_sanitized()."""
    passes = Passes(Path(path))
    try:
        torch.save([passes.run(*positional, **named) for positional, named in torch.load(calls)], results)
    except KernelError as error:
        sys.exit(str(error))
