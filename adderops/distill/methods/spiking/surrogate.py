"""Surrogate gradients of tuned width (arXiv 2006.04436): a spiking network trained through its time steps."""

from collections.abc import Callable
from functools import partial

from torch import nn

from adderops.distill.methods.spiking.task import Spiking, SpikingTask
from adderops.distill.methods.task import register_method
from adderops.spiking import IntegrateAndFire


@register_method("surrogate")
class SurrogateTask(SpikingTask):
    r"""A spiking network trained through its time steps, with a surrogate gradient of tuned width.

    A spike is a step of the membrane's distance u to the threshold, and gets the derivative

    .. math:: \frac{ds}{du} = \frac{1}{(1 + |u| / width)^2}

    It is 1 at the threshold for every width. Where it is too wide, gradients explode over layers and steps; where it is
    too narrow, they vanish. Convolutions and BatchNorm see the T·N images of all steps as one batch. Memory grows with
    T. The function is snnTorch's, in whose forward pass a neuron fires above the threshold, not at it.

    Source: arXiv 2006.04436, which has no public code; that this is its function is second-hand.

    >>> from adderops.distill import Options
    >>> config = Options(method="surrogate", surrogate_width=0.2).resolve()
    >>> config.spiking.steps, config.spiking.surrogate_width, config.optimizer, config.schedule
    (10, 0.2, 'adamw', 'one-cycle')
    """

    label = "spiking, by surrogate gradient"

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        try:
            from snntorch.surrogate import fast_sigmoid
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                "method surrogate needs snntorch: install the extra `adderops[spiking]`"
            ) from missing
        gradient = fast_sigmoid(slope=1 / options.surrogate_width)
        return partial(IntegrateAndFire, options.threshold, decay=options.decay, gradient=gradient)
