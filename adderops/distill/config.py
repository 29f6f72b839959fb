"""The configuration of a run: one dataclass, from which the command line, its help and config.json follow."""

import json
import shlex
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adderops.distill.matching import FEATURES, MID_NORMS, MID_REDUCTIONS, TEACHER_LINEARS, WIDTHS
from adderops.distill.options import LARGEST_THREADS, check, flag, option
from adderops.distill.recipes import DEFAULT, RECIPES, Recipe

METHODS = ("compare", "pkkd", "plain", "cnn")
TEACHERS = ("progressive", "frozen", "none")
DEVICES = ("auto", "cpu", "cuda")
AMP = ("bfloat16", "float16")
# Of a finished run these may differ without it being another run.
MACHINE = ("threads", "workers", "device", "download", "tensorboard", "checkpoint_minutes")

_data = partial(option, group="data")
_networks = partial(option, group="networks")
_WITH_TEACHER = {"method": ("pkkd", "compare"), "teacher": ("progressive", "frozen")}
_WITH_FEATURES = _WITH_TEACHER | {"features": ("1x1", "kernel", "kernel+1x1")}
_distillation = partial(option, group="distillation (methods pkkd and compare)")
_optimization = partial(option, group="optimization")
_regularization = partial(option, group="regularization")
_testing = partial(option, group="testing")
_machine = partial(option, group="machine")


def _of_recipe(declare, help: str, **metadata):
    return declare(None, f"{help} (default: of the recipe)", of_recipe=True, **metadata)


