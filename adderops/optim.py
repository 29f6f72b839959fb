"""The fixed rate of AdderNet: every adder layer takes weight steps of the same size, whatever its gradient's.

One rule: the layers hand over the raw gradient, and a hook that every `torch.optim.Optimizer` runs just before its step
normalizes it.  So loss scaling, clipping, accumulation and averaging over replicas act on ordinary gradients, and the
step is the documented one.  Where a layer's weight is not a parameter that an optimizer could hold (`torch.func`, an
exported program) the backward pass normalizes instead.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary


def normalize_gradient(grad: Tensor, eta: float) -> Tensor:
    r"""Returns the gradient scaled to a root mean square of `eta`.

    .. math:: \eta \sqrt{n} \; g \; / \max(\lVert g \rVert_2, 10^{-12})

    Args:
        grad: gradient of a whole layer's weight, of any shape and floating dtype, n elements in all.
        eta: the root mean square wanted, in units of the weight; 0.2 in AdderNet.

    Returns:
        A tensor like `grad`; a zero gradient stays zero.

    Source: AdderNet, arXiv 1912.13200, section 3.3 (equations 12 and 13).

    >>> normalize_gradient(torch.tensor([3.0, -4.0]), eta=0.5)
    tensor([ 0.4243, -0.5657])
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)  # the norm of many halves may leave the range of a half
    norm = torch.linalg.vector_norm(grad, dtype=dtype)
    return (grad.to(dtype) * (eta * grad.numel() ** 0.5 / norm.clamp(min=1e-12))).to(grad.dtype)


@torch.no_grad()
def normalize_gradients(parameters: Iterable[Tensor]) -> None:
    """Applies `normalize_gradient` to `.grad` of every adder weight among the parameters, in place.

    `step` of every `torch.optim.Optimizer` does this by itself; call it before an update of your own.  A second call
    changes nothing but the last digit.

    Args:
        parameters: of any model; what is no adder weight, or has no gradient, stays as it is.

    >>> from adderops import AdderLinear
    >>> layer = AdderLinear(4, 2, eta=0.2)
    >>> layer(torch.randn(8, 4)).sum().backward()
    >>> normalize_gradients(layer.parameters())
    >>> with torch.no_grad():
    ...     layer.weight -= 0.1 * layer.weight.grad
    >>> print(f"{layer.weight.grad.square().mean().sqrt():.4f}")
    0.2000
    """
    _normalize(parameters)


_Layer = TypeVar("_Layer", bound="AdaptiveRateLayer")


class AdaptiveRateLayer(nn.Module):
    """A layer with a `weight` and an `eta`: the base of the adder layers.

    `forward` of a subclass calls `self.rated_weight()` once in place of `self.weight`.
    """

    weight: Tensor
    eta: float | None

    def __new__(cls: type[_Layer], *args: Any, **kwargs: Any) -> _Layer:
        layer = super().__new__(cls)  # constructed, copied or unpickled
        _watches[layer] = _Watch()
        return layer

    def set_eta(self, eta: float | None) -> None:
        if eta is not None and not (isinstance(eta, numbers.Real) and 0 < eta < math.inf):
            raise ValueError(f"{type(self).__name__}: eta: expected a positive finite number or None, got {eta!r}")
        self.eta = None if eta is None else float(eta)

    def rated_weight(self) -> Tensor:
        """The weight; its gradient gets the rate in the optimizer's step, or else in the backward pass."""
        weight = self.weight
        if self.eta is None or getattr(self, "_is_replica", False):  # of nn.DataParallel: gradients are summed up
            return weight
        if torch.compiler.is_exporting():
            return _in_exported_program(weight, self.eta) if self.training else weight
        if isinstance(weight, nn.Parameter):
            return _watched(self) if self.training else weight
        return _rated(weight, self.eta)


# --- in the optimizer's step ---


def _normalize(parameters: Iterable[Tensor], grad_scale: Tensor | float | None = None) -> None:
    # looked up each time: `.to()`, `load_state_dict(assign=True)`, FSDP and others replace parameters
    layers = {id(layer.__dict__.get("_parameters", {}).get("weight")): layer for layer in list(_watches)}
    for parameter in parameters:
        if parameter.grad is None:
            continue
        layer = layers.get(id(parameter))
        eta = layer.eta if layer is not None else _weights_in_graphs.get(parameter)
        if layer is not None:
            _watches[layer].stepped = True
        if eta is not None:
            grad = normalize_gradient(parameter.grad, eta)
            # in place: the gradient may be a view into a bucket of DistributedDataParallel
            parameter.grad.copy_(grad if grad_scale is None else grad * grad_scale)


@torch.no_grad()
def _normalize_held(optimizer: Any) -> None:
    # a fused step divides by the loss scale inside its kernel
    scale = getattr(optimizer, "grad_scale", None)
    for group in optimizer.param_groups:
        _normalize(group["params"], scale)


_Args = tuple[Any, ...]
_Kwargs = dict[str, Any]


