"""Learning rates: a cosine after a linear warm-up, one cycle, or exponential; set once per epoch or in each step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(epoch: int, epochs: int, warmup: int = 0) -> float:
    r"""Returns the factor of the learning rate in an epoch, counted from 0; steps may stand for epochs.

    .. math:: (epoch + 1) / (warmup + 1) \text{ before } warmup, \quad
              (1 + \cos(\pi\,(epoch - warmup) / (epochs - warmup))) / 2 \text{ from then on}

    >>> [cosine(epoch, epochs=3, warmup=1) for epoch in range(3)]
    [0.5, 1.0, 0.5]
    """
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def one_cycle(epoch: int, epochs: int) -> float:
    """Returns the factor of the learning rate in an epoch, counted from 0; steps may stand for epochs.

    As torch's OneCycleLR with its defaults: cosines from 1/25 to 1 in the first 30 %, then to 1/250000.

    >>> [round(one_cycle(step, 11), 4) for step in (0, 2, 10)]
    [0.04, 0.9603, 0.0]
    """
    peak, last = 0.3 * epochs - 1, epochs - 1
    begin, end, share = (0.04, 1.0, epoch / peak) if epoch <= peak else (1.0, 4e-6, (epoch - peak) / (last - peak))
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def exponential(epoch: float) -> float:
    """Returns the factor of the learning rate in an epoch, e^(-0.04 epoch), as in desire backpropagation.

    >>> round(exponential(25), 4)
    0.3679
    """
    return math.exp(-0.04 * epoch)


SCHEDULES = ("cosine", "one-cycle", "exponential")


def make_schedule(
    optimizer: Optimizer,
    epochs: int,
    warmup: int = 0,
    rifle: int | None = None,
    steps_per_epoch: int = 1,
    kind: str = "cosine",
) -> LambdaLR:
    """Returns a schedule for all parameter groups of an optimizer.

    Args:
        optimizer: its learning rates are multiplied by the factors.
        epochs: to train for.
        warmup: epochs of linear warm-up.
        rifle: period in epochs: the group named 'classifier' follows a cosine of its own in each period.
        steps_per_epoch: calls of the schedule per epoch; 1 if it advances once per epoch.
        kind: one of SCHEDULES.
    """
    period = steps_per_epoch * min(rifle or epochs, epochs)

    def of_all(step: int) -> float:
        if kind == "one-cycle":
            return one_cycle(min(step, steps_per_epoch * epochs - 1), steps_per_epoch * epochs)
        if kind == "exponential":
            return exponential(step / steps_per_epoch)
        return cosine(step, steps_per_epoch * epochs, steps_per_epoch * warmup)

    def of_classifier(step: int) -> float:
        return cosine(step % period, period)

    names = [group.get("name") for group in optimizer.param_groups]
    return LambdaLR(optimizer, [of_classifier if name == "classifier" else of_all for name in names])
