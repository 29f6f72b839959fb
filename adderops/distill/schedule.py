"""Learning rates: a cosine to 0, set once per epoch, behind a linear rise."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(epoch: int, epochs: int, warmup: int = 0) -> float:
    r"""Returns the share of the learning rate in an epoch, counted from 0.

    .. math:: (epoch + 1) / (warmup + 1) \text{ before } warmup, \quad
              (1 + \cos(\pi\,(epoch - warmup) / (epochs - warmup))) / 2 \text{ from then on}

    >>> [cosine(epoch, epochs=3, warmup=1) for epoch in range(3)]
    [0.5, 1.0, 0.5]
    """
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def cosine_schedule(optimizer: Optimizer, epochs: int, warmup: int = 0, rifle: int | None = None) -> LambdaLR:
    """Returns the schedule of `cosine` for all groups of an optimizer.

    Args:
        rifle: epochs per period: the group named 'classifier' follows a cosine of its own in each.
    """
    period = min(rifle or epochs, epochs)

    def of_all(epoch: int) -> float:
        return cosine(epoch, epochs, warmup)

    def of_classifier(epoch: int) -> float:
        return cosine(epoch % period, period)

    names = [group.get("name") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [of_classifier if name == "classifier" else of_all for name in names])
