"""The configuration of a run: one dataclass, from which the command line, its help and config.json follow."""

import json
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from adderops.distill.matching import FEATURES, MID_NORMS, MID_REDUCTIONS, TEACHER_LINEARS, WIDTHS
from adderops.distill.options import LARGEST_THREADS, check
from adderops.distill.options import option as _option
from adderops.distill.recipes import RECIPES, Recipe

METHODS = ("compare", "pkkd", "plain", "cnn")
TEACHERS = ("progressive", "frozen", "none")
DEVICES = ("auto", "cpu", "cuda")
# Of a finished run these may differ without it being another run.
MACHINE = ("threads", "workers", "device", "download", "tensorboard", "checkpoint_minutes")


def _of_recipe(help: str, **metadata):
    return _option(None, f"{help} (default: of the recipe)", of_recipe=True, **metadata)


@dataclass(frozen=True)
class Config:
    """All that decides a run's result, and where it is computed.

    The help of each field says what it is; a None is replaced by `resolve()`.

    Raises:
        ValueError: a value outside its range; the message names field, expected, got.

    >>> Config().resolve().epochs
    20
    """

    recipe: str | None = _option(
        None, "settings to start from (default: that of --data and --arch)", type=str, choices=tuple(RECIPES)
    )

    data: str | None = _of_recipe(
        "digits (embedded), mnist, fashion-mnist, cifar10, cifar100, imagenet, or a folder of idx files or of images",
        type=str,
    )
    root: str = _option("data", "folder in which mnist, fashion-mnist, cifar10, cifar100, imagenet lie")
    download: bool = _option(False, "fetch the data to --root where torchvision can")
    train_images: int | None = _option(
        None, "train on a balanced random subset of this many images (default: all)", type=int, least=2
    )
    validation: int = _option(
        0, "take this many images out of the training set and test on them instead of on the test images", least=0
    )
    augment: str | None = _option(
        None, "of training images: none, crop, crop-flip or imagenet (default: the usual of the set)", type=str
    )
    side: int | None = _option(None, "of the images of a folder (default: that of the network)", type=int, least=8)
    workers: int = _option(0, "processes that load images", least=0, most=LARGEST_THREADS)

    arch: str | None = _of_recipe(
        "network of teacher and student: lenet5, vgg_small, resnet20, resnet32, resnet18, resnet50, mobilenet, "
        "torchvision/NAME or timm/NAME",
        type=str,
    )
    method: str = _option(
        "compare",
        "pkkd: CNN teacher and adder student together; plain: the adder network alone; cnn: the CNN alone; "
        "compare: pkkd, then plain, and a table",
        choices=METHODS,
    )
    teacher: str = _option(
        "progressive",
        "pkkd: progressive: trained beside the student; frozen: stays as --teacher-checkpoint; none: as plain",
        choices=TEACHERS,
    )
    teacher_checkpoint: str | None = _option(
        None, "pkkd: state_dict that the teacher starts from, or stays at when frozen; teacher.pt of a run", type=str
    )
    features: str = _option("kernel+1x1", "pkkd: what matches the inner layers", choices=FEATURES)
    logits: bool = _option(True, "pkkd: imitate the teacher's logits")
    alpha: float = _option(1.0, "pkkd: weight of the labels' cross entropy in the student's loss", least=0)
    beta: float = _option(0.1, "pkkd: weight of L_mid, the match of inner features, in the student's loss", least=0)
    temperature: float = _option(4.0, "pkkd: of the softmax of both logits in the imitation", least=1e-3)
    width: str = _option(
        "batch",
        "pkkd: 2 sigma^2 of the kernels: batch: follows the mean |output| of each batch; learned: starts there and is "
        "trained; fixed: that of the first batch",
        choices=WIDTHS,
    )
    shared_width: bool = _option(False, "pkkd: one sigma for all layers of a network")
    teacher_linear: str = _option(
        "trained", "pkkd: the teacher's 1x1 convolution: trained by L_mid, or fixed", choices=TEACHER_LINEARS
    )
    mid_norm: str = _option("batchnorm", "pkkd: behind the 1x1 convolutions", choices=MID_NORMS)
    mid_reduction: str = _option(
        "mean",
        "pkkd: L_mid as a mean over elements, or as a sum over layers, channels and pixels",
        choices=MID_REDUCTIONS,
    )

    epochs: int | None = _of_recipe("passes over the training images", type=int, least=1)
    batch_size: int | None = _of_recipe("images a step, over all processes", type=int, least=2)
    lr: float | None = _of_recipe(
        "learning rate of the first epoch, falling to 0 as a cosine, set once an epoch", type=float, least=0
    )
    weight_decay: float | None = _of_recipe("weight decay of all parameters", type=float, least=0)
    nesterov: bool | None = _of_recipe("Nesterov momentum", type=bool)
    eta: float = _option(0.2, "root mean square of the adder layers' weight gradients", least=1e-6)
    accumulate: int = _option(1, "parts of a batch that go through the networks one after the other", least=1)
    clip: float | None = _option(
        None,
        "largest norm of the gradient of all parameters but the adder layers', whose rate is --eta",
        type=float,
        least=0,
    )
    ema: float | None = _option(
        None,
        "decay a step of an exponential moving average of the weights, tested and saved beside",
        type=float,
        least=0,
        most=1,
    )
    initial: str | None = _option(None, "state_dict that the trained network starts from (fine-tuning)", type=str)
    bits: int | None = _option(
        None,
        "round inputs and weights of the student's adder layers to grids of this many bits, which fit the network of "
        "--initial; gradients go straight through",
        type=int,
        least=2,
        most=8,
    )
    rifle: int | None = _option(
        None, "re-draw the classifier every so many epochs, its learning rate starting anew (RIFLE)", type=int, least=1
    )
    seed: int = _option(
        0, "decides initial weights and the order of images; the same for every method", least=0, most=2**32 - 1
    )

    device: str = _option("auto", "where to train; auto: a GPU if adderops has kernels for it", choices=DEVICES)
    threads: int | None = _option(
        None, "CPU threads (default: what torch chooses here)", type=int, least=1, most=LARGEST_THREADS
    )
    amp: bool = _option(False, "bfloat16 autocast (the adder layers stay in float32)")
    compile: bool = _option(False, "torch.compile of the networks")
    channels_last: bool = _option(False, "images and weights in channels_last memory format")
    sync_batchnorm: bool = _option(False, "torchrun: BatchNorm over the batch of all processes")
    tensorboard: bool = _option(False, "write the log for TensorBoard, too")
    checkpoint_minutes: float = _option(10.0, "checkpoint within an epoch after this time", least=0)

    def __post_init__(self) -> None:
        check(self)
        if self.teacher == "frozen" and self.method in ("pkkd", "compare") and self.teacher_checkpoint is None:
            raise ValueError("teacher_checkpoint: expected a file for the frozen teacher, got none")
        if self.bits is not None and (self.initial is None or self.method == "cnn"):
            raise ValueError("bits: expected a trained adder network to start from (initial), got none")
        if self.alpha == 0 and not self.logits:
            raise ValueError(
                "alpha: expected a positive number without logits, got 0: nothing would train the classifier"
            )

    def resolve(self) -> "Config":
        """Returns the same configuration with the recipe's values in place of None, and paths made absolute."""
        recipe = self._recipe()
        chosen = {f.name: getattr(recipe, f.name) for f in fields(recipe) if f.name not in ("name", "source")}
        chosen |= {"recipe": recipe.name, "threads": torch.get_num_threads()}
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
        data, arch = self.data or "digits", self.arch or "lenet5"
        for recipe in RECIPES.values():
            if (recipe.data, recipe.arch) == (data, arch):
                return recipe
        for recipe in RECIPES.values():  # one of a like network, else of like images
            if recipe.arch == arch:
                return replace(recipe, data=data)
        return replace(RECIPES["fashion-mnist-lenet5"], data=data, arch=arch)

    def command(self) -> str:
        """Returns the command that starts this run anew."""
        words = ["python", "-m", "adderops.distill"]
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in asdict(self).items():
            if value == defaults[name]:
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Reads config.json; raises ValueError where it is not one of ours."""
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
        """Returns name -> (other's, own) where another configuration means another run."""
        own = {name: value for name, value in asdict(self).items() if name not in MACHINE}
        return {name: (other.get(name), value) for name, value in own.items() if value != other.get(name)}
