"""SNN2ANN (arXiv 2206.09449): a spiking network trained through its CNN on the spikes that were counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adderops.distill.methods.spiking.task import Spiking, SpikingTask, cnn_logits
from adderops.distill.methods.task import LabelLoss, Losses, register_method
from adderops.distill.networks import build_networks
from adderops.spiking import IntegrateAndFire, Spikes, sites

if TYPE_CHECKING:
    from adderops.distill.config import Config
    from adderops.distill.data import Data

MISMATCH = 0.1  # share of a layer's neurons above which its thresholds rise
RISE = 0.01  # of the thresholds, in units of the largest initial one


@register_method("snn2ann")
class SNN2ANNTask(SpikingTask):
    r"""A spiking network trained through its CNN, whose activations are replaced by the rates of spikes.

    The spiking network runs on the batch without a graph. Then the CNN with the same weights runs, where c / T, the
    mean of a neuron's spikes, replaces the output a of its ReLU; the gradient is passed on to the ReLU unchanged:

    .. math:: c/T\,[a > 0] + a - stopgrad(a) \text{ (gate resu)}, \quad c/T + a - stopgrad(a) \text{ (gate stsu)}

    The cross entropy of the CNN is the loss. Each neuron has a threshold, which no gradient trains: it begins uniform
    on (0, threshold]; where more than a tenth of a layer's neurons spike while their ReLU is 0, all thresholds of the
    layer rise by a hundredth of `threshold`.

    BatchNorm is as in `ProxyTask`: statistics of the batch in each pass, running ones of the spiking network.

    Args:
        networks: 'student', made by `adderops.spiking.spiking` with `IntegrateAndFire`.
        label_loss: of logits and labels; the plain cross entropy by default.
        gate: 'resu' or 'stsu'.
        rise: of thresholds.

    Source: SNN2ANN, arXiv 2206.09449, and its code, where thresholds begin on (0, 1), too. But there the CNN is given
    the counts c, which makes a step's current the T-th part of ours: on our scale its thresholds begin on (0, T). It
    has dropout on membranes, and the image once in the CNN but in each step of the spiking network; both are left out.

    >>> from adderops.distill import Options
    >>> config = Options(method="snn2ann", steps=4).resolve()
    >>> task = SNN2ANNTask({"student": SNN2ANNTask.network(config, "student", in_channels=1, num_classes=10)})
    >>> sorted(task(torch.randn(8, 1, 32, 32), torch.arange(8)).terms)
    ['student_ce']
    """

    label = "spiking, by SNN2ANN"

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        label_loss: LabelLoss | None = None,
        gate: str = "resu",
        rise: float = RISE,
    ) -> None:
        super().__init__(networks, label_loss)
        self.gate, self.rise = gate, rise

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        return partial(IntegrateAndFire, options.threshold, decay=options.decay, reset="zero")

    @classmethod
    def build(cls, config: Config, data: Data, device: torch.device) -> SNN2ANNTask:
        assert config.spiking is not None
        largest = config.spiking.threshold
        networks = build_networks(config, cls, data, device)
        torch.manual_seed(config.seed)  # of the thresholds

        def draw(site: Spikes, _: Any, spikes: Tensor) -> None:
            site.neuron.threshold = ((1 - torch.rand(spikes.shape[1:])) * largest).to(device)

        with torch.no_grad(), _hooked(networks["student"].eval(), draw):
            networks["student"](torch.zeros(1, data.in_channels, data.side, data.side, device=device))
        task = cls(networks, LabelLoss.build(config, data), config.spiking.gate, RISE * largest)
        return task.train().to(device)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        network = self.networks["student"]
        seen: dict[Spikes, tuple[Tensor, Tensor]] = {}

        def substitute(site: Spikes, _: Any, output: Tensor) -> Tensor | None:
            if site.steps:  # the spiking network, which runs first
                seen[site] = output.unflatten(0, (site.steps, -1)).mean(0), site.neuron.threshold
                return None
            (rate, threshold), off = seen[site], output == 0
            threshold += self.rise * ((off & (rate > 0)).float().mean() > MISMATCH)
            if self.gate == "resu":
                rate = rate.masked_fill(off, 0)
            return rate + (output - output.detach())

        with _hooked(network, substitute):
            with torch.no_grad():
                spiking = network(images)
            logits = cnn_logits(network, images)
        loss = self.label_loss(logits, labels)
        return Losses(loss, {"student_ce": loss}, {"student": spiking})


@contextmanager
def _hooked(network: nn.Module, hook: Callable[[Spikes, Any, Tensor], Tensor | None]) -> Iterator[None]:
    """A context in which a forward hook is on all neurons of a network."""
    handles = [site.register_forward_hook(hook) for site in sites(network).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
