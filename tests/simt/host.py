"""Runs the passes of csrc/cuda on the host, on torch tensors.

    kernels = build("race")
    y = kernels.conv2d("forward", x, w, padding=(1, 1, 1, 1), order="random", seed=3)
    y = kernels.int8(x, w, *epilogue, *geometry, tile=2)
    y = kernels.quantize(x, scale, zero_point)
    flat = kernels.moments(students, teachers, scales, centre_a, centre_c, exponential)

Every call also takes what `_launch` takes: the device, the choice of a kernel, the order of threads, the poison.
"""

import ctypes
import shutil
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from simt import builder

# as simt_library.cpp numbers them
PASSES = (
    *("forward", "grad_x", "grad_w", "int8", "quantize"),
    *("moments", "moments_grad", "mean_abs", "match"),
    "integrate_and_fire",
)
CONV2D, INT8, MOMENTS, NEURONS = PASSES[:3], PASSES[3:5], PASSES[5:9], PASSES[9:]
ELEMENT_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
INT8_OUTPUTS = (torch.int32, torch.float32, torch.uint8)
PADDING = 4096  # bytes around every array that belong to no one, kPadding of executor.h


class KernelError(RuntimeError):
    """A kernel went wrong: an error of the executor, a finding of the race checker, or a write outside the output."""


# --- the structs of csrc/args and csrc/cuda/kernels.h, field by field; Kernels compares their sizes ---


class Conv2dProblem(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("N", "C_in", "H", "W", "C_out", "KH", "KW", "OH", "OW"),
            *("stride_h", "stride_w", "pad_top", "pad_left", "dilation_h", "dilation_w", "groups"),
        )
    ]


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]


class Conv2dArgs(ctypes.Structure):
    _fields_ = [
        ("problem", Conv2dProblem),
        ("type", ctypes.c_int),
        *((name, Operand) for name in ("x", "w", "grad_y", "out")),
        ("bias", ctypes.c_void_p),
    ]


class Int8Args(ctypes.Structure):
    _fields_ = [
        ("problem", Conv2dProblem),
        *((name, ctypes.c_void_p) for name in ("x", "w", "y", "residual", "scale", "offset")),
        ("float_residual", ctypes.c_bool),
        *((name, ctypes.c_float) for name in ("residual_scale", "least", "most")),
        ("padding", ctypes.c_uint8),
        ("output", ctypes.c_int),
    ]


class QuantizeArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "H", "W")),
        ("type", ctypes.c_int),
        ("x", Operand),
        ("y", ctypes.c_void_p),
        ("inverse_scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("zero_point", "quant_max")),
    ]


class NeuronParameter(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 3)]


class IntegrateAndFireArgs(ctypes.Structure):
    _fields_ = [
        ("T", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3),
        ("type", ctypes.c_int),
        ("x", ctypes.c_void_p),
        ("x_step", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("spikes", "counts", "membrane")),
        *((name, NeuronParameter) for name in ("threshold", "initial")),
        *((name, ctypes.c_double) for name in ("decay", "gain", "fire")),
        *((name, ctypes.c_bool) for name in ("subtract", "scaled")),
    ]


class MomentsArgs(ctypes.Structure):
    _fields_ = [
        ("N", ctypes.c_int64),
        ("C", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("H", "W")),
        ("type", ctypes.c_int * 2),
        ("y", Operand * 2),
        ("scale", ctypes.c_void_p * 2),
        ("centre", ctypes.c_float * 2),
        ("exponential", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("out", "grad")),
        ("grad_y", Operand),
    ]


class MeanAbsArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("N", "C", "H", "W")),
        ("type", ctypes.c_int),
        ("x", Operand),
        ("out", ctypes.c_void_p),
    ]


class MatchArgs(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("layers", "rows", "C_a", "C_c")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("mixed_a", "mixed_c", "w_a", "w_c")),
        *((name, ctypes.c_void_p) for name in ("terms", "var_c", "mix", "grad_w_a", "grad_w_c")),
    ]


class List(ctypes.Structure):
    _fields_ = [("items", ctypes.c_void_p), ("count", ctypes.c_int64)]


class Device(ctypes.Structure):
    _fields_ = [("capability", ctypes.c_int), ("multiprocessors", ctypes.c_int)]


class Choice(ctypes.Structure):
    _fields_ = [("tile", ctypes.c_int), ("layout", ctypes.c_int), ("formula", ctypes.c_int)]


STRUCTS = (
    *(Conv2dProblem, Operand, Conv2dArgs, Int8Args, QuantizeArgs),
    *(NeuronParameter, IntegrateAndFireArgs),
    *(MomentsArgs, MeanAbsArgs, MatchArgs, List, Device, Choice),
)


