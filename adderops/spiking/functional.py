"""The operator of spiking networks: neurons that integrate their input over time steps and fire."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adderops import _ops

OUTPUTS = ("spikes", "counts", "membrane")
RESETS = ("subtract", "zero")


def integrate_and_fire(
    input: Tensor,
    threshold: Tensor | float = 1.0,
    initial: Tensor | float | None = None,
    *,
    decay: float = 1.0,
    gain: float = 1.0,
    reset: str = "subtract",
    fire: float = 1.0,
    scaled: bool = False,
    returns: str | Sequence[str] = "spikes",
) -> Any:
    r"""Runs integrate-and-fire neurons over all time steps in one call; leaky ones for decay < 1.

    .. math:: u \leftarrow decay\,u + gain\,x_t, \quad s_t = [u \ge fire\,V], \quad
              u \leftarrow u - V s_t \text{ (subtract) or } u\,(1 - s_t) \text{ (zero)}

    The membrane u is float32 also for half inputs. For a constant input r >= 0, initial >= (fire - 1) V, decay = gain
    = 1, and subtraction, the count of a neuron is clip(floor((T r + initial + (1 - fire) V) / V), 0, T).

    Args:
        input: (T, N, ...), the current of each step; float32, float64, bfloat16 or float16. A current that is the same
            in all steps may be expanded (stride 0).
        threshold: V, positive: a number, (C) per channel or input.shape[2:] per neuron.
        initial: u before the first step, as threshold or input.shape[1:]; 0 by default.
        decay: factor of u per step, above 0 and at most 1.
        gain: factor of the input.
        reset: 'subtract' or 'zero'.
        fire: share of the threshold at which a neuron fires; it loses the whole threshold.
        scaled: spikes have the value V instead of 1; counts do not change.
        returns: 'spikes' (T, N, ...) in the dtype of the input, 'counts' (N, ...), 'membrane' (N, ...) after the last
            step, both float32 or, for float64, float64; or several of these names, for a list in their order.

    Raises:
        TypeError: input is no floating-point tensor.
        ValueError: a number out of range, an unknown name, a shape that does not fit.

    It has no gradient: `IntegrateAndFire` has, if asked for one.

    >>> x = torch.tensor([0.75, 0.75, 0.75]).view(3, 1, 1)
    >>> spikes, membrane = integrate_and_fire(x, returns=("spikes", "membrane"))
    >>> spikes.flatten(), membrane
    (tensor([0., 1., 1.]), tensor([[0.2500]]))
    """
    names = (returns,) if isinstance(returns, str) else tuple(returns)
    _check(input, decay, gain, reset, fire, names)
    dtype = torch.promote_types(input.dtype, torch.float32)
    threshold = _parameter("threshold", threshold, input, dtype)
    initial = None if initial is None else _parameter("initial", initial, input, dtype)
    wanted = [name in names for name in OUTPUTS]
    subtract = reset == "subtract"
    outputs = _ops.integrate_and_fire(input, threshold, initial, decay, gain, fire, subtract, scaled, *wanted)
    in_order = [outputs[sum(wanted[: OUTPUTS.index(name)])] for name in names]
    return in_order[0] if isinstance(returns, str) else in_order


def _check(input: Tensor, decay: float, gain: float, reset: str, fire: float, names: Sequence[str]) -> None:
    if not isinstance(input, Tensor) or not input.is_floating_point():
        got = input.dtype if isinstance(input, Tensor) else type(input).__name__
        raise TypeError(f"integrate_and_fire: input: expected a floating-point tensor, got {got}")
    if input.dim() < 2:
        raise ValueError(f"integrate_and_fire: input: expected shape (T, N, ...), got {tuple(input.shape)}")
    if not 0 < decay <= 1:
        raise ValueError(f"integrate_and_fire: decay: expected above 0 and at most 1, got {decay}")
    for name, value in (("gain", gain), ("fire", fire)):
        if not 0 < value < math.inf:
            raise ValueError(f"integrate_and_fire: {name}: expected a positive finite number, got {value}")
    if reset not in RESETS:
        raise ValueError(f"integrate_and_fire: reset: expected one of {', '.join(RESETS)}, got {reset!r}")
    if not names or len(set(names)) < len(names) or not set(names) <= set(OUTPUTS):
        raise ValueError(f"integrate_and_fire: returns: expected some of {', '.join(OUTPUTS)}, got {names}")


def _parameter(name: str, value: Tensor | float, input: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a threshold or an initial membrane as a tensor of a shape that the operator takes."""
    tensor = torch.as_tensor(value, dtype=dtype, device=input.device)
    shapes = [(), (1,), input.shape[2:]] + [input.shape[2:3]] * (input.dim() > 2)
    if name == "initial":
        shapes.append(input.shape[1:])
    if tuple(tensor.shape) not in [tuple(shape) for shape in shapes]:  # no set: sizes in torch.export have no hash
        raise ValueError(
            f"integrate_and_fire: {name}: expected a number, one per channel or one per neuron of an input of shape "
            f"{tuple(input.shape)}, got shape {tuple(tensor.shape)}"
        )
    return tensor
