"""Loads the compiled operators and registers with PyTorch: fake kernels, autograd, vmap, autocast, FLOP counts, ONNX.

The only file that says `torch.ops.adderops`.  csrc/ops.h has the schemas.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload

from adderops._on_import import on_import
from adderops._transforms import register_autograd, register_vmap

try:
    from adderops import _C  # noqa: F401  (registers the schemas and the CPU kernels)
except ImportError as error:
    raise ImportError(
        f"adderops: the compiled library adderops/_C.abi3.so does not load ({error}); "
        "build it with `pip install .` in the checkout"
    ) from error


def _load_cuda_kernels() -> str | None:
    """Registers the CUDA kernels, or returns why there are none and how to get them."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA: install one that is with it, then adderops again"
    major = int(torch.version.cuda.split(".")[0])
    build = "run `ADDEROPS_CUDA=1 pip install .` in the checkout"
    if major < 13:  # PyPI has no nvcc
        build = f"install the CUDA toolkit {major} (CUDA_HOME says where), then {build}"
    if find_spec("adderops._cuda") is None:
        return f"adderops was built without them: {build}"
    try:
        from adderops import _cuda  # noqa: F401  (registers the CUDA kernels)
    except ImportError as error:  # the CPU kernels work without it
        return f"the compiled library adderops/_cuda.abi3.so does not load ({error}): {build}"
    built = torch.ops.adderops._cuda_version() // 1000
    if built != major:  # torch hands its stream to them, and CUDA's handles must not cross major versions
        return f"they are built with CUDA {built}, this torch with CUDA {torch.version.cuda}: {build}"
    return None


# None where they are registered, whether or not this machine has a GPU
CUDA_KERNELS_MISSING = _load_cuda_kernels()

adder_conv2d = torch.ops.adderops.adder_conv2d.default
adder_conv2d_grad_x = torch.ops.adderops.adder_conv2d_grad_x.default
adder_conv2d_grad_w = torch.ops.adderops.adder_conv2d_grad_w.default
adder_conv2d_int8 = torch.ops.adderops.adder_conv2d_int8.default
integrate_and_fire = torch.ops.adderops.integrate_and_fire.default
quantize = torch.ops.adderops.quantize.default
kernel_moments = torch.ops.adderops._kernel_moments.default
kernel_moments_grad = torch.ops.adderops._kernel_moments_grad.default
mean_abs = torch.ops.adderops._mean_abs.default
match_rows = torch.ops.adderops._match_rows.default
cpu_isa = torch.ops.adderops._cpu_isa.default
cpu_isas = torch.ops.adderops._cpu_isas.default
cuda_archs = torch.ops.adderops._cuda_archs.default  # these two only work with CUDA kernels
cuda_code_for = torch.ops.adderops._cuda_code_for.default


# --- fake kernels: shape, dtype and memory format of the results, for torch.compile and the meta device ---