class Buffer:
    """A padded copy of a tensor with its strides and alignment; every byte except its elements is poison."""

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

    def operand(self) -> Operand:
        return Operand(self.data, (*self.tensor.stride(), 0, 0, 0)[:4])

    def check(self) -> None:
        """Raises where a byte has changed that is not an element of the output."""
        if not torch.equal(self.raw[self.outside], self.before[self.outside]):
            raise KernelError(f"{self.name}: a kernel wrote outside its elements")


class Kernels(builder.Library):
    """The passes of one build of the sources."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.c.simt_run.argtypes = (ctypes.c_int, ctypes.c_void_p, *map(ctypes.POINTER, (Device, Choice)))
        self.c.simt_run.restype = ctypes.c_char_p
        self.c.simt_set_epilogue_bounds.argtypes = (ctypes.POINTER(Int8Args), *[ctypes.c_int] * 3)
        self.c.simt_set_epilogue_bounds.restype = None
        for struct in STRUCTS:
            got, want = ctypes.sizeof(struct), self.c.simt_sizeof(struct.__name__.encode())
            if got != want:
                raise TypeError(f"{struct.__name__}: host.py has {got} bytes, csrc has {want}")

    def tiles(self, name: str) -> int:
        """How many tiles a pass has: `tile` counts from 0."""
        return self.c.simt_tiles(PASSES.index(name))

    def conv2d(
        self,
        name: str,
        *operands: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int, int, int] = (0, 0, 0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        out: torch.Tensor | None = None,
        **how,
    ) -> torch.Tensor:
        """A pass on (x, w) for "forward", (grad_y, x, w) for the others; raises KernelError if it goes wrong.

        `padding` is (top, bottom, left, right). `out` gives the strides of the result, and is not written; without it
        the result is channels_last where the first operand is. Elements that no kernel wrote are poison.
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
        args = Conv2dArgs(problem=problem, type=ELEMENT_TYPES[x.dtype])
        return self._launch(name, args, tensors, {"out": out}, **how)

    def int8(
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
        **how,
    ) -> torch.Tensor:
        """The operator adder_conv2d_int8; raises KernelError if it goes wrong."""
        tensors = {"x": channels_last(x), "w": channels_last(w)}
        problem = _problem(x.shape, w.shape, stride, padding, dilation, groups)
        output = 0 if scale is None else 2 if quantize else 1
        if scale is not None:
            tensors |= {"scale": scale.contiguous(), "offset": offset.contiguous()}
        if residual is not None:
            tensors["residual"] = channels_last(residual)
        args = Int8Args(
            problem=problem,
            float_residual=residual is not None and residual.dtype == torch.float32,
            residual_scale=residual_scale if residual is not None else 0.0,
            padding=padding_value,
            output=output,
        )
        self.c.simt_set_epilogue_bounds(args, relu, zero_point, quant_max)
        y = torch.empty(x.shape[0], problem.OH, problem.OW, w.shape[0], dtype=INT8_OUTPUTS[output])
        return self._launch("int8", args, tensors, {"y": y.permute(0, 3, 1, 2)}, **how)

    def quantize(self, x: torch.Tensor, scale: float, zero_point: int, quant_max: int = 255, **how) -> torch.Tensor:
        """The operator quantize; raises KernelError if it goes wrong."""
        n, c, h, w = x.shape
        args = QuantizeArgs(n, c, h, w, ELEMENT_TYPES[x.dtype])
        args.inverse_scale, args.zero_point, args.quant_max = 1 / scale, zero_point, quant_max
        y = torch.empty(n, h, w, c, dtype=torch.uint8).permute(0, 3, 1, 2)
        return self._launch("quantize", args, {"x": x}, {"y": y}, **how)

    def integrate_and_fire(
        self, x, threshold, initial, decay, gain, fire, subtract, scaled, wanted=(True, True, True), **how
    ) -> list[torch.Tensor]:
        """The operator integrate_and_fire; raises KernelError if it goes wrong.

        x is (T, *sizes), three sizes in the order of memory, of dense steps; threshold and initial have the strides
        of an expanded tensor (*sizes). `wanted` says which of spikes, counts and membrane.
        """
        args = IntegrateAndFireArgs(x.shape[0], tuple(x.shape[1:]), ELEMENT_TYPES[x.dtype], x_step=x.stride(0))
        args.decay, args.gain, args.fire, args.subtract, args.scaled = decay, gain, fire, subtract, scaled
        buffers, wide = _Buffers(**how), torch.promote_types(x.dtype, torch.float32)
        args.x = buffers.add("x", x).data
        for name, parameter in (("threshold", threshold), ("initial", initial)):
            if parameter is not None:
                setattr(args, name, NeuronParameter(buffers.add(name, parameter).data, parameter.stride()))
        results = []
        for name, shape, dtype, want in zip(
            ("spikes", "counts", "membrane"), (x.shape, *[x.shape[1:]] * 2), (x.dtype, wide, wide), wanted, strict=True
        ):
            if want:
                results.append(buffers.add(name, torch.empty(shape, dtype=dtype), writable=True))
                setattr(args, name, results[-1].data)
        self._run("integrate_and_fire", args, buffers.all, **how)
        return [result.tensor for result in results]

    def moments(self, student, teacher, scales, centre_a, centre_c, exponential, **how) -> torch.Tensor:
        """The operator _kernel_moments; raises KernelError if it goes wrong."""
        layers = zip(student, teacher, strict=True)
        sizes = [(d + 1) * d for d in (a.shape[1] + c.shape[1] for a, c in layers)]
        buffers = _Buffers(**how)
        out = buffers.add("out", torch.empty(sum(sizes)), writable=True)
        items = self._moments_args(buffers, student, teacher, scales, (centre_a, centre_c), exponential)
        for args, begin in zip(items, _begins(sizes), strict=True):
            args.out = out.data + 4 * begin
        self._run("moments", _list_of(items), buffers.all, **how)
        return out.tensor

    def moments_grad(
        self, grad, student, teacher, scales, centre_a, centre_c, exponential, out=None, **how
    ) -> list[torch.Tensor]:
        """The operator _kernel_moments_grad; raises KernelError if it goes wrong.

        `out` gives the strides of the results; without it they are channels_last where the students are.
        """
        buffers = _Buffers(**how)
        flat = buffers.add("grad", grad)
        items = self._moments_args(buffers, student, teacher, scales, (centre_a, centre_c), exponential)
        sizes = [(sum(args.C) + 1) * sum(args.C) for args in items]
        results = [
            buffers.add(f"grad_y[{i}]", torch.empty_like(y) if out is None else out[i], writable=True)
            for i, y in enumerate(student)
        ]
        for args, begin, result in zip(items, _begins(sizes), results, strict=True):
            args.grad, args.grad_y = flat.data + 4 * begin, result.operand()
        self._run("moments_grad", _list_of(items), buffers.all, **how)
        return [result.tensor for result in results]

    def mean_abs(self, x: list[torch.Tensor], **how) -> torch.Tensor:
        """The operator _mean_abs; raises KernelError if it goes wrong."""
        buffers = _Buffers(**how)
        out = buffers.add("out", torch.empty(len(x)), writable=True)
        items = [
            MeanAbsArgs(*t.shape, ELEMENT_TYPES[t.dtype], buffers.add(f"x[{i}]", t).operand(), out.data + 4 * i)
            for i, t in enumerate(x)
        ]
        self._run("mean_abs", _list_of(items), buffers.all, **how)
        return out.tensor

    def match(self, mixed_a, mixed_c, w_a, w_c, eps, **how) -> list[torch.Tensor]:
        """The operator _match_rows, on contiguous tensors; raises KernelError if it goes wrong."""
        buffers, layers = _Buffers(**how), [len(w) for w in w_a]
        results = [buffers.add(name, torch.empty(sum(layers)), writable=True) for name in ("terms", "var_c")]
        items = []
        for i, tensors in enumerate(zip(mixed_a, mixed_c, w_a, w_c, strict=True)):
            names = ("mixed_a", "mixed_c", "w_a", "w_c")
            given = [buffers.add(f"{name}[{i}]", t).data for name, t in zip(names, tensors, strict=True)]
            outputs = zip(("mix", "grad_w_a", "grad_w_c"), (tensors[0], *tensors[2:]), strict=True)
            made = [buffers.add(f"{name}[{i}]", torch.empty_like(t), writable=True) for name, t in outputs]
            means = [result.data + 4 * sum(layers[:i]) for result in results[:2]]
            sizes = (*tensors[2].shape, tensors[3].shape[2])
            items.append(MatchArgs(*sizes, eps, *given, *means, *(buffer.data for buffer in made)))
            results += made
        self._run("match", _list_of(items), buffers.all, **how)
        return [result.tensor for result in results]

    def _moments_args(self, buffers, student, teacher, scales, centres, exponential) -> list[MomentsArgs]:
        of_layers, items = buffers.add("scales", scales.contiguous()), []
        for i, (a, c) in enumerate(zip(student, teacher, strict=True)):
            args = MomentsArgs(N=a.shape[0], H=a.shape[2], W=a.shape[3], exponential=exponential)
            for half, (role, y) in enumerate((("student", a), ("teacher", c))):
                args.C[half], args.type[half] = y.shape[1], ELEMENT_TYPES[y.dtype]
                args.y[half] = buffers.add(f"{role}[{i}]", y).operand()
                args.scale[half] = of_layers.data + 4 * (half * len(student) + i)
                args.centre[half] = centres[half]
            items.append(args)
        return items

    def _launch(
        self,
        name: str,
        args: ctypes.Structure,
        inputs: dict[str, torch.Tensor],
        output: dict[str, torch.Tensor],
        *,
        poison: int = 0xFF,
        **how,
    ) -> torch.Tensor:
        """Runs a pass on copies of its tensors, which become the members of `args` by their names."""
        buffers = [Buffer(key, tensor, poison, False) for key, tensor in inputs.items()]
        buffers += [Buffer(key, tensor, poison, True) for key, tensor in output.items()]
        types = dict(args._fields_)
        for buffer in buffers:
            setattr(args, buffer.name, buffer.operand() if types[buffer.name] is Operand else buffer.data)
        self._run(name, args, buffers, poison=poison, **how)
        return buffers[-1].tensor

    def _run(
        self,
        name: str,
        args: ctypes.Structure,
        buffers: list[Buffer],
        *,
        tile: int = -1,
        layout: int = -1,
        formula: int = -1,
        capability: int = 80,
        multiprocessors: int = 16,
        order: str = "forward",
        seed: int = 1,
        poison: int = 0xFF,
    ) -> None:
        """Runs a pass on its buffers; raises KernelError for an error, a finding or a write outside."""
        self.configure(order, seed, poison)
        for buffer in buffers:
            buffer.watch(self)
        device, choice = Device(capability, multiprocessors), Choice(tile, layout, formula)
        error = self.c.simt_run(PASSES.index(name), ctypes.byref(args), device, choice)
        messages = [*([self.with_places(error.decode())] if error else []), *self.findings()]
        if messages:
            raise KernelError("\n".join(messages))
        for buffer in buffers:
            buffer.check()


