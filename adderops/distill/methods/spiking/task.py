"""What the methods that train spiking networks share: their options and their network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.func import functional_call

from adderops.distill.methods.task import Task, spiking_methods
from adderops.distill.networks import arch_of, load_weights
from adderops.distill.options import check, option
from adderops.models import create_model
from adderops.spiking import IntegrateAndFire, as_cnn, spiking

if TYPE_CHECKING:
    from adderops.distill.config import Config

_option = partial(option, group="spiking networks (methods that train one)")
_NEEDS = {"method": spiking_methods}
GATES = ("resu", "stsu")


@dataclass(frozen=True, kw_only=True)
class Spiking:
    """Neurons and time steps: the options of the command line under this heading.

    The help of each field says what it is; None is left open, for the recipe.

    Raises:
        ValueError: a value of another type or outside its range; the message names field, expected, got.

    >>> Spiking(steps=4).steps
    4
    """

    steps: int = _option(
        None,
        "time steps per image (default: set by the recipe)",
        type=int,
        least=1,
        most=4096,
        of_recipe=True,
        needs=_NEEDS,
    )
    threshold: float = _option(
        None,
        "membrane at which a neuron fires, where it is learned its initial value (default: set by the recipe)",
        type=float,
        least=1e-6,
        most=1e6,
        of_recipe=True,
        needs=_NEEDS,
    )
    decay: float = _option(
        None,
        "factor of the membrane per step; 1: integrate-and-fire, below: leaky (default: set by the recipe)",
        type=float,
        least=1e-6,
        most=1,
        of_recipe=True,
        needs=_NEEDS,
    )
    surrogate_width: float = _option(
        None,
        "distance of the membrane from the threshold at which the surrogate gradient is a quarter of its "
        "maximum, 1 (default: set by the recipe)",
        type=float,
        least=1e-6,
        most=1e6,
        of_recipe=True,
        needs={"method": ("surrogate",)},
    )

    gate: str = _option(
        "resu",
        "method snn2ann: the CNN sees the spikes of all neurons (stsu), or only where its ReLU is positive (resu)",
        choices=GATES,
        needs={"method": ("snn2ann",)},
    )

    def __post_init__(self) -> None:
        check(self)


class SpikingTask(Task):
    """Base of the methods that train a spiking network: a CNN whose ReLUs are neurons, see `adderops.spiking.spiking`.

    A subclass defines `neuron`; without more it trains the network on the labels.
    """

    roles = {"student": "spiking"}
    spikes = True

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        """Returns a function that makes the neurons of one ReLU."""
        return partial(IntegrateAndFire, options.threshold, decay=options.decay)

    @classmethod
    def network(
        cls, config: Config, role: str, in_channels: int, num_classes: int, initial: Path | None = None
    ) -> nn.Module:
        if cls.roles[role] != "spiking":
            return super().network(config, role, in_channels, num_classes, initial)
        assert config.spiking is not None
        cnn = create_model(arch_of(config, role), "cnn", in_channels, num_classes)
        network = spiking(cnn, config.spiking.steps, cls.neuron(config.spiking))
        if initial is not None:
            load_initial(network, cnn, initial)
        return network


def load_initial(network: nn.Module, cnn: nn.Module, path: Path) -> None:
    """Loads the file of a spiking network, or of its CNN: then the neurons stay as they are."""
    of_cnn = cnn.state_dict().keys()
    neurons = {name: value for name, value in network.state_dict().items() if name not in of_cnn}

    def complete(_: nn.Module, state: dict[str, Tensor], *__: object) -> None:
        state.update({name: value for name, value in neurons.items() if name not in state})

    hook = network.register_load_state_dict_pre_hook(complete)
    try:
        load_weights(network, path, any_classifier=True)
    finally:
        hook.remove()


def cnn_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Returns the logits of the CNN that a spiking network stands for; it leaves the statistics of BatchNorm alone."""
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with as_cnn(network):
        return functional_call(network, buffers, (images,))
