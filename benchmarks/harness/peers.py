"""The peers of the adder convolution: the eager reference formula, and unfold + cdist.

A forward takes (layer, x, w).  A whole step takes (layer, x, w, grad_y) and returns (y, grad_x, grad_w).  The gradients
of the eager formula are AdderNet's training gradients, which are deliberately not the derivative.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.layers import Layer


def columns(layer: Layer, x: Tensor) -> Tensor:
    """(N, K, OH*OW): the input under every tap."""
    return F.unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)


def _image(layer: Layer, y: Tensor) -> Tensor:
    return y.unflatten(2, (layer.out_size, layer.out_size))


def eager_forward(layer: Layer, x: Tensor, w: Tensor) -> Tensor:
    """Y = -sum_k |x - w| through one broadcast temporary of N*C_out*K*OH*OW numbers, the usual way to write it."""
    return _image(layer, -(columns(layer, x).unsqueeze(1) - w.flatten(1)[:, :, None]).abs().sum(2))


def eager_gradients(layer: Layer, x: Tensor, w: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """dX = sum_co dY*clamp(w - x, -1, 1), folded back; dW = sum_p dY*(x - w)."""
    difference = columns(layer, x).unsqueeze(1) - w.flatten(1)[:, :, None]  # (N, C_out, K, P)
    grad_y = grad_y.flatten(2).unsqueeze(2)  # (N, C_out, 1, P)
    grad_w = (difference * grad_y).sum((0, 3)).view_as(w)
    grad_columns = -(difference.clamp_(-1, 1) * grad_y).sum(1)
    return F.fold(grad_columns, x.shape[2:], layer.kernel, padding=layer.padding, stride=layer.stride), grad_w


def eager_step(layer: Layer, x: Tensor, w: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return eager_forward(layer, x, w), *eager_gradients(layer, x, w, grad_y)


def has_cdist(dtype: torch.dtype) -> bool:
    """torch.cdist takes no 16-bit floats."""
    return dtype in (torch.float32, torch.float64)


def cdist_forward(layer: Layer, x: Tensor, w: Tensor) -> Tensor:
    """Y = -cdist(windows, filters, p=1)."""
    return _image(layer, -torch.cdist(columns(layer, x).mT, w.flatten(1), p=1.0).mT)


def cdist_step(layer: Layer, x: Tensor, w: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients are autograd's: signs, not the training gradients."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = cdist_forward(layer, x, w)
    return y.detach(), *torch.autograd.grad(y, (x, w), grad_y)
