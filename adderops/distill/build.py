"""From a configuration to images, networks, task and optimizer."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from adderops import _ops
from adderops.distill.checkpoint import load_state_dict
from adderops.distill.config import Config
from adderops.distill.data import Data, load_data
from adderops.distill.distributed import synchronize_batchnorm
from adderops.distill.matching import FeatureMatch
from adderops.distill.task import PKKDTask, SingleTask
from adderops.models import classifier, create_model, input_size, load_reference_checkpoint, matched_layers
from adderops.optim import AdaptiveRateLayer
from adderops.quant import Scheme, insert

MOMENTUM = 0.9
KIND_OF_ROLE = {"teacher": "cnn", "student": "adder"}


def load_data_of(config: Config) -> Data:
    """Loads the image set of a configuration; images of a folder get the size that the network is made for."""
    of_files = config.data == "imagenet" or (Path(config.data) / "train").is_dir()
    return load_data(
        config.data,
        root=Path(config.root),
        download=config.download,
        augment=config.augment,
        train_images=config.train_images,
        validation=config.validation or 0,
        side=input_size(config.arch) if of_files and config.side is None else config.side,
    )


def device_type(config: Config) -> str:
    """'cpu' or 'cuda'; raises ValueError where --device cuda cannot be had."""
    reason = _ops.CUDA_KERNELS_MISSING or (None if torch.cuda.is_available() else "torch finds no GPU")
    if config.device == "cuda" and reason:
        raise ValueError(f"device: expected cpu or auto, got cuda: {reason}")
    return "cpu" if reason or config.device == "cpu" else "cuda"


def main_role(config: Config) -> str:
    """The network that the run is about: what --initial, --ema and --rifle mean."""
    return "teacher" if config.method == "cnn" else "student"


def build_task(config: Config, in_channels: int, num_classes: int, device: torch.device) -> PKKDTask | SingleTask:
    """Builds the networks of a run and the task that trains them.

    A network's initial weights depend on the seed and its role only: the student of `plain` starts as the student of
    `pkkd` does, and `cnn` is the training of pkkd's teacher.
    """

    def network(role: str) -> nn.Module:
        entropy = np.random.SeedSequence([config.seed, list(KIND_OF_ROLE).index(role)])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        made = create_model(config.arch, KIND_OF_ROLE[role], in_channels, num_classes)
        for module in made.modules():
            if isinstance(module, AdaptiveRateLayer):
                module.set_eta(config.eta)
        if role == main_role(config) and config.initial is not None:
            load_weights(made, Path(config.initial), any_classifier=True)
        if role == "student" and config.bits is not None:
            made = insert(made, Scheme(config.bits))
        if config.sync_batchnorm:
            made = synchronize_batchnorm(made, device)
        return made.to(device, memory_format=torch.channels_last if config.channels_last else torch.preserve_format)

    if config.method != "pkkd":
        role = main_role(config)
        return SingleTask(network(role), role).to(device)
    teacher, student = network("teacher"), network("student")
    frozen = config.teacher == "frozen"
    if config.teacher_checkpoint is not None:
        load_weights(teacher, Path(config.teacher_checkpoint), any_classifier=not frozen)
    match = None
    if config.features != "none":
        torch.manual_seed(config.seed)
        match = FeatureMatch(
            [layer.out_channels for layer in matched_layers(student).values()],
            config.features,
            config.width,
            config.shared_width,
            config.teacher_linear,
            config.mid_norm,
            config.mid_reduction,
        )
    temperature = config.temperature if config.logits else None
    return PKKDTask(teacher, student, match, config.alpha, config.beta, temperature, frozen).to(device)


def load_weights(network: nn.Module, path: Path, any_classifier: bool = False) -> None:
    """Loads a state_dict: student.pt or teacher.pt of a run, or a checkpoint of the AdderNet reference code.

    Args:
        any_classifier: leave the classifier as it is where the file has one of another shape, for another task.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state_dict, or not one of this network.
    """
    state = {name.removeprefix("module."): value for name, value in load_state_dict(path).items()}
    own = network.state_dict()
    if any_classifier:
        # what stands behind the classifier (a BatchNorm on the logits) goes with it
        head = list(own)[list(own).index(classifier(network)[0] + ".weight") :]
        other = [name for name in head if name in state and state[name].shape != own[name].shape]
        if other:
            print(f"{path}: the classifier is for another number of classes; ours starts anew")
            state |= {name: own[name] for name in head}
    try:
        load_reference_checkpoint(network, state)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected a state_dict of this network: {error}") from error


def build_optimizer(config: Config, task: nn.Module) -> torch.optim.SGD:
    """One optimizer for both networks: they share no parameter, so its step is one step of each.

    Groups: everything; the classifier, under --rifle, with a learning rate of its own; logarithms of kernel widths,
    which no weight decay may pull to 0.
    """
    head = set(classifier(task.networks[main_role(config)])[1].parameters()) if config.rifle else set()
    groups: dict[str, list[nn.Parameter]] = {"all": [], "classifier": [], "widths": []}
    for name, parameter in task.named_parameters():
        if parameter.requires_grad:
            kind = "widths" if name.endswith("log_width") else "classifier" if parameter in head else "all"
            groups[kind].append(parameter)
    return torch.optim.SGD(
        [
            {"params": parameters, "name": name} | ({"weight_decay": 0.0} if name == "widths" else {})
            for name, parameters in groups.items()
            if parameters
        ],
        config.lr,
        momentum=MOMENTUM,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def build_average(config: Config, task: nn.Module) -> AveragedModel | None:
    """The exponential moving average of the main network's weights and BatchNorm statistics, if asked for."""
    if config.ema is None:
        return None
    network = task.networks[main_role(config)]
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
