"""`Task`, the base class of all methods, and `METHODS`, the list of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.networks import arch_of, build_networks, load_weights
from adderops.distill.options import parse_weights
from adderops.models import create_model

if TYPE_CHECKING:  # `config` needs the list of methods
    from adderops.distill.config import Config
    from adderops.distill.data import Data

T = TypeVar("T", bound="type[Task]")


@dataclass
class Losses:
    """The losses of a batch.

    Attributes:
        total: sum of the losses of all networks in training; the loop calls `backward` on it.
        terms: scalars to log, by column of log.csv.
        logits: (N, classes) of each network, by role.
        layers: quantities of the matched layers, by column of layers.csv, (layers) each.
        outputs: raw outputs of the student's matched layers.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: dict[str, Tensor]
    layers: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


class LabelLoss(nn.Module):
    r"""The cross entropy with the labels, :math:`-\frac1N \sum_{n,c} w_c\, p_{nc} \log q_{nc}`.

    Args:
        label_smoothing: s in p = (1 - s) label + s / classes.
        class_weights: (classes) w; 1 for all classes by default.  The mean is over the images, so that the parts of a
            batch add up.

    Shape:
        logits (N, classes); labels (N) int64, or shares (N, classes) as mixup makes them.

    Raises:
        ValueError: not as many weights as classes.

    >>> loss = LabelLoss(class_weights=torch.tensor([1.0, 3.0]))
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor(1.3863)
    """

    class_weights: Tensor | None

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    @classmethod
    def build(cls, config: Config, data: Data) -> LabelLoss:
        """Builds the cross entropy that a configuration asks for.

        Raises:
            ValueError: not as many class weights as classes.
        """
        weights = None
        if config.class_weights == "balanced":
            counts = data.train.labels.bincount(minlength=data.num_classes)
            weights = len(data.train) / (data.num_classes * counts.clamp(min=1).float())
        elif config.class_weights is not None:
            weights = torch.tensor(parse_weights(config.class_weights))
            if len(weights) != data.num_classes:
                raise ValueError(f"class_weights: expected {data.num_classes}, one for each class, got {len(weights)}")
        return cls(config.label_smoothing, weights)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return cross_entropy(logits, labels, self.label_smoothing)
        if self.class_weights.shape != logits.shape[1:]:
            raise ValueError(
                f"class_weights: expected one for each of {logits.size(1)} classes, got {self.class_weights.numel()}"
            )
        losses = F.cross_entropy(
            logits.float(),
            labels,
            self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction="none",  # torch's mean is over the weights for labels, and over the images for shares
        )
        return global_mean(losses.mean(), len(logits))


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross entropy over the images of all processes; target: labels (N) or shares (N, classes).

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    return global_mean(F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing), len(logits))


