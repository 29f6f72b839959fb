"""Learning rates: a linear warm-up, then a cosine to 0, set once per epoch."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(epoch: int, epochs: int, warmup: int = 0) -> float:
    r"""Returns the factor of the learning rate in an epoch, counted from 0.

    .. math:: (epoch + 1) / (warmup + 1) \text{ before } warmup, \quad
              (1 + \cos(\pi\,(epoch - warmup) / (epochs - warmup))) / 2 \text{ from then on}

    >>> [cosine(epoch, epochs=3, warmup=1) for epoch in range(3)]
    [0.5, 1.0, 0.5]
    """
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def cosine_schedule(optimizer: Optimizer, epochs: int, warmup: int = 0, rifle: int | None = None) -> LambdaLR:
    """Returns the schedule `cosine` for all parameter groups of an optimizer.

    Args:
        optimizer: its learning rates are those of the factor 1.
        epochs: to train for.
        warmup: epochs of linear warm-up.
        rifle: period in epochs: the group named 'classifier' follows a cosine of its own in each period.
    """
    period = min(rifle or epochs, epochs)

    def of_all(epoch: int) -> float:
        return cosine(epoch, epochs, warmup)

    def of_classifier(epoch: int) -> float:
        return cosine(epoch % period, period)

    names = [group.get("name") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [of_classifier if name == "classifier" else of_all for name in names])