class _Buffers:
    """The buffers of a call with lists."""

    def __init__(self, poison: int = 0xFF, **_):
        self.poison, self.all = poison, []

    def add(self, name: str, tensor: torch.Tensor, writable: bool = False) -> Buffer:
        self.all.append(Buffer(name, tensor, self.poison, writable))
        return self.all[-1]


def _list_of(items: list[ctypes.Structure]) -> List:
    array = (type(items[0]) * len(items))(*items)
    found = List(ctypes.addressof(array), len(items))
    found.array = array  # kept alive
    return found


def _begins(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def channels_last(tensor: torch.Tensor) -> torch.Tensor:
    """Dense in (N, H, W, C); the tensor itself where it already is."""
    strides = tensor.permute(0, 2, 3, 1)
    return tensor if strides.is_contiguous() else strides.contiguous().permute(0, 3, 1, 2)


def _problem(x, w, stride, padding, dilation, groups) -> Conv2dProblem:
    top, bottom, left, right = padding
    oh = (x[2] + top + bottom - dilation[0] * (w[2] - 1) - 1) // stride[0] + 1
    ow = (x[3] + left + right - dilation[1] * (w[3] - 1) - 1) // stride[1] + 1
    return Conv2dProblem(*x, w[0], *w[2:], oh, ow, *stride, top, left, *dilation, groups)


def library(variant: str, kernels: Iterable[str | Path] = PASSES, csrc: Path = builder.CSRC) -> Path:
    """The path of a library: passes by name, from csrc/cuda, or files that define passes."""
    files = (csrc / "cuda" / f"{k}.cu" if isinstance(k, str) else k for k in kernels)
    return builder.build(variant, tuple(files), csrc, more=("simt_library",))


@cache
def build(variant: str = "plain", kernels: tuple[str | Path, ...] = CONV2D) -> Kernels:
    """The passes of this checkout, "plain" or with the "race" checker."""
    return Kernels(library(variant, kernels))


def mutant(
    edits: Iterable[tuple[str, str, str]], variant: str = "plain", kernels: tuple[str | Path, ...] = CONV2D
) -> Kernels:
    """The passes with deliberate changes (file, old, new): `old`, once in csrc/`file`, becomes `new`."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder) / "csrc"
        shutil.copytree(builder.CSRC, csrc)
        for file, old, new in edits:
            text = (csrc / file).read_text()
            if text.count(old) != 1:
                raise ValueError(f"{file}: expected {old!r} once, found it {text.count(old)} times")
            (csrc / file).write_text(text.replace(old, new))
        return Kernels(library(variant, kernels, csrc))


def run_sanitized(
    calls: list[tuple[str, tuple, dict]], kernels: tuple[str | Path, ...] = CONV2D, timeout: float = 300
) -> list[torch.Tensor]:
    """The method of Kernels by name, (*positional, **named), for each call, under AddressSanitizer and UBSan.

    In a process of its own, which needs seconds to import torch: put many calls into one.
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
    """The process of run_sanitized()."""
    kernels = Kernels(Path(path))
    try:
        torch.save([getattr(kernels, name)(*args, **named) for name, args, named in torch.load(calls)], results)
    except KernelError as error:
        sys.exit(str(error))