def _empty_in_format_of(like: Tensor, shape: Sequence[int]) -> Tensor:
    """channels_last when the channels of `like` are its dense dimension, else contiguous; as in csrc/tensors.cpp."""
    channels_last = like.size(1) > 1 and like.stride(1) == 1 and not like.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def output_shape(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Returns the shape (N, C_out, OH, OW) of an adder convolution, unchecked; sizes may be symbolic."""
    height, width = (
        (x.size(2 + i) + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (w.size(2 + i) - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.size(0), w.size(0), height, width


def _checked_shape(
    operator: str,
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    **others: Tensor | None,
) -> tuple[int, ...]:
    """output_shape, or an error as in csrc/checks.cpp.  Only plain integers are checked: symbolic ones get no guard."""

    def refuse(argument: str, expected: str, got: object) -> NoReturn:
        raise RuntimeError(f"{operator}: {argument}: expected {expected}, got {got}")

    for name, tensor in (("x", x), ("w", w)):
        if tensor.dim() != 4:
            refuse(name, "4 dimensions", f"shape {tuple(tensor.shape)}")
    for name, other in (("w", w), *others.items()):
        if other is not None and other.device != x.device:
            refuse(name, f"the device of x, {x.device}", other.device)
    for name, values, count, least in (
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
    ):
        if len(values) != count:
            refuse(name, f"{count} integers", tuple(values))
        if any(isinstance(v, int) and not least <= v < 2**31 for v in values):
            refuse(name, f"integers from {least} to 2^31 - 1", tuple(values))
    shape = output_shape(x, w, stride, padding, dilation)
    if any(isinstance(size, int) and size < 1 for size in shape[2:]):
        refuse("w", "a kernel no larger than the padded input", tuple(w.shape))
    if all(isinstance(size, int) for size in shape) and prod(shape) >= 2**59:
        refuse("result", "fewer than 2^59 elements", f"shape {shape}")
    return shape


@torch.library.register_fake("adderops::adder_conv2d")
def _(x: Tensor, w: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    return _empty_in_format_of(x, _checked_shape("adder_conv2d", x, w, *geometry, bias=bias))


@torch.library.register_fake("adderops::adder_conv2d_int8")
def _(
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
) -> Tensor:
    dtype = torch.int32 if scale is None else torch.uint8 if quantize else torch.float32
    shape = _checked_shape("adder_conv2d_int8", x, w, *geometry, scale=scale, offset=offset, residual=residual)
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.register_fake("adderops::quantize")
def _(x: Tensor, scale: float, zero_point: int, quant_max: int) -> Tensor:
    if x.dim() != 4:
        raise RuntimeError(f"quantize: x: expected 4 dimensions, got shape {tuple(x.shape)}")
    return torch.empty(x.shape, dtype=torch.uint8, device=x.device, memory_format=torch.channels_last)


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a step (T, *) of the tensor is contiguous; as in csrc/integrate_and_fire.h."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


@torch.library.register_fake("adderops::integrate_and_fire")
def _(
    x: Tensor,
    threshold: Tensor,
    initial: Tensor | None,
    decay: float,
    gain: float,
    fire: float,
    subtract: bool,
    scaled: bool,
    *wanted: bool,
) -> list[Tensor]:
    if x.dim() < 2:
        raise RuntimeError(f"integrate_and_fire: x: expected 2 dimensions or more, got shape {tuple(x.shape)}")
    _require_device("integrate_and_fire", x, threshold, *([] if initial is None else [initial]))
    channels_last = x.dim() > 3 and not _is_dense(x) and _is_dense(x.movedim(2, -1))
    dtype = torch.promote_types(x.dtype, torch.float32)

    def empty(images: torch.Size, dtype: torch.dtype) -> Tensor:
        if not channels_last:
            return x.new_empty((*images, *x.shape[2:]), dtype=dtype)
        return x.new_empty((*images, *x.shape[3:], x.size(2)), dtype=dtype).movedim(-1, len(images))

    results = ((x.shape[:2], x.dtype), (x.shape[1:2], dtype), (x.shape[1:2], dtype))
    return [empty(*result) for result, want in zip(results, wanted, strict=True) if want]


@torch.library.register_fake("adderops::adder_conv2d_grad_x")
def _(grad_y: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> Tensor:
    _checked_shape("adder_conv2d_grad_x", x, w, *geometry, grad_y=grad_y)
    return _empty_in_format_of(x, x.shape)


@torch.library.register_fake("adderops::adder_conv2d_grad_w")
def _(grad_y: Tensor, x: Tensor, w: Tensor, *geometry: Any) -> Tensor:
    _checked_shape("adder_conv2d_grad_w", x, w, *geometry, grad_y=grad_y)
    return _empty_in_format_of(w, w.shape)


def _require_lists(operator: str, dims: int, **lists: list[Tensor]) -> None:
    """Raises unless every list has a tensor, and all tensors these dimensions and one device."""
    for name, tensors in lists.items():
        if not tensors:
            raise RuntimeError(f"{operator}: {name}: expected at least one tensor, got none")
        for i, tensor in enumerate(tensors):
            if tensor.dim() != dims:
                shape = tuple(tensor.shape)
                raise RuntimeError(f"{operator}: {name}[{i}]: expected {dims} dimensions, got shape {shape}")
    first, *others = [tensor for tensors in lists.values() for tensor in tensors]
    _require_device(operator, first, *others)


def _require_device(operator: str, first: Tensor, *others: Tensor) -> None:
    for tensor in others:
        if tensor.device != first.device:
            raise RuntimeError(
                f"{operator}: expected all tensors on one device, got {first.device} and {tensor.device}"
            )


@torch.library.register_fake("adderops::_kernel_moments")
def _(student: list[Tensor], teacher: list[Tensor], scales: Tensor, *_: Any) -> Tensor:
    _require_lists("_kernel_moments", 4, student=student, teacher=teacher)
    _require_device("_kernel_moments", student[0], scales)
    channels = [a.size(1) + c.size(1) for a, c in zip(student, teacher, strict=True)]
    return student[0].new_empty(sum((c + 1) * c for c in channels), dtype=torch.float32)


@torch.library.register_fake("adderops::_kernel_moments_grad")
def _(grad: Tensor, student: list[Tensor], teacher: list[Tensor], scales: Tensor, *_: Any) -> list[Tensor]:
    _require_lists("_kernel_moments_grad", 4, student=student, teacher=teacher)
    _require_device("_kernel_moments_grad", student[0], scales, grad)
    return [_empty_in_format_of(y, y.shape) for y in student]


@torch.library.register_fake("adderops::_mean_abs")
def _(x: list[Tensor]) -> Tensor:
    _require_lists("_mean_abs", 4, x=x)
    return x[0].new_empty(len(x), dtype=torch.float32)


@torch.library.register_fake("adderops::_match_rows")
def _(mixed_a: list[Tensor], mixed_c: list[Tensor], w_a: list[Tensor], w_c: list[Tensor], _: float) -> list[Tensor]:
    _require_lists("_match_rows", 3, mixed_a=mixed_a, mixed_c=mixed_c, w_a=w_a, w_c=w_c)
    layers = sum(w.size(0) for w in w_a)
    groups = zip(mixed_a, w_a, w_c, strict=True)
    gradients = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for group in groups for t in group]
    return [mixed_a[0].new_empty(layers), mixed_a[0].new_empty(layers), *gradients]


# --- autograd: AdderNet's training gradients, deliberately not the derivative (see adderops.functional) ---


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, *ctx.geometry = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    needs_x, needs_w, needs_bias, *_ = ctx.needs_input_grad
    return (
        adder_conv2d_grad_x(grad_y, x, w, *ctx.geometry) if needs_x else None,
        adder_conv2d_grad_w(grad_y, x, w, *ctx.geometry) if needs_w else None,
        grad_y.sum((0, 2, 3)) if needs_bias else None,
        *(None for _ in ctx.geometry),
    )


register_autograd(adder_conv2d, _backward, _save_for_backward)


def _save_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    student, teacher, scales, *ctx.options = inputs
    ctx.save_for_backward(scales, *student, *teacher)


def _moments_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    scales, *outputs = ctx.saved_tensors
    student, teacher = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    gradients = kernel_moments_grad(grad, student, teacher, scales, *ctx.options)
    return gradients, [None for _ in teacher], None, *(None for _ in ctx.options)


register_autograd(kernel_moments, _moments_backward, _save_moments)


def _refuse_differentiation(op: OpOverload, reason: str) -> None:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            f"{op._opname}: expected no differentiation of its result, got a backward pass through it; {reason}"
        )

    # without this PyTorch would treat the result as a constant and return wrong gradients
    register_autograd(op, backward)


_NO_SECOND_DERIVATIVE = (
    "the training gradients of the adder convolution are not a derivative, so a second derivative is not defined"
)
_refuse_differentiation(adder_conv2d_grad_x, _NO_SECOND_DERIVATIVE)
_refuse_differentiation(adder_conv2d_grad_w, _NO_SECOND_DERIVATIVE)
_refuse_differentiation(adder_conv2d_int8, "it is for inference; train with adder_conv2d")
_refuse_differentiation(
    integrate_and_fire, "a spike has no derivative; use adderops.spiking.IntegrateAndFire with a gradient"
)
_refuse_differentiation(kernel_moments_grad, "the second derivative of the moments is not implemented")
_refuse_differentiation(mean_abs, "the widths of the kernels are constants of a step")
_refuse_differentiation(match_rows, "it returns its gradients itself")


# --- vmap ---

for _op in (adder_conv2d, adder_conv2d_grad_x, adder_conv2d_int8, quantize):
    register_vmap(_op)
register_vmap(adder_conv2d_grad_w, gradient_of_filters=True)


# --- autocast: float32, unlike F.conv2d.  |y| grows with the number of terms (1e2 to 5e3 in real layers), and what
# distinguishes two outputs is in its last digits: the 8 significant bits of bfloat16 would round off up to 16. ---

for _device in ("cpu", "cuda"):
    torch.library.register_autocast("adderops::adder_conv2d", _device, torch.float32)
    torch.library.register_autocast("adderops::adder_conv2d_int8", _device, torch.float32)  # its scales and residual


# --- FLOP counts, for torch.utils.flop_counter.FlopCounterMode and what is built on it: 2 per term (the subtraction and
# the accumulation), as PyTorch counts 2 per term of a convolution and of each of its gradients ---


def _forward_flops(x_shape: torch.Size, w_shape: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    return 2 * math.prod(out_shape) * math.prod(w_shape[1:])


def _gradient_flops(grad_y_shape: torch.Size, x_shape: torch.Size, w_shape: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(grad_y_shape) * math.prod(w_shape[1:])


def _moments_flops(student_shapes: list[torch.Size], teacher_shapes: list[torch.Size], *_: Any, **__: Any) -> int:
    pairs = zip(student_shapes, teacher_shapes, strict=True)
    return sum(2 * (a[0] * a[2] * a[3]) * (a[1] + c[1]) ** 2 for a, c in pairs)


def _moments_gradient_flops(
    grad_shape: torch.Size, student_shapes: list[torch.Size], teacher_shapes: list[torch.Size], *_: Any, **__: Any
) -> int:
    return sum(2 * math.prod(a) * (a[1] + c[1]) for a, c in zip(student_shapes, teacher_shapes, strict=True))


def _register_flop_formulas() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula([adder_conv2d.overloadpacket, adder_conv2d_int8.overloadpacket])(_forward_flops)
    register_flop_formula([adder_conv2d_grad_x.overloadpacket, adder_conv2d_grad_w.overloadpacket])(_gradient_flops)
    register_flop_formula(kernel_moments.overloadpacket)(_moments_flops)
    register_flop_formula(kernel_moments_grad.overloadpacket)(_moments_gradient_flops)


on_import("torch.utils.flop_counter", _register_flop_formulas)


# --- torch.onnx.export(model, args, dynamo=True): onnxscript holds its translations ---


def _register_onnx_translation() -> None:
    from onnxscript.function_libs.torch_lib.registration import torch_op

    from adderops import _onnx

    torch_op("adderops::adder_conv2d", trace_only=True)(_onnx.adder_conv2d)


on_import("onnxscript.function_libs.torch_lib.ops", _register_onnx_translation)
