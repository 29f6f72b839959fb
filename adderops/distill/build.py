"""From a configuration to images, optimizer, mixing of images and moving average."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """Loads the image set of a configuration; images of an image folder get the size that the network expects."""
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


def build_optimizer(config: Config, task: Task) -> torch.optim.Optimizer:
    """Builds one optimizer for all networks: they share no parameter, so its step is one step of each.

    The classifier has a group and a learning rate of its own under --rifle.
    """
    head = set(classifier(task.networks[task.main])[1].parameters()) if config.rifle else set()
    groups: dict[str, list[nn.Parameter]] = {"all": [], "classifier": []}
    for parameter in task.parameters():
        if parameter.requires_grad:
            groups["classifier" if parameter in head else "all"].append(parameter)
    named = [{"params": parameters, "name": name} for name, parameters in groups.items() if parameters]
    if config.optimizer == "sgd":
        return sgd(named, config.lr, config.weight_decay, config.nesterov, config.momentum)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    fused = all(parameter.is_cuda for group in groups.values() for parameter in group)
    betas = config.momentum, config.beta2
    return kind(named, config.lr, betas, weight_decay=config.weight_decay, fused=fused or None)


def sgd(
    groups: list[dict[str, Any]], lr: float, weight_decay: float, nesterov: bool, momentum: float = MOMENTUM
) -> torch.optim.SGD:
    """Builds SGD with momentum; on a GPU fused, which reads learning rate and overflow there and not on the host.

    Args:
        groups: of parameters.
        lr, weight_decay, nesterov, momentum: see `torch.optim.SGD`.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.is_cuda for parameter in parameters)
    optimizer = torch.optim.SGD(groups, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused or None)
    for parameter in parameters if fused and momentum else ():
        # the fused kernel would begin with arbitrary numbers if the gradient scaler skips the first step
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor):
                value.zero_()


class MovingAverage(AveragedModel):
    """Exponential moving average of a network's weights and BatchNorm statistics, which waits for no GPU.

    Args:
        network: to average.
        decay: per step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        average = get_ema_multi_avg_fn(decay)
        super().__init__(network, multi_avg_fn=average, use_buffers=True)
        self._average = average

    def update_parameters(self, model: nn.Module) -> None:
        if self.n_averaged == 0:  # copies
            super().update_parameters(model)
            return
        # after that, torch's own sends the count to the device in each step
        ours, theirs = ([*(t.detach() for t in (*m.parameters(), *m.buffers()))] for m in (self.module, model))
        for floating in (True, False):
            pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point() == floating]
            if pairs:
                self._average([a for a, _ in pairs], [b for _, b in pairs], self.n_averaged)
        self.n_averaged += 1


def build_average(config: Config, task: Task) -> MovingAverage | None:
    """Builds the moving average of the main network, if --ema asks for it."""
    return None if config.ema is None else MovingAverage(task.networks[task.main], config.ema)
