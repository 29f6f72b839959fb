"""Desire backpropagation (arXiv 2211.05412): a spiking network that learns by additions alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.methods.spiking.task import Spiking, SpikingTask, load_initial
from adderops.distill.methods.task import Losses, Task, register_method
from adderops.distill.networks import arch_of
from adderops.models import MLP, create_model
from adderops.spiking import IntegrateAndFire, Spikes

if TYPE_CHECKING:
    from adderops.distill.config import Config
    from adderops.distill.data import Data

MARGIN = 4  # steps in which a neuron that wants to fire always need not
OUTPUT, HIDDEN = 0.30, 0.05  # errors from which neurons want a change


class DesireNetwork(nn.Module):
    """The spiking network of an `MLP`: pixels become spikes, and the scores are the spike counts of the last layer.

    Each pixel, from 0 to 255, drives an integrate-and-fire neuron with threshold 255, so that they count in integers.
    The first layer reads its spikes in the same step, each further layer those of the step before: the last spikes of a
    layer come too late for the next one, which runs for one step less. The neurons that an image drops in training are
    silent in all steps.

    Args:
        mlp: has the layers, which keep their names.
        options: number of steps; threshold and decay of the layers' neurons.

    Attributes:
        mean, std: (C, 1, 1), by which images are normalized, in grey levels; 0 and 1 until they are set.

    Raises:
        ValueError: too few steps.

    >>> network = DesireNetwork(MLP(hidden=(50, 20)), Spiking(steps=20, threshold=1.0, decay=0.75)).eval()
    >>> trains, _ = network.trains(torch.rand(2, 1, 32, 32))
    >>> [tuple(train.shape) for train in trains]
    [(20, 2, 784), (20, 2, 50), (19, 2, 20), (18, 2, 10)]
    """

    mean: Tensor
    std: Tensor
    spikes: Any  # a list of `Spikes`

    def __init__(self, mlp: MLP, options: Spiking) -> None:
        super().__init__()
        if options.steps <= MARGIN:
            raise ValueError(f"steps: expected at least {MARGIN + 1} for the method desire, got {options.steps}")
        self.fc1, self.fc2, self.fc = self.layers = mlp.fc1, mlp.fc2, mlp.fc
        self.dropped = (*mlp.dropped, 0.0)
        self.spikes = nn.ModuleList([Spikes(IntegrateAndFire(255.0), options.steps, constant=True)])
        for late in range(len(self.layers)):
            neuron = IntegrateAndFire(options.threshold, decay=options.decay)
            self.spikes.append(Spikes(neuron, options.steps - late))
        self.register_buffer("mean", torch.zeros(mlp.in_channels, 1, 1))
        self.register_buffer("std", torch.ones(mlp.in_channels, 1, 1))

    def trains(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the spikes (steps, N, neurons) of pixels and layers, and a mask (N, neurons) of those not dropped.

        Args:
            images: (N, C, 32, 32), normalized.
        """
        trains, kept, p = list[Tensor](), list[Tensor](), 0.0
        current = MLP.pixels((images * self.std + self.mean).round())
        for i, spikes in enumerate(self.spikes):
            if i > 0:
                current = self.layers[i - 1](trains[-1][: spikes.steps].flatten(0, 1)) / (1 - p)
            train = spikes(current).unflatten(0, (spikes.steps, -1))
            p = self.dropped[i] if self.training else 0.0
            kept.append(F.dropout(torch.ones_like(train[0]), p).sign())
            trains.append(train.mul_(kept[-1]))
        return trains, kept

    def forward(self, images: Tensor) -> Tensor:
        """Returns the spike counts (N, classes)."""
        return self.trains(images)[0][-1].sum(0)


def desired_changes(
    trains: list[Tensor], kept: list[Tensor], weights: list[Tensor], labels: Tensor, steps: int
) -> list[Tensor]:
    r"""Returns for the neurons of each layer, (N, neurons), whether they want more spikes (1), fewer (-1) or no change.

    The desire d of an output is 1 for the label and 0 otherwise, its error :math:`e = |d - n / (T - margin)|` with n
    spikes. Those with :math:`e > 0.3` want the change :math:`c = 2d - 1`. For a neuron j of the layer below

    .. math:: z_j = \sum_i w_{ij} c_i e_i, \quad c_j = sign(z_j)\,[|z_j| \ge 0.05], \quad d_j = [z_j > 0]

    Args:
        trains, kept: of `DesireNetwork.trains`.
        weights: of the layers.
        labels: (N) int64.
        steps: T.
    """
    desire = F.one_hot(labels, trains[-1].size(2)).to(trains[-1].dtype)
    rates = [train.sum(0) / (steps - MARGIN) for train in trains[1:]]
    sign = 2 * desire - 1
    changes = [sign * (sign * (desire - rates[-1]) > OUTPUT)]
    for rate, weight, mask in zip(rates[:0:-1], weights[:0:-1], kept[-2:0:-1], strict=True):
        z = (changes[0] * (desire - rate).abs()) @ weight
        desire = (z > 0).to(z.dtype)
        changes.insert(0, z.sign() * (z.abs() >= HIDDEN) * mask)
    return changes


