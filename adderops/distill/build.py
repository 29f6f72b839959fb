"""From a configuration to images, networks, task and optimizer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from adderops import _ops
from adderops.distill.checkpoint import load_state_dict
from adderops.distill.config import Config, parse_weights
from adderops.distill.data import Data, load_data
from adderops.distill.distributed import synchronize_batchnorm
from adderops.distill.matching import FeatureMatch, layer_pairs, pair_channels
from adderops.distill.task import LabelLoss, PKKDTask, SingleTask
from adderops.models import (
    classifier,
    create_model,
    input_size,
    load_reference_checkpoint,
    mark_adder_weights,
    unwrap_state_dict,
)
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


def arch_of(config: Config, role: str) -> str:
    """The architecture of a run's network."""
    return config.teacher_arch if role == "teacher" and config.teacher_arch is not None else config.arch


def build_task(
    config: Config, in_channels: int, num_classes: int, device: torch.device, label_loss: LabelLoss | None = None
) -> PKKDTask | SingleTask:
    """Builds the networks of a run and the task that trains them.

    A network's initial weights depend on the seed and its role only: the student of `plain` starts as the student of
    `pkkd` does, and `cnn` is the training of pkkd's teacher.
    """

    def network(role: str) -> nn.Module:
        entropy = np.random.SeedSequence([config.seed, list(KIND_OF_ROLE).index(role)])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        made = create_model(arch_of(config, role), KIND_OF_ROLE[role], in_channels, num_classes)
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
        return SingleTask(network(role), role, label_loss).to(device)
    teacher, student = network("teacher"), network("student")
    frozen = config.teacher == "frozen"
    if config.teacher_checkpoint is not None:
        load_weights(teacher, Path(config.teacher_checkpoint), any_classifier=not frozen)
    match = pairs = None
    if config.features != "none":
        torch.manual_seed(config.seed)
        pairs = layer_pairs(student, teacher)
        match = FeatureMatch(
            pair_channels(student, teacher, pairs),
            config.features,
            config.width,
            config.shared_width,
            config.teacher_linear,
            config.mid_norm,
            config.mid_reduction,
        )
    temperature = config.temperature if config.logits else None
    task = PKKDTask(teacher, student, match, config.alpha, config.beta, temperature, frozen, pairs, label_loss)
    return task.to(device)


def load_weights(network: nn.Module, path: Path, any_classifier: bool = False) -> None:
    """Loads a state_dict: of a run, of the AdderNet reference code, or of timm or torchvision, .safetensors too.

    Args:
        any_classifier: leave the classifier as it is where the file has one of another shape, for another task.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state_dict, or not one of this network.
    """
    found = _load_safetensors(path) if path.suffix == ".safetensors" else load_state_dict(path)
    state = unwrap_state_dict(found, network)
    if path.name.startswith("student") and (path.parent / "config.json").exists():
        state = mark_adder_weights(state, network)  # a run of before there were marks
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


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no state_dict")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{path} needs safetensors: pip install safetensors") from missing
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a whole state_dict, got a damaged file ({error})") from error


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


def build_label_loss(config: Config, data: Data) -> LabelLoss:
    """The cross entropy with the labels that a configuration asks for.

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
    return LabelLoss(config.label_smoothing, weights)


def build_mix(config: Config, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup, CutMix, or one of the two by chance; None where neither is asked for."""
    kinds = {v2.MixUp: config.mixup, v2.CutMix: config.cutmix}
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds.items() if alpha]
    return v2.RandomChoice(mixes) if len(mixes) > 1 else next(iter(mixes), None)


def redraw_classifier(network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Draws the weights of the classifier again (RIFLE), and forgets their momentum."""
    head = classifier(network)[1]
    head.reset_parameters()
    for parameter in head.parameters():
        optimizer.state.pop(parameter, None)


def build_average(config: Config, task: nn.Module) -> AveragedModel | None:
    """The exponential moving average of the main network's weights and BatchNorm statistics, if asked for."""
    if config.ema is None:
        return None
    network = task.networks[main_role(config)]
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
