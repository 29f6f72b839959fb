"""Spiking neurons as a module, with the gradients that networks of them are trained by."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from adderops.spiking.functional import integrate_and_fire

Surrogate = Callable[[Tensor], Tensor]


class IntegrateAndFire(nn.Module):
    r"""Integrate-and-fire neurons, (T, N, ...) -> (T, N, ...); leaky ones for decay < 1.

    The formula is that of `integrate_and_fire`. The membrane is kept until `reset()`, so that a sequence may come in
    parts.

    Args:
        threshold: V, a number, or a tensor (C) per channel or (C, ...) per neuron.
        initial: u after `reset()`, in the same shapes.
        decay, gain, reset, fire, scaled: see `integrate_and_fire`.
        gradient: None: a backward pass raises an error. 'rate': the gradient of the clamp that the rate of the spikes
            stands for (see below), for input and threshold. A function: the spike s(u - fire V) with a surrogate
            gradient, such as those of snntorch.surrogate and spikingjelly.activation_based.surrogate; autograd then
            goes back through all steps.
        learn: the threshold is a parameter; otherwise a buffer.
        least: in training the threshold is kept at least at this.

    With weights :math:`w_t = decay^{T-t}`, the weighted mean of `scaled` spikes is close to

    .. math:: clamp(gain\,r, 0, V), \quad r = \sum_t w_t x_t / \sum_t w_t

    and 'rate' is the gradient of this clamp, deliberately not that of the spikes, which is 0 almost everywhere: with g
    the sum over the steps of the output's gradient (of decay < 1, T times its weighted mean),

    .. math:: dx_t = \frac{gain\,g}{T}\,[0 \le gain\,r \le V], \quad dV = \sum g\,[gain\,r > V]

    Source: DSR, arXiv 2205.00459, and its code, where dV of leaky neurons has another factor.

    Raises:
        ValueError: as `integrate_and_fire`; in the constructor 'rate' without `scaled`, or another name.

    >>> neuron = IntegrateAndFire(2.0, scaled=True, gradient="rate", learn=True)
    >>> x = torch.tensor([1.5, 1.5, 9.0, 9.0]).view(2, 2, 1).transpose(0, 1).requires_grad_()  # 2 steps, 2 neurons
    >>> neuron(x).sum().backward()
    >>> x.grad.flatten(), neuron.threshold.grad
    (tensor([1., 0., 1., 0.]), tensor(2.))
    """

    threshold: Tensor
    initial: Tensor

    def __init__(
        self,
        threshold: Tensor | float = 1.0,
        *,
        initial: Tensor | float = 0.0,
        decay: float = 1.0,
        gain: float = 1.0,
        reset: str = "subtract",
        fire: float = 1.0,
        scaled: bool = False,
        gradient: str | Surrogate | None = None,
        learn: bool = False,
        least: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(gradient, str) and gradient != "rate":
            raise ValueError(f"IntegrateAndFire: gradient: expected None, 'rate' or a function, got {gradient!r}")
        if gradient == "rate" and not (scaled and reset == "subtract"):
            raise ValueError("IntegrateAndFire: gradient: expected scaled=True and reset='subtract' with 'rate'")
        if not isinstance(threshold, Tensor) and not 0 < threshold < math.inf:
            raise ValueError(f"IntegrateAndFire: threshold: expected a positive finite number, got {threshold}")
        value = torch.as_tensor(threshold, dtype=torch.get_default_dtype())
        if learn:
            self.threshold = nn.Parameter(value)
        else:
            self.register_buffer("threshold", value)
        self.register_buffer("initial", torch.as_tensor(initial, dtype=torch.get_default_dtype()))
        self.decay, self.gain, self.reset_to, self.fire, self.scaled = decay, gain, reset, fire, scaled
        self.gradient, self.least = gradient, least
        self.membrane: Tensor | None = None

    def reset(self) -> None:
        """Starts again at the initial membrane."""
        self.membrane = None

    def forward(self, input: Tensor) -> Tensor:
        """Returns the spikes (T, N, ...) of the currents (T, N, ...)."""
        if self.training and self.least > 0:
            with torch.no_grad():
                self.threshold.clamp_(min=self.least)
        initial = self.initial if self.membrane is None else self.membrane
        if callable(self.gradient):
            spikes, membrane = self._steps(input, initial, self.gradient)
        elif self.gradient == "rate":
            spikes, membrane = _RateGradient.apply(input, self.threshold, initial, self.decay, self.gain, self.fire)
        else:
            spikes, membrane = self._run(input, initial)
        self.membrane = membrane
        return spikes

    def _run(self, input: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        return integrate_and_fire(
            input,
            self.threshold,
            initial,
            decay=self.decay,
            gain=self.gain,
            reset=self.reset_to,
            fire=self.fire,
            scaled=self.scaled,
            returns=("spikes", "membrane"),
        )

    def _steps(self, input: Tensor, initial: Tensor, spike: Surrogate) -> tuple[Tensor, Tensor]:
        """The same in PyTorch, step by step, for autograd."""
        v, u = (
            over_neurons(value, input).to(torch.promote_types(input.dtype, torch.float32))
            for value in (self.threshold, initial)
        )
        spikes = []
        for x in input:
            u = self.decay * u + self.gain * x.to(v.dtype)
            s = spike(u - self.fire * v)
            u = u - v * s if self.reset_to == "subtract" else u * (1 - s)
            spikes.append(s * v if self.scaled else s)
        return torch.stack(spikes).to(input.dtype), u

    def extra_repr(self) -> str:
        shown = f"{self.threshold.item():g}" if self.threshold.numel() == 1 else tuple(self.threshold.shape)
        return f"threshold={shown}, decay={self.decay}, reset={self.reset_to!r}, scaled={self.scaled}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("threshold", "initial"):  # of another shape: per channel or per neuron
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if isinstance(saved, Tensor) and saved.shape != own.shape:
                own.data = own.data.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def over_neurons(value: Tensor, input: Tensor) -> Tensor:
    """Returns a threshold or membrane in a shape that broadcasts against a step of the input."""
    per_channel = value.dim() == 1 and value.numel() > 1 and input.dim() > 3
    return value.view(-1, *(1 for _ in input.shape[3:])) if per_channel else value


class _RateGradient(torch.autograd.Function):
    """Spikes forward, the clamp of the rate backward: see `IntegrateAndFire`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: Tensor, initial: Tensor, decay: float, gain: float, fire: float
    ) -> tuple[Tensor, Tensor]:
        spikes, membrane = integrate_and_fire(
            x, threshold, initial, decay=decay, gain=gain, fire=fire, scaled=True, returns=("spikes", "membrane")
        )
        ctx.save_for_backward(_weighted_mean(x, decay) * gain, threshold)
        ctx.decay, ctx.gain, ctx.steps = decay, gain, len(x)
        ctx.mark_non_differentiable(membrane)
        return spikes, membrane

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        rate, threshold = ctx.saved_tensors
        v = over_neurons(threshold, grad)
        g = _weighted_mean(grad, ctx.decay) * ctx.steps
        inside = g * ((rate >= 0) & (rate <= v)) * (ctx.gain / ctx.steps)
        of_input = inside.to(grad.dtype).expand(grad.shape) if ctx.needs_input_grad[0] else None
        of_threshold = (g * (rate > v)).sum_to_size(v.shape).view(threshold.shape) if ctx.needs_input_grad[1] else None
        return of_input, of_threshold, None, None, None, None


def _weighted_mean(x: Tensor, decay: float) -> Tensor:
    """Returns the mean over the steps with weights decay^(T - t), in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if decay == 1:
        return x.mean(0, dtype=dtype)
    weights = torch.tensor([decay**t for t in reversed(range(len(x)))], dtype=dtype, device=x.device)
    return torch.einsum("t,t...->...", weights / weights.sum(), x.to(dtype))
