"""Joint A-SNN (arXiv 2305.02099): a CNN and its spiking twin learn together and share factors of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adderops.distill.distributed import global_mean
from adderops.distill.evaluate import autocast
from adderops.distill.methods.pkkd import imitation_loss
from adderops.distill.methods.spiking.task import Spiking, SpikingTask
from adderops.distill.methods.task import LabelLoss, Losses, register_method
from adderops.models import IntermediateOutputs, classifier
from adderops.spiking import IntegrateAndFire

if TYPE_CHECKING:
    from adderops.distill.config import Config

EXITS = 3  # side exits of each network
A, TEMPERATURE = 0.1, 3.0
B = 1e-3  # for the mean over the images; the official code has 1e-6, for the sum over batches of 1024


class Rectangle(torch.autograd.Function):
    """The step u >= 0 with the derivative 1 for abs(u) < 1/2, and 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u.abs() < 0.5)
        return (u >= 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Factors(nn.Module):
    r"""U and V of weights :math:`U\,diag(s)\,V`, a parametrization of s: layers that share it differ in s alone.

    Each tap of a kernel has its own: U (KH, KW, C_out, R), s (KH, KW, R) and V (KH, KW, R, C_in), with R the smaller
    number of channels. They begin as the singular vectors of a weight (C_out, C_in, KH, KW), and are free in training.

    Source: the code of arXiv 2305.02099, which reshapes where it should permute; that matters for a trained weight.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, _, v = torch.linalg.svd(weight.detach().permute(2, 3, 0, 1), full_matrices=False)
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def forward(self, s: Tensor) -> Tensor:
        return _product(self.u, s, self.v)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Returns s of the weight that U and V began with."""
        return torch.einsum("hwor,oihw,hwri->hwr", self.u, weight, self.v)


def _product(u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    with autocast(u.device, None):  # in float32, as when it is read back
        return ((u * s.unsqueeze(-2)) @ v).permute(2, 3, 0, 1)


def share_factors(networks: Mapping[str, nn.Module], main: str) -> None:
    """Gives the convolutions, all but a classifier, factors in common; all networks begin with the main one's weights.

    Raises:
        ValueError: networks with different convolutions, or with fewer than two.
    """
    layers = {role: _convolutions(network) for role, network in networks.items()}
    shapes = {name: layer.weight.shape for name, layer in layers[main].items()}
    for role, found in layers.items():
        if len(found) < 2 or {name: layer.weight.shape for name, layer in found.items()} != shapes:
            raise ValueError(
                f"networks: expected two or more convolutions, the same in each, got {role} with {', '.join(found)}"
            )
    for name, layer in layers[main].items():
        weight = layer.weight.detach().clone()
        factors = Factors(weight)
        for of_network in layers.values():
            of_network[name].weight.data.copy_(weight)
            parametrize.register_parametrization(of_network[name], "weight", factors)


def merge_factors(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a state_dict is loaded: in a network without factors their products become its weights."""
    for name, layer in _convolutions(network).items():
        factors = f"{prefix}{name}.parametrizations.weight."
        if factors + "original" in state and not parametrize.is_parametrized(layer):
            u, s, v = (state.pop(factors + part) for part in ("0.u", "original", "0.v"))
            state[f"{prefix}{name}.weight"] = _product(u, s, v)


def _convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    head = classifier(network)[1]
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m is not head}


@register_method("joint")
class JointTask(SpikingTask):
    r"""A spiking network and its CNN, trained together with factors of their weights in common.

    Their convolutions share U and V of the weights :math:`U\,diag(s)\,V`, the first one included; each network has its
    own s, BatchNorm and classifier. At quarters of the depth both have side exits, linear classifiers of the channel
    means f, and the last logits z of the CNN teach all other exits, without a gradient of their own:

    .. math:: L = (1 - a) \sum_{exits} CE + a\,\tau^2 \sum_{others} KL(softmax(z / \tau) \| softmax(z_i / \tau))
              + b \sum \lVert f_{spiking} - f_{CNN} \rVert^2

    One forward pass of each network, one backward pass and one step train both. Neurons are reset to zero and have the
    gradient of `Rectangle`. Side exits belong to the task, not to the networks. Networks are saved with their factors,
    and read back with the products as ordinary weights.

    Args:
        networks: 'student', a spiking network, and 'teacher', a CNN with the same convolutions.
        label_loss: of logits and labels; the plain cross entropy by default.

    Raises:
        ValueError: networks with different convolutions, or with fewer than two.

    Source: Joint A-SNN, arXiv 2305.02099, and its code. There side exits have convolutions of their own, BatchNorm is
    called step by step, and logits and features of the spiking network are sums over the steps, not means.

    >>> from adderops.distill import Options
    >>> config = Options(method="joint").resolve()
    >>> JointTask.network(config, "student", in_channels=1, num_classes=10).get_submodule("spikes.0.neuron")
    IntegrateAndFire(threshold=0.5, decay=0.25, reset='zero', scaled=False)
    """

    roles = {"teacher": "cnn", "student": "spiking"}
    label = "spiking, by Joint A-SNN"

    def __init__(self, networks: Mapping[str, nn.Module], label_loss: LabelLoss | None = None) -> None:
        super().__init__(networks, label_loss)
        share_factors(networks, self.main)
        layers = _convolutions(networks["teacher"])
        inner, (name, head) = list(layers)[1:], classifier(networks["teacher"])
        sides = dict.fromkeys(inner[i * len(inner) // (EXITS + 1)] for i in range(1, EXITS + 1))
        classes: Any = head.weight
        self.exits: Any = nn.ModuleDict()  # lists of linear layers
        self._inputs: dict[str, IntermediateOutputs] = {}
        for role, network in networks.items():
            self.exits[role] = nn.ModuleList(nn.Linear(layers[side].in_channels, len(classes)) for side in sides)
            self._inputs[role] = IntermediateOutputs(network, [*sides, name], inputs=True)
            self._inputs[role].enabled = False

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        return partial(IntegrateAndFire, options.threshold, decay=options.decay, reset="zero", gradient=Rectangle.apply)

    @classmethod
    def network(
        cls, config: Config, role: str, in_channels: int, num_classes: int, initial: Path | None = None
    ) -> nn.Module:
        network = super().network(config, role, in_channels, num_classes, initial)
        network.register_load_state_dict_pre_hook(merge_factors)
        return network

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        logits, exits, features = {}, {}, {}
        for role, network in self.networks.items():
            self._inputs[role].enabled = True  # and not while the networks are tested
            logits[role] = network(images)
            self._inputs[role].enabled = False
            *of_sides, last = (_channel_means(x, len(images)) for x in self._inputs[role].take())
            features[role] = [*of_sides, last]
            exits[role] = [side(f) for side, f in zip(self.exits[role], of_sides, strict=True)]
        terms = {f"{role}_ce": self.label_loss(z, labels) for role, z in logits.items()}
        sides = [*exits["teacher"], *exits["student"]]
        terms["exits_ce"] = _sum(self.label_loss(z, labels) for z in sides)
        terms["imitation"] = _sum(
            imitation_loss(z, logits["teacher"], TEMPERATURE) for z in [*sides, logits["student"]]
        )
        terms["features"] = _sum(map(feature_gap, features["student"], features["teacher"]))
        ce = terms["teacher_ce"] + terms["student_ce"] + terms["exits_ce"]
        return Losses((1 - A) * ce + A * terms["imitation"] + B * terms["features"], terms, logits)


def feature_gap(student: Tensor, teacher: Tensor) -> Tensor:
    """Returns the squared distance of features (N, C) over channels where one is positive, the mean over the images."""
    teacher = teacher.detach()
    gaps = (student - teacher).float().square() * ((student > 0) | (teacher > 0))
    return global_mean(gaps.sum(1).mean(), len(gaps))


def _channel_means(x: Tensor, images: int) -> Tensor:
    """(T·N, C, ...) -> (N, C): means over steps, height and width."""
    return x.flatten(2).mean(2).unflatten(0, (-1, images)).mean(0) if x.dim() > 2 else x


def _sum(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()
