"""AdderNet's adaptive learning rate: the weight steps of an adder layer do not depend on the size of its gradient.

The layers return the raw gradient, and a hook that every `torch.optim.Optimizer` runs just before its step normalizes
it. So loss scaling, clipping, accumulation and averaging over replicas act on ordinary gradients, and the step has the
documented size. If a layer's weight is not a parameter that an optimizer can hold (`torch.func`, an exported program),
the backward pass normalizes instead.

Source: AdderNet, arXiv 1912.13200, section 3.3 (adaptive learning rate scaling).
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
        grad: gradient of the whole weight of one layer, n elements of any shape and floating dtype.
        eta: the desired root mean square, in units of the weight; 0.2 in AdderNet.

    Returns:
        A tensor like `grad`; a zero gradient stays zero.

    Source: AdderNet, arXiv 1912.13200, section 3.3 (equations 12 and 13).

    >>> normalize_gradient(torch.tensor([3.0, -4.0]), eta=0.5)
    tensor([ 0.4243, -0.5657])
    """
    dtype = torch.promote_types(grad.dtype, torch.float32)  # the norm of a float16 gradient may overflow float16
    norm = torch.linalg.vector_norm(grad, dtype=dtype)
    return (grad.to(dtype) * (eta * grad.numel() ** 0.5 / norm.clamp(min=1e-12))).to(grad.dtype)


@torch.no_grad()
def normalize_gradients(parameters: Iterable[Tensor]) -> None:
    """Applies `normalize_gradient` to `.grad` of each adder weight among the parameters, in place.

    `step` of every `torch.optim.Optimizer` does this automatically. Call it before an update of your own. A second call
    changes the last digit at most.

    Args:
        parameters: of any model; parameters that are not adder weights, or have no gradient, stay unchanged.

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
    """Base of the adder layers: a layer with a `weight` whose steps have the size `eta`.

    `forward` of a subclass reads `self.rated_weight()`, once, instead of `self.weight`.

    Attributes:
        weight: the parameter.
        eta: root mean square of the normalized gradient, in units of the weight; None leaves the raw gradient.

    >>> class Scale(AdaptiveRateLayer):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.ones(4))
    ...         self.set_eta(0.2)
    ...
    ...     def forward(self, x):
    ...         return x * self.rated_weight()
    >>> layer = Scale()
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    >>> layer(torch.full((4,), 100.0)).sum().backward()
    >>> optimizer.step()
    >>> layer.weight.detach()
    tensor([0.8000, 0.8000, 0.8000, 0.8000])
    """

    weight: Tensor
    eta: float | None

    def __new__(cls: type[_Layer], *args: Any, **kwargs: Any) -> _Layer:
        layer = super().__new__(cls)  # constructed, copied or unpickled
        _watches[layer] = _Watch()
        return layer

    def set_eta(self, eta: float | None) -> None:
        """Sets `eta`.

        Raises:
            ValueError: not a positive finite number or None.
        """
        if eta is not None and not (isinstance(eta, numbers.Real) and 0 < eta < math.inf):
            raise ValueError(f"{type(self).__name__}: eta: expected a positive finite number or None, got {eta!r}")
        self.eta = None if eta is None else float(eta)

    def rated_weight(self) -> Tensor:
        """Returns the weight; its gradient is normalized in the optimizer's step, or else in the backward pass."""
        weight = self.weight
        if self.eta is None or getattr(self, "_is_replica", False):  # of nn.DataParallel, which sums their gradients
            return weight
        if torch.compiler.is_exporting():
            return _in_exported_program(weight, self.eta) if self.training else weight
        if isinstance(weight, nn.Parameter):
            return _watched(self) if self.training else weight
        return _rated(weight, self.eta)


# --- in the optimizer's step ---


def _normalize(parameters: Iterable[Tensor], grad_scale: Tensor | float | None = None) -> None:
    # looked up at each step: `.to()`, `load_state_dict(assign=True)`, FSDP and others replace parameters
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
    """Normalizes the gradients before a step, or after each call of its closure."""

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
    """Applies the adaptive rate before each `step` of an optimizer that is not a `torch.optim.Optimizer`.

    A `torch.optim.Optimizer` does not need it, nor does an object that wraps one (accelerate's, Lightning's): its step
    applies the rate automatically. For these the constructor only checks that the optimizer holds the weights.

    Args:
        model: contains the adder layers; may be wrapped (DistributedDataParallel, torch.compile).
        optimizer: has `param_groups` like torch's and a `step`, which may take a closure.

    Raises:
        ValueError: the optimizer holds no weight of an adder layer of the model: the model has none, or the optimizer
            holds copies.

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
    """Returns the torch optimizer that an object is or wraps, by the names of accelerate, Lightning and timm."""
    for name in ("optimizer", "_optimizer", "base_optimizer"):
        inner = _torch_optimizer(getattr(optimizer, name)) if hasattr(optimizer, name) else None
        if inner is not None:
            return inner
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


# --- in the backward pass ---


class _NormalizedGradient(torch.autograd.Function):
    """Identity whose backward pass is `normalize_gradient`, also under the transforms of torch.func."""

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
    """`_NormalizedGradient` as an operator, because torch.export keeps operators but no autograd.Function."""
    return weight.clone()


_in_exported_program.register_fake(lambda weight, eta: torch.empty_like(weight))
_in_exported_program.register_autograd(_NormalizedGradient.backward, setup_context=_NormalizedGradient.setup_context)


def _rated(weight: Tensor, eta: float) -> Tensor:
    if isinstance(weight, nn.Parameter) and not torch.compiler.is_compiling():  # in a graph of torch.fx
        _weights_in_graphs[weight] = eta
        return weight
    return _NormalizedGradient.apply(weight, eta)


torch.fx.wrap("_rated")
_weights_in_graphs = WeakTensorKeyDictionary()  # to eta: the layer may no longer exist


# --- weights that something other than an optimizer updates ---


@dataclass
class _Watch:
    """What has been seen of a layer until a step applied its rate, which shows that the training loop is right."""

    stepped: bool = False
    differentiated: bool = False
    values: Tensor | None = None  # the first of the weight, at its last forward


_watches: WeakKeyDictionary[AdaptiveRateLayer, _Watch] = WeakKeyDictionary()
_WATCHED_VALUES = 64


def _watched(layer: AdaptiveRateLayer) -> Tensor:
    """Returns the weight; warns if it has changed after a backward pass without a step of an optimizer."""
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
