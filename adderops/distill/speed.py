"""How far training is from its speed limit: its time, over the least time in which its weights get as far."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Of each network in training, in every row of the log.
COLUMNS = ("speed_ratio", "curvature", "unevenness")
# In place of a learning rate of 0, which moves nothing.
TINY = torch.finfo(torch.float32).tiny


class Trajectory:
    r"""The path of each network's weights through training, step by step.

    A step takes the time :math:`\eta_s`, its learning rate; T is the time of all steps.  The speed limit :math:`T_{SL}`
    is the time in which a straight line at constant speed gets as far with the same action
    :math:`\sum_s |\Delta\theta_s|^2 / \eta_s`:

    .. math:: \frac{T}{T_{SL}} = \frac{\sum_s \eta_s \, \sum_s |\Delta\theta_s|^2 / \eta_s}{|\sum_s \Delta\theta_s|^2}
              = \underbrace{\frac{(\sum_s |\Delta\theta_s|)^2}{|\sum_s \Delta\theta_s|^2}}_{\text{curvature}} \cdot
              \underbrace{\frac{\sum_s \eta_s \, \sum_s |\Delta\theta_s|^2 / \eta_s}
              {(\sum_s |\Delta\theta_s|)^2}}_{\text{unevenness}}

    Both factors are at least 1, by the triangle inequality and that of Cauchy and Schwarz, for any optimizer.  With
    several parameter groups numerators and denominators are sums over them, each with its own learning rates, so that
    a constant factor of a group's rates changes nothing.

    The paper's own form, :math:`T_{SL} = |\theta - \theta_0|^2 / (L_0 - L)`, holds for the gradient flow of the loss
    only.  Momentum, minibatches and weight decay break it, and the gradient of an adder layer is not the derivative of
    the loss by design, so it is not used here.

    What changes weights between the steps (a classifier drawn again, a bound) is no part of the path.  A step that a
    gradient scaler skips is a rest: it takes its time.

    Args:
        networks: by role; parameters that are frozen or not held by the optimizer are left out.
        optimizer: of their parameters.

    Source: Speed Limits for Deep Learning, arXiv 2307.14653; with the action in place of the loss.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    >>> trajectory = Trajectory({"student": network}, optimizer)
    >>> for grad in (-6.0, 2.0):  # 3 there and 1 back
    ...     network.weight.grad = torch.tensor([[grad]])
    ...     with trajectory.step():
    ...         optimizer.step()
    >>> trajectory.columns()
    {'student_speed_ratio': 5.0, 'student_curvature': 4.0, 'student_unevenness': 1.25}
    """

    def __init__(self, networks: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.paths: list[tuple[str, int]] = []  # role and parameter group
        self.sizes: list[int] = []  # numbers of their elements
        self.weights: list[Tensor] = []
        for role, network in networks.items():
            trained = {p for p in network.parameters() if p.requires_grad}
            for i, group in enumerate(optimizer.param_groups):
                if held := [p for p in group["params"] if p in trained]:
                    self.paths.append((role, i))
                    self.sizes.append(sum(p.numel() for p in held))
                    self.weights += held
        device = self.weights[0].device if self.weights else None
        dtype = reduce(torch.promote_types, (p.dtype for p in self.weights), torch.float32)
        # one after the other in one tensor, which takes fewer operations
        self.before, self.displacement = (torch.zeros(sum(self.sizes), dtype=dtype, device=device) for _ in range(2))
        self.rates = torch.zeros(len(self.paths), device=device)
        self.sums = torch.zeros(3, len(self.paths), dtype=torch.float64, device=device)
        self._time, self._length, self._action = self.sums
        self._before = self._by_weight(self.before)

    @contextmanager
    def step(self) -> Iterator[None]:
        """While it is entered, the optimizer makes its step; nothing waits for the device."""
        if not self.weights:
            yield
            return
        with torch.no_grad():
            torch._foreach_copy_(self._before, self.weights)
        yield
        with torch.no_grad():
            torch._foreach_sub_(self._before, self.weights)  # the step, with the other sign
            self.displacement -= self.before
            lengths = self._lengths(self.before)
            for rate, (_, group) in zip(self.rates, self.paths, strict=True):
                lr = self.optimizer.param_groups[group]["lr"]
                rate.fill_(lr.clamp(min=TINY) if isinstance(lr, Tensor) else max(lr, TINY))
            self._time += self.rates
            self._length += lengths
            self._action.addcmul_(lengths, lengths / self.rates)

    def _lengths(self, flat: Tensor) -> Tensor:
        """Returns the norm of each path's elements, (paths)."""
        return torch.stack(torch._foreach_norm(flat.split(self.sizes)))

    def _by_weight(self, flat: Tensor) -> list[Tensor]:
        """Returns views like the weights, also in their memory format."""
        parts = flat.split([p.numel() for p in self.weights])
        return [part.as_strided(p.shape, p.stride()) for part, p in zip(parts, self.weights, strict=True)]

    def columns(self) -> dict[str, float | None]:
        """Returns the ratio and its factors of each network so far; None where it is where it began."""
        row: dict[str, float | None] = {}
        if not self.weights:
            return row
        straight = self._lengths(self.displacement).double()
        squares = torch.stack([straight.square(), self._length.square(), self._time * self._action])
        for role in dict.fromkeys(role for role, _ in self.paths):
            of_role = [i for i, (name, _) in enumerate(self.paths) if name == role]
            distance, path, slow = squares[:, of_role].sum(1).tolist()
            numbers = (slow / distance, path / distance, slow / path) if distance else (None, None, None)
            row |= {f"{role}_{column}": number for column, number in zip(COLUMNS, numbers, strict=True)}
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "displacement": self._by_weight(self.displacement)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`.

        Raises:
            ValueError: the state of other networks.
        """
        own = [self.sums, *self._by_weight(self.displacement)]
        saved = [state["sums"], *state["displacement"]]
        if [t.shape for t in own] != [t.shape for t in saved]:
            raise ValueError("trajectory: expected the shapes of these weights, got others")
        for tensor, value in zip(own, saved, strict=True):
            tensor.copy_(value)


def linear_speed_limit(eigenvalues: Tensor, residuals: Tensor, time: float) -> float:
    r"""Returns the speed limit of a linearised network that gradient flow trains for a time T.

    .. math:: T_{SL} = 2 \sum_k \Delta_k^2 (1 - e^{-\lambda_k T})^2 / \lambda_k \Big/
              \sum_k \Delta_k^2 (1 - e^{-2 \lambda_k T})

    for the loss :math:`|f - y|^2 / 2`: the squared distance of the weights over the fall of the loss.

    Args:
        eigenvalues: (modes) of the neural tangent kernel, :math:`\lambda_k`; those of 0, or below by rounding, learn
            nothing.
        residuals: (modes) components of f - y along its eigenvectors at the beginning, :math:`\Delta_k`.
        time: T > 0; number of steps times learning rate.

    Raises:
        ValueError: arguments that differ in shape, no time, or no mode that learns.

    Source: Speed Limits for Deep Learning, arXiv 2307.14653, its limit without noise.

    >>> x = torch.tensor(2.0)  # one mode: T / T_SL = (x / 2) / tanh(x / 2) with x = T times the eigenvalue
    >>> abs(linear_speed_limit(torch.tensor([4.0]), torch.tensor([3.0]), time=0.5) - 0.5 * torch.tanh(x / 2)) < 1e-6
    tensor(True)
    """
    if eigenvalues.dim() != 1 or eigenvalues.shape != residuals.shape:
        got = f"{tuple(eigenvalues.shape)} and {tuple(residuals.shape)}"
        raise ValueError(f"linear_speed_limit: expected eigenvalues and residuals of one shape (modes), got {got}")
    learns = (eigenvalues > 0) & (residuals != 0)
    if not (time > 0 and learns.any()):
        got = f"{time}, {eigenvalues.tolist()} and {residuals.tolist()}"
        raise ValueError(f"linear_speed_limit: expected time > 0 and an eigenvalue > 0 with a residual, got {got}")
    rates, squares = eigenvalues[learns].double(), residuals[learns].double().square()
    gone = -torch.expm1(-rates * time)
    return float(2 * (squares * gone.square() / rates).sum() / -(squares * torch.expm1(-2 * rates * time)).sum())