def updates(trains: list[Tensor], changes: list[Tensor], decay: float) -> list[Tensor]:
    r"""Returns what the weights of each layer gain, for a learning rate of 1, summed over the images.

    .. math:: \Delta w_{ij} = \sum_t s_i[t]\,c_i\,q_j[t], \quad q_j[t] = decay\,q_j[t-1] + s_j[t]

    s is 0 or 1 and c -1, 0 or 1, so that the sum only adds or subtracts traces q; with images and steps as one inner
    dimension it is a product of matrices.

    Args:
        trains: of `DesireNetwork.trains`.
        changes: of `desired_changes`.
        decay: of the traces.
    """
    gained = []
    for before, after, change in zip(trains[:-1], trains[1:], changes, strict=True):
        traces = before[: len(after)].clone()
        for t in range(1, len(traces)):
            traces[t].add_(traces[t - 1], alpha=decay)
        gained.append((after * change).flatten(0, 1).T @ traces.flatten(0, 1))
    return gained


@register_method("desire")
class DesireTask(SpikingTask):
    """A spiking multilayer perceptron that learns by local additions: spikes, traces and desired changes.

    Neurons of the output want to fire always or never. What they want goes down through the weights, as one of three
    signs per neuron; see `desired_changes` and `updates`. A neuron that never fires never changes.

    The gradient of `total` is minus the mean of the updates over the images, so SGD without momentum adds
    lr / batch size times their sum. It is deliberately not the gradient of a loss: the rule has none. The terms are
    the mean error of the outputs, as `student_loss`, and the share of outputs that want a change.

    Source: arXiv 2211.05412 and its code, which has batches of one image, and counts ties of the scores as errors;
    here the first of them wins.
    """

    label = "spiking, by desire backpropagation"
    arch = "mlp"

    @classmethod
    def build(cls, config: Config, data: Data, device: torch.device) -> Task:
        for name in ("label_smoothing", "mixup", "cutmix", "class_weights"):
            if getattr(config, name):
                raise ValueError(f"{name}: expected none for the method desire, got {getattr(config, name)}")
        task = super().build(config, data, device)
        network = task.networks["student"]
        assert isinstance(network, DesireNetwork)
        network.mean.copy_(data.train.mean[0])
        network.std.copy_(data.train.std[0])
        return task

    @classmethod
    def network(
        cls, config: Config, role: str, in_channels: int, num_classes: int, initial: Path | None = None
    ) -> nn.Module:
        assert config.spiking is not None
        arch = arch_of(config, role)
        mlp = create_model(arch, "cnn", in_channels, num_classes)
        if not isinstance(mlp, MLP):
            raise ValueError(f"arch: expected mlp for the method desire, got {arch}")
        network = DesireNetwork(mlp, config.spiking)
        if initial is not None:
            load_initial(network, mlp, initial)
        return network

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        network, count = self.networks["student"], len(images)
        assert isinstance(network, DesireNetwork)
        weights = [layer.weight for layer in network.layers]
        with torch.no_grad():
            trains, kept = network.trains(images)
            scores, steps = trains[-1].sum(0), len(trains[0])
            changes = desired_changes(trains, kept, weights, labels, steps)
            error = (F.one_hot(labels, scores.size(1)) - scores / (steps - MARGIN)).abs().mean()
            terms = {"student_loss": error, "student_wanted": changes[-1].abs().mean()}
            if not images.is_cuda:  # where to choose waits for the device
                some = changes[-1].any(1)  # the other images change nothing
                trains, changes = [train[:, some] for train in trains], [change[some] for change in changes]
            gained = [gain / count for gain in updates(trains, changes, network.spikes[1].neuron.decay)]
        # its gradient is -gained, not that of a loss: see the docstring of the class
        total = -torch.stack([(weight * gain).sum() for weight, gain in zip(weights, gained, strict=True)]).sum()
        terms = {name: global_mean(value, count) for name, value in terms.items()}
        return Losses(global_mean(total, count), terms, {"student": scores})