def _before_step(optimizer: Any, args: _Args, kwargs: _Kwargs) -> tuple[_Args, _Kwargs] | None:
    """Normalizes the gradients that the step finds, or those that each call of its closure leaves."""

    def and_normalize(closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_and_normalize() -> Any:
            loss = closure()
            _normalize_held(optimizer)
            return loss

        return closure_and_normalize

    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": and_normalize(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
        return (args[0], and_normalize(args[1]), *args[2:]), kwargs
    _normalize_held(optimizer)
    return None


register_optimizer_step_pre_hook(_before_step)


class AdaptiveRate:
    """Applies the rate before each `step` of an optimizer that is no `torch.optim.Optimizer` and wraps none.

    A `torch.optim.Optimizer` needs no such object, nor does what wraps one (accelerate's, Lightning's): its step
    applies the rate by itself.  There the constructor only checks that it holds the weights.

    Args:
        model: holds the adder layers; may be wrapped (DistributedDataParallel, torch.compile).
        optimizer: has `param_groups` as torch's and a `step`, which may take a closure.

    Raises:
        ValueError: the optimizer holds no weight of an adder layer of the model: there is none, or it has copies.

    >>> from adderops import AdderLinear
    >>> class Descent:
    ...     def __init__(self, parameters, lr):
    ...         self.param_groups = [{"params": list(parameters), "lr": lr}]
    ...
    ...     def step(self):
    ...         for group in self.param_groups:
    ...             for parameter in group["params"]:
    ...                 parameter.data -= group["lr"] * parameter.grad
    >>> layer = AdderLinear(4, 2, eta=0.2)
    >>> optimizer = Descent(layer.parameters(), lr=1.0)
    >>> rate = AdaptiveRate(layer, optimizer)
    >>> layer(torch.randn(8, 4)).sum().backward()
    >>> before = layer.weight.detach().clone()
    >>> optimizer.step()
    >>> print(f"{(layer.weight - before).square().mean().sqrt():.4f}")
    0.2000
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        inner = _torch_optimizer(optimizer)
        held = {id(parameter) for group in (inner or optimizer).param_groups for parameter in group["params"]}
        if not any(isinstance(m, AdaptiveRateLayer) and id(m.weight) in held for m in model.modules()):
            raise ValueError(
                "AdaptiveRate: optimizer: expected one with the weight of an adder layer of model, got none"
            )
        if inner is None:
            step = optimizer.step

            def rated_step(*args: Any, **kwargs: Any) -> Any:
                given = (optimizer, *args), kwargs
                (_, *others), named = _before_step(optimizer, *given) or given
                return step(*others, **named)

            optimizer.step = rated_step


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer of torch that an object is, or holds under the names that accelerate, Lightning and timm use."""
    for name in ("optimizer", "_optimizer", "base_optimizer"):
        inner = _torch_optimizer(getattr(optimizer, name)) if hasattr(optimizer, name) else None
        if inner is not None:
            return inner
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


# --- in the backward pass ---


class _NormalizedGradient(torch.autograd.Function):
    """Identity whose backward is `normalize_gradient`, under the transforms of torch.func too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, eta: float) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.eta = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return normalize_gradient(grad, ctx.eta), None


@torch.library.custom_op("adderops::_normalized_gradient", mutates_args=())
def _in_exported_program(weight: Tensor, eta: float) -> Tensor:
    """The same as an operator, because torch.export keeps operators and no autograd.Function."""
    return weight.clone()


_in_exported_program.register_fake(lambda weight, eta: torch.empty_like(weight))
_in_exported_program.register_autograd(_NormalizedGradient.backward, setup_context=_NormalizedGradient.setup_context)


def _rated(weight: Tensor, eta: float) -> Tensor:
    if isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling():  # in a graph made by torch.fx
        _weights_in_graphs[weight] = eta
        return weight
    return _NormalizedGradient.apply(weight, eta)


torch.fx.wrap("_rated")
_weights_in_graphs = WeakTensorKeyDictionary()  # eta of each: its layer may be gone


# --- weights that somebody else moves ---


@dataclass
class _Watch:
    """What is known of a layer until a step has applied its rate: from then on its loop is known to be right."""

    stepped: bool = False
    differentiated: bool = False
    values: Tensor | None = None  # some of the weight's, from its last forward


_watches: WeakKeyDictionary[AdaptiveRateLayer, _Watch] = WeakKeyDictionary()
_WATCHED_VALUES = 64


def _watched(layer: AdaptiveRateLayer) -> Tensor:
    """The weight; warns if it has changed behind a backward pass and no optimizer's step has been seen."""
    weight = layer.weight
    traced = torch.compiler.is_compiling() or torch.jit._trace.is_tracing() or type(weight) is not nn.Parameter
    if traced or not (torch.is_grad_enabled() and weight.requires_grad) or weight.is_meta:
        return weight
    watch = _watches[layer]
    if watch.stepped or (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
        return weight
    values = weight.detach().flatten()[:_WATCHED_VALUES].clone()
    before = watch.values
    if watch.differentiated and before is not None and before.shape == values.shape and not before.equal(values):
        warnings.warn(
            f"{type(layer).__name__}: weight: expected steps of a torch.optim.Optimizer that holds it, got a change "
            f"after a backward pass without one, so the rate eta={layer.eta} was not applied: call "
            "adderops.optim.normalize_gradients(model.parameters()) before each update",
            stacklevel=4,
        )
        watch.stepped = True
        return weight
    watch.values = values

    def note(grad: Tensor) -> None:
        watch.differentiated = True

    view = weight.view_as(weight)
    view.register_hook(note)
    return view
