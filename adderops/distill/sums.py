"""Sums over the images of a step or an epoch, on the device of the networks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from adderops.distill import distributed
from adderops.distill.evaluate import correct
from adderops.distill.methods import Losses


class Sums:
    """Sums by name, in float64 on a device: to add to them does not wait for the device, to read them does.

    Args:
        names: of the values.
        values: (names).

    >>> sums = Sums.of({"loss": 1.5}, torch.device("cpu"))
    >>> sums += Sums(["loss"], torch.tensor([2.0]))
    >>> sums.read()
    {'loss': 3.5}
    """

    def __init__(self, names: list[str], values: Tensor) -> None:
        self.names, self.values = names, values

    @classmethod
    def of(cls, values: Mapping[str, float], device: torch.device) -> "Sums":
        """Returns sums that begin with these values."""
        return cls(list(values), torch.tensor(list(values.values()), dtype=torch.float64, device=device))

    def __iadd__(self, other: "Sums") -> "Sums":
        if not self.names:
            return other
        names = list(dict.fromkeys([*self.names, *other.names]))
        return Sums(names, self._as(names) + other._as(names))

    def _as(self, names: list[str]) -> Tensor:
        """Returns the values of all these names, 0 where there is none."""
        if self.names == names:
            return self.values
        values = self.values.new_zeros(len(names))
        for name, value in zip(self.names, self.values, strict=True):
            values[names.index(name)] = value
        return values

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, self.values.tolist(), strict=True))


def sums_of(losses: Losses, terms: Tensor, labels: Tensor, count: int) -> Sums:
    """Returns losses times images, and the hits of each network, over all processes.

    Args:
        losses: of a batch.
        terms: the values of `losses.terms`, means over all processes.
        labels: of this process.
        count: number of images of all processes.
    """
    hits = torch.stack([correct(logits, labels) for logits in losses.logits.values()])
    values = torch.cat([terms.double() * count, distributed.summed(hits.double())])
    return Sums([*losses.terms, *(f"{role}_train_accuracy" for role in losses.logits)], values)
