"""The configuration of a run: `Options`, which may be left open, resolve to a `Config`, in which nothing is open.

The fields of `Options` are the only declaration of the options: command line, --help and config.json follow from them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adderops.distill.methods import METHODS, Distillation, Spiking
from adderops.distill.methods.task import COMPARE, method_names
from adderops.distill.options import LARGEST_THREADS, flag, option, parse_weights, refuse_unused
from adderops.distill.recipes import DEFAULT, OF_DATA, RECIPES, Recipe
from adderops.distill.schedule import SCHEDULES
from adderops.models import ARCHITECTURES

DEVICES = ("auto", "cpu", "cuda")
AMP = ("bfloat16", "float16")
OPTIMIZERS = ("sgd", "adam", "adamw")
# A run with other values of these is the same run.
MACHINE = ("threads", "workers", "device", "download", "tensorboard", "checkpoint_minutes")
# Options that version 0.1.0 was the last to have, and the value that now always applies.
DROPPED = {
    "width": "batch",
    "shared_width": False,
    "teacher_linear": "trained",
    "mid_norm": "batchnorm",
    "mid_reduction": "mean",
}

_data = partial(option, group="data")
_networks = partial(option, group="networks")
_optimization = partial(option, group="optimization")
_regularization = partial(option, group="regularization")
_testing = partial(option, group="testing")
_machine = partial(option, group="machine")


def _of_recipe(declare: Callable[..., Any], help: str, **metadata: Any) -> Any:
    return declare(None, f"{help} (default: set by the recipe)", of_recipe=True, **metadata)


def _architectures() -> str:
    return (
        f"network of student and teacher: {', '.join(ARCHITECTURES)}, torchvision/NAME or timm/NAME "
        "(default: set by the recipe)"
    )


def _methods() -> str:
    firsts = {name: (task.__doc__ or "").partition("\n")[0].rstrip(".") for name, task in METHODS.items()}
    texts = [
        f"{name}: {text[:1].lower() if text[1:2].islower() else text[:1]}{text[1:]}" for name, text in firsts.items()
    ]
    texts.append(f"{COMPARE}: pkkd and plain, the student in int8, and a table")
    return "; ".join(texts) + f" (default: the recipe's, mostly {COMPARE})"


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """All options except those of the distillation; `Config` narrows the types of those that `resolve` decides."""

    recipe: str | None = _data(
        None,
        f"recipe that sets the options not given (default: the one for --data and --arch, or {DEFAULT} without both)",
        type=str,
        choices=tuple(RECIPES),
    )
    data: str | None = _of_recipe(
        _data,
        "digits (included), mnist, fashion-mnist, cifar10, cifar100, imagenet, or a folder of idx files or images",
        type=str,
    )
    root: str = _data("data", "folder that holds mnist, fashion-mnist, cifar10, cifar100, imagenet")
    download: bool = _data(False, "download the data to --root if torchvision can")
    train_images: int | None = _data(
        None,
        "train on a class-balanced random subset of this size (default: set by the recipe, mostly all images)",
        type=int,
        least=2,
    )
    validation: int | None = _of_recipe(
        _data,
        "hold out this many training images and test on them instead of the test set",
        type=int,
        least=0,
    )
    augment: str | None = _data(
        None,
        "augmentation of training images: none, crop, crop-flip or imagenet (default: the usual one for the data set)",
        type=str,
    )
    side: int | None = _data(
        None,
        "height and width of the images of an image folder, in pixels (default: the network's)",
        type=int,
        least=8,
        most=16384,
    )

    arch: str | None = _networks(None, _architectures, type=str, of_recipe=True)
    method: str = _networks(None, _methods, type=str, choices=method_names)
    seeds: int | None = _networks(
        None,
        "method compare: number of seeds, starting at --seed (default: set by the recipe, mostly 1)",
        type=int,
        least=1,
        most=1000,
        needs={"method": (COMPARE,)},
    )
    initial: str | None = _networks(
        None,
        "state_dict with the initial weights of the main network (fine-tuning); for a spiking network also a CNN's",
        type=str,
    )
    bits: int | None = _networks(
        None,
        "train with fake-quantized adder layers in the student: inputs and weights of this many bits, on grids "
        "calibrated on the network of --initial; straight-through gradients",
        type=int,
        least=2,
        most=8,
    )

    epochs: int | None = _of_recipe(_optimization, "passes over the training images", type=int, least=1)
    batch_size: int | None = _of_recipe(_optimization, "images per step, over all processes", type=int, least=2)
    lr: float | None = _of_recipe(
        _optimization,
        "initial learning rate, of one-cycle the largest one",
        type=float,
        least=0,
    )
    schedule: str | None = _of_recipe(
        _optimization,
        "learning rate over the epochs: cosine to 0; one-cycle: as torch's OneCycleLR; exponential: e^-0.04 per epoch",
        type=str,
        choices=SCHEDULES,
    )
    lr_per_step: bool = _optimization(
        False, "set the learning rate in each step, not once per epoch: in a run of few epochs it comes close to 0"
    )
    warmup_epochs: int = _optimization(
        0, "epochs of linear warm-up to --lr, before the cosine", least=0, needs={"schedule": (None, "cosine")}
    )
    weight_decay: float | None = _of_recipe(_optimization, "weight decay of all parameters", type=float, least=0)
    optimizer: str | None = _of_recipe(_optimization, "optimizer", type=str, choices=OPTIMIZERS)
    momentum: float | None = _of_recipe(
        _optimization, "momentum of SGD, first beta of Adam and AdamW", type=float, least=0, most=0.9999
    )
    beta2: float | None = _of_recipe(_optimization, "second beta of Adam and AdamW", type=float, least=0, most=0.99999)
    nesterov: bool | None = _of_recipe(
        _optimization, "Nesterov momentum", type=bool, needs={"optimizer": (None, "sgd")}
    )
    eta: float = _optimization(
        0.2, "root mean square to which the weight gradients of each adder layer are scaled", least=1e-6, most=1e6
    )
    accumulate: int = _optimization(1, "accumulate gradients over this many parts of each batch", least=1)
    clip: float | None = _optimization(
        None,
        "clip the norm of the gradient to this; adder layers are left out, since --eta scales them",
        type=float,
        least=0,
    )
    ema: float | None = _optimization(
        None,
        "decay per step of an exponential moving average of the weights, which is tested and saved as well",
        type=float,
        least=0,
        most=1,
    )
    rifle: int | None = _optimization(
        None,
        "re-initialize the classifier and restart its learning rate every N epochs (RIFLE)",
        metavar="N",
        type=int,
        least=1,
    )
    seed: int = _optimization(
        0, "for initial weights and order of images; both are the same for every method", least=0, most=2**32 - 1
    )

    label_smoothing: float = _regularization(
        0.0, "share of each label that is spread evenly over all classes", least=0, most=1
    )
    mixup: float = _regularization(
        0.0, "mixup: mix pairs of images and labels by ratios from Beta(X, X); 0: off", metavar="X", least=0, most=1e4
    )
    cutmix: float = _regularization(
        0.0,
        "CutMix: paste a rectangle of another image, its area from Beta(X, X), and mix the labels; 0: off; if --mixup "
        "is on, too, each batch gets one of the two at random",
        metavar="X",
        least=0,
        most=1e4,
    )
    class_weights: str | None = _regularization(
        None,
        "class weights in the cross entropy: balanced (inversely proportional to the number of images), or "
        "comma-separated numbers in the order of the classes",
        type=str,
    )

    test_every: int | None = _of_recipe(
        _testing, "test every N epochs, and after the last", metavar="N", type=int, least=1
    )
    patience: int | None = _testing(
        None,
        "stop after N epochs without a rise of the accuracy on the --validation images",
        metavar="N",
        type=int,
        least=1,
    )
    reestimate_batchnorm: int = _testing(
        512,
        "re-estimate BatchNorm statistics on this many training images before each test, on four times as many before "
        "the last; the running averages lag behind adder layers; 0: keep them",
        least=0,
    )

    device: str = _machine("auto", "where to train; auto: a GPU if adderops has kernels for it", choices=DEVICES)
    threads: int | None = _machine(None, "CPU threads (default: torch's)", type=int, least=1, most=LARGEST_THREADS)
    workers: int = _machine(0, "worker processes that load images", least=0, most=LARGEST_THREADS)
    amp: str | None = _machine(
        None,
        "mixed precision: autocast to bfloat16, or to float16 with a gradient scaler; --amp alone: bfloat16; adder "
        "layers stay in float32",
        type=str,
        choices=AMP,
        alone="bfloat16",
    )
    compile: bool = _machine(False, "compile the networks with torch.compile")
    cuda_graph: bool = _machine(
        False,
        "launch each training step as one CUDA graph, which small networks gain from; a short last batch is launched "
        "as usual",
        needs={"device": ("auto", "cuda"), "accumulate": (1,), "amp": (None, "bfloat16")},
    )
    channels_last: bool = _machine(False, "images and weights in channels_last memory format")
    sync_batchnorm: bool = _machine(False, "with torchrun: BatchNorm statistics over the batch of all processes")
    tensorboard: bool = _machine(False, "write TensorBoard events as well")
    checkpoint_minutes: float = _machine(10.0, "minutes between checkpoints within an epoch", least=0)


@dataclass(frozen=True, kw_only=True)
class Options(Spiking, Distillation, _Shared):
    """The options of a run, as the command line has them: `python -m adderops.distill --help` explains each.

    None: left open; `resolve` decides.

    Raises:
        ValueError: a value of another type or outside its range; the message names field, expected, got.

    >>> config = Options(method="pkkd", lr=0.05).resolve()
    >>> config.epochs, config.lr, config.distillation.beta
    (100, 0.05, 0.1)
    """

    def __post_init__(self) -> None:
        super().__post_init__()  # checks every field
        if self.method is None:
            object.__setattr__(self, "method", RECIPES[self.recipe or DEFAULT].method or COMPARE)
        task = METHODS.get(self.method)  # None: compare
        if self.teacher == "frozen" and self.distills and self.teacher_checkpoint is None:
            raise ValueError("teacher_checkpoint: expected a file for the frozen teacher, got none")
        if self.teacher == "none" and task is not None and task.distills and task.without_teacher is None:
            raise ValueError(f"teacher: expected progressive or frozen for the method {self.method}, got none")
        if self.bits is not None and (self.initial is None or (task is not None and task.roles[task.main] == "cnn")):
            raise ValueError("bits: expected a trained adder network to start from (initial), got none")
        if self.method != COMPARE and self.seeds is not None:
            raise ValueError(f"seeds: expected none for the method {self.method}, got {self.seeds}")
        if self.alpha == 0 and not self.logits:
            raise ValueError(
                "alpha: expected a positive number without logits, got 0: nothing would train the classifier"
            )
        if self.cuda_graph:
            refuse_unused(self, ["cuda_graph"])
        if self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs: expected fewer than the {self.epochs} epochs, got {self.warmup_epochs}")
        if self.patience is not None and not self.validation:
            raise ValueError("patience: expected validation images (validation) to stop by, got none")
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 1e-3:
                raise ValueError(f"{name}: expected 0 or at least 0.001, got {getattr(self, name)}")
        if self.reestimate_batchnorm == 1:
            raise ValueError("reestimate_batchnorm: expected 0 or at least 2 images, got 1")
        if self.class_weights not in (None, "balanced"):
            parse_weights(self.class_weights)

    @property
    def distills(self) -> bool:
        """Whether the options of the distillation have an effect."""
        return self.method == COMPARE or METHODS[self.method].distills

    def resolve(self) -> Config:
        """Returns the configuration: the recipe decides what is left open, and paths become absolute."""
        recipe = self._recipe()
        chosen = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("name", "source")}
        chosen |= {"recipe": recipe.name, "threads": torch.get_num_threads()}
        if self.method != COMPARE:
            del chosen["seeds"]
        if (chosen["momentum"] if self.momentum is None else self.momentum) == 0:
            chosen["nesterov"] = False  # needs momentum
        values = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        if self.teacher == "none" and self.method != COMPARE:
            values["method"] = METHODS[self.method].without_teacher or self.method
        for name in ("teacher_checkpoint", "initial", "root"):
            if (given := getattr(self, name)) != getattr(Options, name):
                values[name] = str(Path(given).resolve())
        data = Path(values["data"] if self.data is None else self.data)
        if data.is_dir():
            values["data"] = str(data.resolve())
        return replace(self, **values)._decided()

    def _decided(self) -> Config:
        def of(group: type) -> dict[str, Any]:
            return {f.name: getattr(self, f.name) for f in fields(group)}

        spikes = self.method != COMPARE and METHODS[self.method].spikes
        return Config(
            **of(_Shared),
            distillation=Distillation(**of(Distillation)) if self.distills else None,
            spiking=Spiking(**of(Spiking)) if spikes else None,
        )

    def _recipe(self) -> Recipe:
        recipe = self._of_data() if self.recipe is None else RECIPES[self.recipe]
        if recipe.method is None:
            for of_method in RECIPES.values():
                if of_method.method == self.method:  # its settings, on this data and for this time
                    of_data = {name: getattr(recipe, name) for name in OF_DATA}
                    return replace(of_method, **of_data | {"arch": METHODS[self.method].arch or recipe.arch})
        return recipe

    def _of_data(self) -> Recipe:
        """Returns the recipe of data and network, whatever the method."""
        if self.data is None and self.arch is None:
            return RECIPES[DEFAULT]
        data, arch = self.data or "digits", self.arch or "lenet5"
        recipes = [recipe for recipe in RECIPES.values() if recipe.method is None]
        for recipe in recipes:
            if (recipe.data, recipe.arch) == (data, arch):
                return recipe
        for recipe in recipes:  # the same network on other data
            if recipe.arch == arch:
                return replace(recipe, data=data)
        return replace(RECIPES["fashion-mnist-lenet5"], data=data, arch=arch)


@dataclass(frozen=True, kw_only=True)
class Config(_Shared):
    """The configuration of a run, made by `Options.resolve`: nothing that the run needs is left open.

    Attributes:
        distillation: the options of the distillation as one object; None for methods without a teacher.
        spiking: the options of spiking networks; None for methods without one.
    """

    recipe: str
    data: str
    validation: int
    arch: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    nesterov: bool
    test_every: int
    threads: int
    optimizer: str
    momentum: float
    beta2: float
    schedule: str
    distillation: Distillation | None
    spiking: Spiking | None

    def flat(self) -> dict[str, Any]:
        """Returns the value of every option by name, as in config.json; without distillation its options are None."""
        groups = {Distillation: self.distillation, Spiking: self.spiking}
        of_groups = {f.name: getattr(value, f.name, None) for group, value in groups.items() for f in fields(group)}
        return {f.name: getattr(self, f.name) for f in fields(_Shared)} | of_groups

    def changed(self, **values: Any) -> Config:
        """Returns the configuration with other values of some options.

        Raises:
            ValueError: as `Options`.

        >>> Options().resolve().changed(method="plain", seeds=None).distillation is None
        True
        """
        return from_flat(self.flat() | values)._decided()

    def command(self) -> str:
        """Returns the command that repeats this run."""
        words = ["python", "-m", "adderops.distill"]
        defaults = {f.name: f.default for f in fields(Options)}
        for name, value in self.flat().items():
            if value is None or value == defaults[name]:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else flag(f"no_{name}"))
            else:
                words += [flag(name), str(value)]
        return shlex.join(words)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Reads config.json, also of older versions; options that they did not have get their defaults.

        Raises:
            ValueError: not a config.json, or a field of another type or out of range.
        """
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError(f"got {type(content).__name__} instead of names and values")
            options = from_flat(content)
            resolved = [f.name for f in fields(_Shared) if f.metadata.get("of_recipe") or f.name == "threads"]
            for name in resolved:  # the first version had data and arch; no version leaves any of these open
                if content.get(name, name not in ("data", "arch") or None) is None:
                    raise ValueError(f"{name}: expected a value, got none")
            return options._decided() if content.keys() >= set(resolved) else options.resolve()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: expected a configuration as this program writes it ({error})") from error

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns {name: (other's value, own value)} of the options that make it another run.

        Args:
            other: `flat()` of a checkpoint, also of older versions.
        """
        names = {*(f.name for f in fields(Options)), *DROPPED}
        theirs = from_flat({name: value for name, value in other.items() if name in names}).resolve().flat()
        own = {name: value for name, value in self.flat().items() if name not in MACHINE}
        return {name: (theirs[name], value) for name, value in own.items() if value != theirs[name]}


def from_flat(values: Mapping[str, Any]) -> Options:
    """Returns the options in config.json or a checkpoint: `Config.flat` of this version, or of one since 0.1.0.

    Raises:
        ValueError: as `Options`, or an option that is gone has another value than the one that now always applies.
    """
    values = dict(values)
    for name, value in DROPPED.items():
        if values.pop(name, value) != value:
            raise ValueError(f"{name}: expected {value!r}, got another: 0.1.0 was the last version with this option")
    if isinstance(values.get("amp"), bool):  # before float16
        values["amp"] = "bfloat16" if values["amp"] else None
    for f in (*fields(Distillation), *fields(Spiking)):  # None for methods without them
        if values.get(f.name, f.default) is None:
            values.pop(f.name, None)
    return Options(**values)
