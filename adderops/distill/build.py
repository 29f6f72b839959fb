"""From a configuration to images, optimizer, mixing of images and moving average."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from adderops import _ops
from adderops.distill.config import Config
from adderops.distill.data import Data, load_data
from adderops.distill.methods import Task
from adderops.models import classifier, input_size

MOMENTUM = 0.9


def load_data_of(config: Config) -> Data:
    """Loads the image set of a configuration; images of a folder get the size that the network is made for."""
    of_files = config.data == "imagenet" or (Path(config.data) / "train").is_dir()
    return load_data(
        config.data,
        root=Path(config.root),
        download=config.download,
        augment=config.augment,
        train_images=config.train_images,
        validation=config.validation,
        side=input_size(config.arch) if of_files and config.side is None else config.side,
    )


def device_type(device: str) -> str:
    """Returns 'cpu' or 'cuda' for a value of --device.

    Raises:
        ValueError: cuda without a GPU or without kernels for it.
    """
    reason = _ops.CUDA_KERNELS_MISSING or (None if torch.cuda.is_available() else "torch finds no GPU")
    if device == "cuda" and reason:
        raise ValueError(f"device: expected cpu or auto, got cuda: {reason}")
    return "cpu" if reason or device == "cpu" else "cuda"


def build_optimizer(config: Config, task: Task) -> torch.optim.SGD:
    """Builds one optimizer for all networks: they share no parameter, so its step is one step of each.

    The classifier has a group and a learning rate of its own under --rifle.
    """
    head = set(classifier(task.networks[task.main])[1].parameters()) if config.rifle else set()
    groups: dict[str, list[nn.Parameter]] = {"all": [], "classifier": []}
    for parameter in task.parameters():
        if parameter.requires_grad:
            groups["classifier" if parameter in head else "all"].append(parameter)
    return torch.optim.SGD(
        [{"params": parameters, "name": name} for name, parameters in groups.items() if parameters],
        config.lr,
        momentum=MOMENTUM,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def build_mix(config: Config, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Builds mixup, CutMix, or one of the two by chance; None where neither is asked for."""
    kinds = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds.items() if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else next(iter(mixes), None)


def redraw_classifier(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Draws the weights of the classifier again (RIFLE), and forgets their momentum."""
    head = classifier(network)[1]
    head.reset_parameters()  # type: ignore[operator]  # every classifier is a Linear or a Conv2d
    for parameter in head.parameters():
        optimizer.state.pop(parameter, None)


def build_average(config: Config, task: Task) -> AveragedModel | None:
    """Builds the moving average of the main network's weights and BatchNorm statistics, if --ema asks for it."""
    if config.ema is None:
        return None
    network = task.networks[task.main]
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
