"""The adaptive rate of AdderNet: every adder layer takes weight steps of the same size, whatever its gradient's.

There is one formula, `normalize_gradient`, and two places for it.  By default each layer applies it in its own
backward pass, so that a model with adder layers trains under any stock optimizer.  `AdaptiveRate` applies it just
before `optimizer.step()` instead, where the gradient is whole: exact under gradient accumulation and data parallelism.
"""

import torch
from torch import Tensor, nn


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


class _NormalizedGradient(torch.autograd.Function):
    """Identity whose backward is `normalize_gradient`: a function, not a hook, so that copies of a layer keep it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, eta: float) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.eta = inputs[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return normalize_gradient(grad, ctx.eta), None


class AdaptiveRateLayer(nn.Module):
    """A layer with a `weight` and an `eta`: the base of the adder layers, and what `AdaptiveRate` looks for.

    `forward` of a subclass calls `self.rated_weight()` once in place of `self.weight`.
    """

    weight: nn.Parameter
    eta: float | None
    _rate_taken_over = False  # True in layers whose gradients an AdaptiveRate normalizes

    def set_eta(self, eta: float | None) -> None:
        if eta is not None and not (isinstance(eta, (int, float)) and eta > 0):
            raise ValueError(f"{type(self).__name__}: eta: expected a positive number or None, got {eta!r}")
        self.eta = eta

    def rated_weight(self) -> Tensor:
        if self.eta is None or self._rate_taken_over or torch.jit.is_tracing():
            return self.weight
        return _NormalizedGradient.apply(self.weight, self.eta)

    def __getstate__(self) -> dict:
        # A copy has an optimizer of its own, or none: it does not inherit the AdaptiveRate.
        return {name: value for name, value in self.__dict__.items() if name != "_rate_taken_over"}


class AdaptiveRate:
    """Normalizes the weight gradients of a model's adder layers just before each step of an optimizer.

    From construction to `remove()` the layers hand over raw gradients, which add up over micro-batches and average
    over replicas as gradients do, and each `optimizer.step()` applies `normalize_gradient(grad, layer.eta)` once to the
    result.  Layers with `eta=None` keep the raw gradient.  A closure given to `step` is normalized at each evaluation.

    Args:
        model: holds the adder layers; may be wrapped (DistributedDataParallel, torch.compile).
        optimizer: any `torch.optim.Optimizer`; the layers whose weight it holds are taken over.

    Raises:
        ValueError: the optimizer holds no adder weight of the model, or another AdaptiveRate has the layer already.

    With `torch.amp.GradScaler` and a fused optimizer call `scaler.unscale_(optimizer)` before `scaler.step(optimizer)`:
    a fused step removes the loss scale itself, after the normalization that has removed it already.

    >>> from adderops import AdderLinear
    >>> layer = AdderLinear(4, 2, eta=0.2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    >>> rate = AdaptiveRate(layer, optimizer)
    >>> for micro_batch in torch.randn(3, 8, 4):
    ...     layer(micro_batch).sum().backward()
    >>> before = layer.weight.detach().clone()
    >>> optimizer.step()
    >>> print(f"{(layer.weight - before).square().mean().sqrt():.4f}")
    0.2000
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._layers = [m for m in model.modules() if isinstance(m, AdaptiveRateLayer) and id(m.weight) in held]
        if not self._layers:
            raise ValueError(
                "AdaptiveRate: optimizer: expected one with the weight of an adder layer of model, got none"
            )
        if any(layer._rate_taken_over for layer in self._layers):
            raise ValueError(
                "AdaptiveRate: model: expected layers without one, got layers that another AdaptiveRate has"
            )
        for layer in self._layers:
            layer._rate_taken_over = True
        self._hook = optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Gives the scaling back to the layers."""
        self._hook.remove()
        for layer in self._layers:
            layer._rate_taken_over = False
        self._layers = []

    @torch.no_grad()
    def _normalize(self) -> None:
        layer_of_weight = {id(layer.weight): layer for layer in self._layers}  # a shared weight is normalized once
        for layer in layer_of_weight.values():
            if layer.eta is not None and layer.weight.grad is not None:
                # in place: the gradient may be a view into a bucket of DistributedDataParallel
                layer.weight.grad.copy_(normalize_gradient(layer.weight.grad, layer.eta))

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        closure = kwargs.get("closure") or next(iter(args[1:]), None)  # args[0] is the optimizer
        if closure is None:
            self._normalize()
            return None

        def closure_and_normalize():
            loss = closure()
            self._normalize()
            return loss

        return args[:1], {**kwargs, "closure": closure_and_normalize}
