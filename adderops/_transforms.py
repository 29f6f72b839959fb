"""Registers the rules of an operator for PyTorch's transformations: reverse- and forward-mode differentiation, vmap.

`register_autograd` replaces `torch.library.register_autograd`: with the latter `torch.func.grad` refuses the operator,
and its forward-mode derivative is silently 0.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd import forward_ad

_Function = Callable[..., Any]

# Tensors whose first dimension has one entry per filter.  All others are (N, C, H, W).
_OF_FILTERS = ("w", "bias", "scale", "offset")


def register_autograd(op: OpOverload, backward: _Function, setup_context: _Function | None = None) -> None:
    """Makes `backward(ctx, grad)` the gradient of an operator, in ordinary autograd and at each level of torch.func.

    Arguments as in `torch.library.register_autograd`, also for lists of tensors, whose gradient is a list. Forward mode
    is refused with an error.
    """
    is_list = [_is_tensor_list(argument.type) for argument in op._schema.arguments]

    def flattened(values: Sequence[Any]) -> list[Any]:
        """A Function sees tensors only where they are arguments themselves."""
        return [v for value, spread in zip(values, is_list, strict=True) for v in (value if spread else [value])]

    def nested(flat: Sequence[Any], lengths: list[int]) -> list[Any]:
        values, rest = [], iter(flat)
        for spread, length in zip(is_list, lengths, strict=True):
            values.append([next(rest) for _ in range(length)] if spread else next(rest))
        return values

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    class Differentiable(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            args = nested(flat[:-1], flat[-1])
            if _transformed():  # a Function turns differentiation off, also for the outer levels
                with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                    result = below_autograd(*args)
            else:
                result = below_autograd(*args)
            if setup_context is not None:
                setup_context(ctx, args, result)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return (*flattened(backward(ctx, *grads)), None)

    apply = Differentiable.apply  # type: ignore[attr-defined]  # which torch does not declare

    def autograd(*args: Any) -> Any:
        flat, transformed = flattened(args), _transformed()
        if transformed or forward_ad._current_level >= 0:
            _refuse_tangents(op, args)
        if not (torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in flat)):
            return below_autograd(*args)
        lengths = [len(arg) if spread else 1 for arg, spread in zip(args, is_list, strict=True)]
        with enable_single_level_autograd_function() if transformed else nullcontext():
            result = apply(*flat, lengths)
        return list(result) if isinstance(result, tuple) else result

    torch.library.impl(op.name(), "Autograd")(autograd)


def _is_tensor_list(argument: Any) -> bool:
    return isinstance(argument, torch.ListType) and isinstance(argument.getElementType(), torch.TensorType)


def _transformed() -> bool:
    """Returns whether this call is inside a transformation of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _refuse_tangents(op: OpOverload, args: tuple[Any, ...]) -> None:
    for argument, value in zip(op._schema.arguments, args, strict=True):
        tensors = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, Tensor)]
        if any(forward_ad.unpack_dual(tensor, level=0).tangent is not None for tensor in tensors):
            raise RuntimeError(
                f"{op._opname}: {argument.name}: expected no forward mode differentiation (jvp, jacfwd, linearize), "
                "got a dual tensor; an adder convolution has training gradients, for reverse mode, and no derivative"
            )


def register_vmap(op: OpOverload, *, gradient_of_filters: bool = False) -> None:
    """Makes `torch.vmap` of a convolution one call: B samples become B times the images, or B times the groups.

    They become images if all samples share the filters. They become groups, concatenated in the channels, if the
    filters differ, and for the gradient of the filters, which is one per sample. In an ensemble, B sets of filters on
    one input with one group, the input is not copied: all filters belong to the one group.
    """
    names = [argument.name for argument in op._schema.arguments]

    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        values, dims = dict(zip(names, args, strict=True)), dict(zip(names, in_dims, strict=True))
        tensors = [name for name in names if isinstance(values[name], Tensor)]
        as_images = not gradient_of_filters and all(dims[name] is None for name in tensors if name in _OF_FILTERS)
        if as_images:
            into = {name: 0 for name in tensors if name not in _OF_FILTERS}
        else:
            into = {name: 0 if name in _OF_FILTERS else 1 for name in tensors}
            if dims["x"] is None and values["groups"] == 1 and op._opname != "adder_conv2d_grad_x":
                del into["x"]
            else:
                values["groups"] *= info.batch_size
        for name, dim in into.items():
            values[name] = _fold(values[name], dims[name], dim, info.batch_size)
        dim = 0 if as_images or gradient_of_filters else 1
        return op(*values.values()).unflatten(dim, (info.batch_size, -1)), dim

    torch.library.register_vmap(op.name(), vmap)


def _fold(tensor: Tensor, batch_dim: int | None, dim: int, batch: int) -> Tensor:
    """Concatenates the samples of a vmapped tensor in dimension `dim` of a sample."""
    if batch_dim is None:
        samples = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], batch, *tensor.shape[dim:])
    else:
        samples = tensor.movedim(batch_dim, dim)
    return samples.flatten(dim, dim + 1)
