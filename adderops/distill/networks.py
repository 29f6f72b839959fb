"""The networks of a run: built from a configuration, and their weights read from files."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from adderops.distill.checkpoint import load_state_dict
from adderops.distill.distributed import synchronize_batchnorm
from adderops.models import (
    classifier,
    load_reference_checkpoint,
    mark_adder_weights,
    unwrap_state_dict,
)
from adderops.optim import AdaptiveRateLayer
from adderops.quant import Scheme, insert

if TYPE_CHECKING:
    from adderops.distill.config import Config
    from adderops.distill.data import Data
    from adderops.distill.methods import Task

SEEDS = {"teacher": 0, "student": 1}  # of other roles a checksum of the name


def arch_of(config: Config, role: str) -> str:
    """Returns the architecture of a run's network."""
    of_teacher = config.distillation.teacher_arch if config.distillation is not None else None
    return of_teacher if role == "teacher" and of_teacher is not None else config.arch


def build_networks(config: Config, task: type[Task], data: Data, device: torch.device) -> dict[str, nn.Module]:
    """Builds the networks of a run, by role.

    A network's initial weights depend on the seed and its role only: the student starts alike in all methods, and so
    does the teacher.

    Args:
        config: of the run.
        task: has the roles; the main one starts from --initial.
        data: has `in_channels` and `num_classes`.
        device: of the networks.
    """
    networks = {}
    for role in task.roles:
        main = role == task.main
        entropy = np.random.SeedSequence([config.seed, SEEDS.get(role, zlib.crc32(role.encode()))])
        torch.manual_seed(int(entropy.generate_state(1)[0]))
        initial = Path(config.initial) if main and config.initial is not None else None
        network = task.network(config, role, data.in_channels, data.num_classes, initial)
        for module in network.modules():
            if isinstance(module, AdaptiveRateLayer):
                module.set_eta(config.eta)
        if main and config.bits is not None:
            network = insert(network, Scheme(config.bits))
        if config.sync_batchnorm:
            network = synchronize_batchnorm(network, device)
        networks[role] = network.to(device)
        if config.channels_last:
            networks[role].to(memory_format=torch.channels_last)
    return networks


def load_weights(network: nn.Module, path: Path, any_classifier: bool = False) -> None:
    """Loads a state_dict: of a run, of the AdderNet reference code, or of timm or torchvision, also .safetensors.

    Args:
        network: gets the weights.
        path: of the file.
        any_classifier: keep the network's own classifier where the file has one of another shape.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a state_dict, or not one of this network.
    """
    found = _load_safetensors(path) if path.suffix == ".safetensors" else load_state_dict(path)
    state = unwrap_state_dict(found, network)
    if path.name.startswith("student") and (path.parent / "config.json").exists():
        state = mark_adder_weights(state, network)  # a run from before adder weights were marked
    own = network.state_dict()
    if any_classifier:
        # with everything after the classifier, such as a BatchNorm on the logits
        head = list(own)[list(own).index(classifier(network)[0] + ".weight") :]
        other = [name for name in head if name in state and state[name].shape != own[name].shape]
        if other:
            print(f"{path}: the classifier is for another number of classes; ours keeps its initial weights")
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
