"""DSR (arXiv 2205.00459): a spiking network trained by the gradient of its spike representation."""

import math
from collections.abc import Callable
from functools import partial

from torch import nn

from adderops.distill.methods.spiking.task import Spiking, SpikingTask
from adderops.distill.methods.task import register_method
from adderops.spiking import IntegrateAndFire

FIRE, FIRE_LEAKY = 0.5, 0.3  # shares of the threshold at which neurons fire
LEAST = 0.01  # of the thresholds


@register_method("dsr")
class DSRTask(SpikingTask):
    r"""A spiking network trained on its spike representation, without backward passes through time.

    Over T steps the rate of a neuron's spikes, which carry its threshold V, is nearly clamp(rate of its input, 0, V).
    The gradient is that of the clamp, for the weights and for V, one per ReLU. The loss is the cross entropy of the
    logits, which the classifier computes from the rates.

    Source: DSR, arXiv 2205.00459, and its code. There the logits are rates of neurons, too.

    >>> from adderops.distill import Options
    >>> config = Options(method="dsr", steps=5).resolve()
    >>> network = DSRTask.network(config, "student", in_channels=1, num_classes=10)
    >>> network.get_submodule("spikes.0.neuron")
    IntegrateAndFire(threshold=6, decay=1.0, reset='subtract', scaled=True)
    """

    label = "spiking, by DSR"

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        leaky = options.decay < 1
        return partial(
            IntegrateAndFire,
            options.threshold,
            decay=options.decay,
            # a step of the differential equation with time constant 1; thresholds are in units of V / dt
            gain=(options.decay - 1) / math.log(options.decay) if leaky else 1.0,
            fire=FIRE_LEAKY if leaky else FIRE,
            scaled=True,
            gradient="rate",
            learn=True,
            least=LEAST,
        )
