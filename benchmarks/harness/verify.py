"""Checks every contestant that claims to be the adder convolution against float64, before anything is timed.

A slice of each result is checked: the last image and four output channels of the forward, the last image and four input
channels of grad_x, two filters and two input channels of grad_w.  The tolerance is derived: the error of a float32 sum
of n terms is at most 9*sqrt(n)*u*sum|terms|, u = eps/2, except with vanishing probability (Higham and Mary, SIAM J.
Sci. Comput. 41, 2019).  The terms are those of the least favourable form: |x|, |w| and 2*min(x, w) in the forward,
|dY*x| and |dY*w| in grad_w.  The operators sum 16-bit floats in float32 and round the sum once, by at most u of the
16-bit type times its size.  The eager formula rounds every step to the 16-bit type.
"""

import math

import torch
from torch import Tensor

from harness.layers import Layer
from harness.peers import columns, eager_forward, eager_gradients


def _excess(name: str, got: Tensor, want: Tensor, sums: Tensor, n: int, steps_in: torch.dtype) -> float:
    """max |got - want| / tolerance; ends the program if it is above 1."""
    tolerance = 9 * math.sqrt(n) * (torch.finfo(steps_in).eps / 2) * sums
    if got.dtype != torch.float32:
        half = torch.finfo(got.dtype)
        tolerance = tolerance * (1 + half.eps) + half.eps / 2 * want.abs() + half.smallest_normal * half.eps
    error = (got.double() - want).abs()
    worst = float((error / tolerance).max())
    if not worst <= 1:  # NaN is wrong too
        raise SystemExit(f"{name}: wrong result, error {float(error.max()):.3g} is {worst:.3g} times the tolerance")
    return worst


def check_forward(
    what: str, layer: Layer, x: Tensor, w: Tensor, y: Tensor, steps_in: torch.dtype = torch.float32
) -> float:
    """Returns the largest error divided by its tolerance; ends the program if that is above 1.

    Args:
        steps_in: the dtype of the terms and their sums.
    """
    x, w = x[-1:].double(), w[:4].double()
    windows, filters = columns(layer, x).unsqueeze(1), w.flatten(1)[:, :, None]
    sums = (windows.abs() + filters.abs() + 2 * torch.minimum(windows, filters).abs()).sum(2)
    y = y[-1:, :4].flatten(2)
    want = eager_forward(layer, x, w).flatten(2)
    return _excess(f"{layer.name} {what} forward", y, want, sums, 3 * windows.size(2), steps_in)


def check_gradients(
    what: str,
    layer: Layer,
    x: Tensor,
    w: Tensor,
    grad_y: Tensor,
    grad_x: Tensor | None,
    grad_w: Tensor | None,
    steps_in: torch.dtype = torch.float32,
) -> float:
    """The same for the training gradients; a gradient that is None is not checked."""
    worst = 0.0
    x, w, grad_y = x.double(), w.double(), grad_y.double()
    if grad_x is not None:
        want, _ = eager_gradients(layer, x[-1:, :4], w[:, :4], grad_y[-1:])
        # one term per (filter, tap) pair, each at most |dY|: sum every |dY| under every tap
        taps = torch.ones_like(w[:, :1])
        sums = torch.nn.grad.conv2d_input(
            want[:, :1].shape, taps, grad_y[-1:].abs(), stride=layer.stride, padding=layer.padding
        )
        sums = sums + torch.finfo(torch.float32).tiny  # pixels under no window are exactly zero
        n = layer.c_out * layer.kernel**2
        worst = max(worst, _excess(f"{layer.name} {what} grad_x", grad_x[-1:, :4], want, sums, n, steps_in))
    if grad_w is not None:
        x, w, grad_y = x[:, :2], w[:2, :2], grad_y[:, :2]
        _, want = eager_gradients(layer, x, w, grad_y)
        products = columns(layer, x.abs()).unsqueeze(1) * grad_y.abs().flatten(2).unsqueeze(2)
        fixes = w.abs() * grad_y.abs().sum((0, 2, 3))[:, None, None, None]
        sums = products.sum((0, 3)).view_as(w) + fixes
        n = 2 * layer.batch * layer.out_size**2
        worst = max(worst, _excess(f"{layer.name} {what} grad_w", grad_w[:2, :2], want, sums, n, steps_in))
    return worst