@dataclass(frozen=True)
class Config:
    """All that decides a run's result, and where it is computed.

    The help of each field says what it is; a None is replaced by `resolve()`.

    Raises:
        ValueError: a value of another type or outside its range; the message names field, expected, got.

    >>> Config().resolve().epochs
    100
    """

    recipe: str | None = _data(
        None,
        f"settings to start from (default: that of --data and --arch; where neither is given {DEFAULT})",
        type=str,
        choices=tuple(RECIPES),
    )
    data: str | None = _of_recipe(
        _data,
        "digits (embedded), mnist, fashion-mnist, cifar10, cifar100, imagenet, or a folder of idx files or of images",
        type=str,
    )
    root: str = _data("data", "folder in which mnist, fashion-mnist, cifar10, cifar100, imagenet lie")
    download: bool = _data(False, "fetch the data to --root where torchvision can")
    train_images: int | None = _data(
        None,
        "train on a balanced random subset of this many images (default: of the recipe, else all)",
        type=int,
        least=2,
    )
    validation: int | None = _of_recipe(
        _data,
        "take this many images out of the training set and test on them instead of on the test images",
        type=int,
        least=0,
    )
    augment: str | None = _data(
        None, "of training images: none, crop, crop-flip or imagenet (default: the usual of the set)", type=str
    )
    side: int | None = _data(
        None, "of the images of a folder (default: that of the network)", type=int, least=8, most=16384
    )

    arch: str | None = _of_recipe(
        _networks,
        "network of student and teacher: lenet5, vgg_small, resnet20, resnet32, resnet18, resnet50, mobilenet, "
        "torchvision/NAME or timm/NAME",
        type=str,
    )
    method: str = _networks(
        "compare",
        "pkkd: CNN teacher and adder student together; plain: the adder network alone; cnn: the CNN alone; "
        "compare: pkkd and plain, the student in int8, and a table",
        choices=METHODS,
    )
    seeds: int | None = _networks(
        None,
        "compare: number of seeds, from --seed on (default: of the recipe, mostly 1)",
        type=int,
        least=1,
        most=1000,
        needs={"method": ("compare",)},
    )
    initial: str | None = _networks(None, "state_dict that the trained network starts from (fine-tuning)", type=str)
    bits: int | None = _networks(
        None,
        "round inputs and weights of the student's adder layers to grids of this many bits, which fit the network of "
        "--initial; gradients go straight through",
        type=int,
        least=2,
        most=8,
    )

    teacher: str = _distillation(
        "progressive",
        "progressive: trained beside the student; frozen: stays as --teacher-checkpoint; none: as plain",
        choices=TEACHERS,
        needs={"method": ("pkkd", "compare")},
    )
    teacher_arch: str | None = _distillation(
        None,
        "network of the teacher (default: that of --arch); where the two differ, layers are matched by relative depth",
        type=str,
        needs=_WITH_TEACHER,
    )
    teacher_checkpoint: str | None = _distillation(
        None,
        "weights that the teacher starts from, or stays at when frozen: teacher.pt of a run, or a pretrained file of "
        "timm or torchvision",
        type=str,
        needs=_WITH_TEACHER,
    )
    features: str = _distillation("kernel+1x1", "what matches the inner layers", choices=FEATURES, needs=_WITH_TEACHER)
    logits: bool = _distillation(True, "imitate the teacher's logits", needs=_WITH_TEACHER)
    alpha: float = _distillation(
        1.0, "weight of the labels' cross entropy in the student's loss", least=0, needs=_WITH_TEACHER
    )
    beta: float = _distillation(
        0.1, "weight of L_mid, the match of inner features, in the student's loss", least=0, needs=_WITH_FEATURES
    )
    temperature: float = _distillation(
        4.0,
        "of the softmax of both logits in the imitation",
        least=1e-3,
        most=1e6,
        needs=_WITH_TEACHER | {"logits": (True,)},
    )
    width: str = _distillation(
        "batch",
        "2 sigma^2 of the kernels: batch: follows the mean |output| of each batch; learned: starts there and is "
        "trained; fixed: that of the first batch",
        choices=WIDTHS,
        needs=_WITH_FEATURES,
    )
    shared_width: bool = _distillation(False, "one sigma for all layers of a network", needs=_WITH_FEATURES)
    teacher_linear: str = _distillation(
        "trained",
        "the teacher's 1x1 convolution: trained by L_mid, or fixed",
        choices=TEACHER_LINEARS,
        needs=_WITH_TEACHER | {"features": ("1x1", "kernel+1x1")},
    )
    mid_norm: str = _distillation("batchnorm", "behind the 1x1 convolutions", choices=MID_NORMS, needs=_WITH_FEATURES)
    mid_reduction: str = _distillation(
        "mean",
        "L_mid as a mean over elements, or as a sum over layers, channels and pixels",
        choices=MID_REDUCTIONS,
        needs=_WITH_FEATURES,
    )

    epochs: int | None = _of_recipe(_optimization, "passes over the training images", type=int, least=1)
    batch_size: int | None = _of_recipe(_optimization, "images per step, over all processes", type=int, least=2)
    lr: float | None = _of_recipe(
        _optimization,
        "learning rate of the first epoch, falling to 0 as a cosine, set once per epoch",
        type=float,
        least=0,
    )
    warmup_epochs: int = _optimization(
        0, "epochs in which the learning rate rises linearly to --lr, before the cosine", least=0
    )
    weight_decay: float | None = _of_recipe(_optimization, "weight decay of all parameters", type=float, least=0)
    nesterov: bool | None = _of_recipe(_optimization, "Nesterov momentum", type=bool)
    eta: float = _optimization(0.2, "root mean square of the adder layers' weight gradients", least=1e-6, most=1e6)
    accumulate: int = _optimization(1, "parts of a batch that go through the networks one after the other", least=1)
    clip: float | None = _optimization(
        None,
        "largest norm of the gradient of all parameters but the adder layers', whose rate is --eta",
        type=float,
        least=0,
    )
    ema: float | None = _optimization(
        None,
        "decay per step of an exponential moving average of the weights, tested and saved beside",
        type=float,
        least=0,
        most=1,
    )
    rifle: int | None = _optimization(
        None, "re-draw the classifier every so many epochs, its learning rate starting again (RIFLE)", type=int, least=1
    )
    seed: int = _optimization(
        0, "decides initial weights and the order of images; the same for every method", least=0, most=2**32 - 1
    )

    label_smoothing: float = _regularization(
        0.0, "share of each label that is spread evenly over all classes", least=0, most=1
    )
    mixup: float = _regularization(
        0.0, "mix pairs of images and labels by shares of Beta(alpha, alpha); 0: none", least=0, most=1e4
    )
    cutmix: float = _regularization(
        0.0,
        "paste a rectangle of another image, its area of Beta(alpha, alpha), and mix the labels; with --mixup one of "
        "the two by chance; 0: none",
        least=0,
        most=1e4,
    )
    class_weights: str | None = _regularization(
        None,
        "weights of the classes in the labels' cross entropy: balanced (the inverse of their numbers of images), or "
        "numbers with commas between, in the order of the classes",
        type=str,
    )

    test_every: int | None = _of_recipe(
        _testing, "test after every so many epochs, and after the last", type=int, least=1
    )
    patience: int | None = _testing(
        None,
        "stop when the accuracy on the --validation images has not risen for so many epochs",
        type=int,
        least=1,
    )
    reestimate_batchnorm: int = _testing(
        512,
        "training images from which the statistics of every BatchNorm are taken again before each test, and four times "
        "as many before the last: running averages lag behind adder layers; 0: keep the running averages",
        least=0,
    )

    device: str = _machine("auto", "where to train; auto: a GPU if adderops has kernels for it", choices=DEVICES)
    threads: int | None = _machine(
        None, "CPU threads (default: what torch chooses here)", type=int, least=1, most=LARGEST_THREADS
    )
    workers: int = _machine(0, "processes that load images", least=0, most=LARGEST_THREADS)
    amp: str | None = _machine(
        None,
        "autocast to bfloat16, or to float16 with a gradient scaler (--amp alone: bfloat16); the adder layers stay in "
        "float32",
        type=str,
        choices=AMP,
        alone="bfloat16",
    )
    compile: bool = _machine(False, "torch.compile of the networks")
    channels_last: bool = _machine(False, "images and weights in channels_last memory format")
    sync_batchnorm: bool = _machine(False, "torchrun: BatchNorm over the batch of all processes")
    tensorboard: bool = _machine(False, "write the log for TensorBoard, too")
    checkpoint_minutes: float = _machine(10.0, "checkpoint within an epoch after this time", least=0)

    def __post_init__(self) -> None:
        if isinstance(self.amp, bool):  # as runs before float16 have it
            object.__setattr__(self, "amp", "bfloat16" if self.amp else None)
        check(self)
        if self.teacher == "frozen" and self.method in ("pkkd", "compare") and self.teacher_checkpoint is None:
            raise ValueError("teacher_checkpoint: expected a file for the frozen teacher, got none")
        if self.bits is not None and (self.initial is None or self.method == "cnn"):
            raise ValueError("bits: expected a trained adder network to start from (initial), got none")
        if self.method != "compare" and self.seeds is not None:
            raise ValueError(f"seeds: expected none for the method {self.method}, got {self.seeds}")
        if self.alpha == 0 and not self.logits:
            raise ValueError(
                "alpha: expected a positive number without logits, got 0: nothing would train the classifier"
            )
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

    def resolve(self) -> "Config":
        """Returns the same configuration with the recipe's values in place of None, and paths made absolute."""
        recipe = self._recipe()
        chosen = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("name", "source")}
        chosen |= {"recipe": recipe.name, "threads": torch.get_num_threads()}
        if self.method != "compare":
            del chosen["seeds"]
        values = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        if self.teacher == "none" and self.method == "pkkd":
            values["method"] = "plain"
        for f in fields(self):
            if f.name in ("teacher_checkpoint", "initial", "root") and getattr(self, f.name) != f.default:
                values[f.name] = str(Path(getattr(self, f.name)).resolve())
        resolved = replace(self, **values)
        if Path(resolved.data).is_dir():
            resolved = replace(resolved, data=str(Path(resolved.data).resolve()))
        return resolved

    def _recipe(self) -> Recipe:
        if self.recipe is not None:
            return RECIPES[self.recipe]
        if self.data is None and self.arch is None:
            return RECIPES[DEFAULT]
        data, arch = self.data or "digits", self.arch or "lenet5"
        for recipe in RECIPES.values():
            if (recipe.data, recipe.arch) == (data, arch):
                return recipe
        for recipe in RECIPES.values():  # one of a like network, else of like images
            if recipe.arch == arch:
                return replace(recipe, data=data)
        return replace(RECIPES["fashion-mnist-lenet5"], data=data, arch=arch)

    def command(self) -> str:
        """Returns the command that starts this run again."""
        words = ["python", "-m", "adderops.distill"]
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in asdict(self).items():
            if value == defaults[name]:
                continue
            if isinstance(value, bool):
                words.append(flag(name) if value else flag(f"no_{name}"))
            else:
                words += [flag(name), str(value)]
        return shlex.join(words)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Reads config.json; what an older version does not have takes its default.

        Raises:
            ValueError: not one of ours, or a field of another type or outside its range.
        """
        try:
            content = json.loads(path.read_text())
            if not isinstance(content, dict):
                raise ValueError(f"got {type(content).__name__} in place of names and values")
            config = cls(**content)
            resolved = [f.name for f in fields(cls) if f.metadata.get("of_recipe") or f.name == "threads"]
            for name in resolved:  # an older version may not have had an option, but for these
                if content.get(name, name not in ("data", "arch") or None) is None:
                    raise ValueError(f"{name}: expected a value, got none")
            return config if content.keys() >= set(resolved) else config.resolve()
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: expected a configuration as this program writes it ({error})") from error

    def differences(self, other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns name -> (other's, own) where another configuration means another run.

        Args:
            other: of a checkpoint; what it does not have takes its default, or that of its recipe.
        """
        names = {f.name for f in fields(self)}
        theirs = asdict(Config(**{name: value for name, value in other.items() if name in names}).resolve())
        own = {name: value for name, value in asdict(self).items() if name not in MACHINE}
        return {name: (theirs[name], value) for name, value in own.items() if value != theirs[name]}


def parse_weights(text: str) -> list[float]:
    """Returns the numbers of --class-weights.

    Raises:
        ValueError: not numbers of at least 0, one of them positive, with commas between.

    >>> parse_weights("1,2.5")
    [1.0, 2.5]
    """
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 <= weight <= 1e6 for weight in weights) or not any(weights):
        raise ValueError(
            f"class_weights: expected balanced, or numbers from 0 to 1e6 with commas between, got {text!r}"
        )
    return weights