class Task(nn.Module):
    """Base class of the methods: a task holds the networks in training and turns a batch into losses.

    Optimizer, schedule, tests, checkpoints, log and tables are the same for all methods; they use only what this class
    has.  A subclass sets `roles`, `main` and `label` and defines `forward`; it overrides `build` if its constructor
    takes other arguments, and `diagnose` if there is something to watch.  The first line of its docstring becomes its
    text in --help.

    Class attributes:
        roles: {role: 'cnn', 'adder' or 'spiking'} of the networks, in the order of the tables.  The role names files
            and columns (student.pt, student_test_accuracy); with the seed, it decides the initial weights.
        main: the role that the run is about: --initial, --bits, --ema, --rifle and the best test refer to it.
        label: name of the main network in tables; by default the name of the method.
        distills: whether the method takes the options of the distillation, as `config.distillation`; otherwise None.
        spikes: whether it takes the options of spiking networks, as `config.spiking`; otherwise None.
        arch: the architecture of the method, where it has only one.
        without_teacher: the method that runs instead under --teacher none, if there is one.
        extremes: {quantity of `diagnose`: min or max}: its extreme over the layers goes to log.csv, as var_yc_min.

    Args:
        networks: by role.
        label_loss: of logits and labels; the plain cross entropy by default.

    >>> from adderops.models import lenet5
    >>> class Confident(Task):
    ...     '''The adder network, punished for large logits.'''
    ...     roles = {"student": "adder"}
    ...     label = "adder, small logits"
    ...
    ...     def forward(self, images, labels):
    ...         logits = self.networks["student"](images)
    ...         ce = self.label_loss(logits, labels)
    ...         size = logits.square().mean()
    ...         return Losses(ce + 0.01 * size, {"student_ce": ce, "size": size}, {"student": logits})
    >>> task = Confident({"student": lenet5("adder")})
    >>> sorted(task(torch.randn(8, 1, 32, 32), torch.arange(8)).terms)
    ['size', 'student_ce']
    """

    roles: ClassVar[dict[str, str]]
    main: str = "student"
    label: str = ""
    distills: ClassVar[bool] = False
    spikes: ClassVar[bool] = False
    arch: ClassVar[str | None] = None
    without_teacher: ClassVar[str | None] = None
    extremes: ClassVar[dict[str, Callable[[Sequence[float]], float]]] = {}
    layer_names: list[str]
    networks: nn.ModuleDict

    def __init__(self, networks: Mapping[str, nn.Module], label_loss: LabelLoss | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)
        self.label_loss = label_loss or LabelLoss()
        self.layer_names = []  # what `diagnose` describes

    @classmethod
    def build(cls, config: Config, data: Data, device: torch.device) -> Task:
        """Builds the networks of a configuration, for the images and classes of a data set, and the task."""
        networks = build_networks(config, cls, data, device)
        return cls(networks, LabelLoss.build(config, data)).to(device)

    @classmethod
    def network(
        cls, config: Config, role: str, in_channels: int, num_classes: int, initial: Path | None = None
    ) -> nn.Module:
        """Builds a network of the method, untrained, or with the weights of a file, except for another classifier."""
        network = create_model(arch_of(config, role), cls.roles[role], in_channels, num_classes)
        if initial is not None:
            load_weights(network, initial, any_classifier=True)
        return network

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        """Returns the losses of a batch; by default each network trains on the labels alone.

        Args:
            images: (N, C, H, W).
            labels: (N) int64, or shares (N, classes).
        """
        logits = {role: network(images) for role, network in self.networks.items()}
        terms = {f"{role}_ce": self.label_loss(values, labels) for role, values in logits.items()}
        return Losses(torch.stack(list(terms.values())).sum(), terms, logits)

    def diagnose(self, losses: Losses) -> dict[str, Tensor]:
        """Returns the columns of layers.csv, (layers) each; called before `backward` in the last step of an epoch."""
        return {}


KINDS = ("cnn", "adder", "spiking")
METHODS: dict[str, type[Task]] = {}


def register_method(name: str) -> Callable[[T], T]:
    """Registers a subclass of `Task` as a method, for --method and `Options(method=...)`.

    Args:
        name: of the method.

    Raises:
        ValueError: the name is taken, `main` is not in `roles`, or a kind is none of 'cnn', 'adder', 'spiking'.

    >>> @register_method("nothing")
    ... class Nothing(Task):
    ...     roles = {"student": "linear"}
    Traceback (most recent call last):
    ValueError: Nothing: roles: expected 'student' among them, each of cnn, adder, spiking, got {'student': 'linear'}
    """

    def register(task: T) -> T:
        if name in METHODS or name == COMPARE:
            raise ValueError(f"register_method: expected a new name, got {name!r}, which is taken")
        roles: Any = getattr(task, "roles", {})
        if task.main not in roles or not set(roles.values()) <= set(KINDS):
            raise ValueError(
                f"{task.__name__}: roles: expected {task.main!r} among them, each of {', '.join(KINDS)}, got {roles}"
            )
        task.label = task.label or name
        METHODS[name] = task
        return task

    return register


COMPARE = "compare"  # a value of --method that trains runs of several methods


def method_names() -> tuple[str, ...]:
    """Returns the choices of --method."""
    return (COMPARE, *METHODS)


def distilling_methods() -> tuple[str, ...]:
    """Returns the choices of --method for which the options of the distillation have an effect."""
    return (*(name for name, task in METHODS.items() if task.distills), COMPARE)


def spiking_methods() -> tuple[str, ...]:
    """Returns the choices of --method for which the options of spiking networks have an effect."""
    return tuple(name for name, task in METHODS.items() if task.spikes)
