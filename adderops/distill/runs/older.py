"""Runs of versions that wrote no data.json: what is known about their images, and the sizes of their networks."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adderops.distill.build import load_data_of
from adderops.distill.checkpoint import load_state_dict, reading
from adderops.distill.config import Config
from adderops.distill.data import known_facts
from adderops.distill.networks import arch_of
from adderops.models import classifier, create_model, input_size


def facts_of_images(config: Config, weights: Path) -> dict[str, Any]:
    """Returns `Data.facts` of the image set as it is now.

    If the images are missing, these are the facts that need none: without numbers of images, and without mean and
    standard deviation unless they are published.  Nothing is written: the set may have changed since the training.

    Args:
        config: of the run.
        weights: file of one of its networks.

    Raises:
        FileNotFoundError: the images are missing and their size is unknown, or there are no weights.
        ValueError: damaged files, or the images do not have the channels and classes of the network.
    """
    arch, state = arch_of(config, weights.stem.partition("_")[0]), load_state_dict(weights)
    with reading(weights, f"a state_dict of {arch}", "another"):
        channels, classes = sizes_of_network(arch, state)
    try:
        facts = load_data_of(config).facts()
    except FileNotFoundError:
        facts = known_facts(config.data, Path(config.root), config.side or input_size(config.arch))
        return {**facts, "channels": channels, "num_classes": classes}
    if (facts["channels"], facts["num_classes"]) != (channels, classes):
        raise ValueError(
            f"{weights.parent}: expected the images of the run, of {channels} channels and {classes} classes, "
            f"got {facts['channels']} and {facts['num_classes']}"
        )
    return facts


def sizes_of_network(arch: str, state: dict[str, Tensor]) -> tuple[int, int]:
    """Returns image channels and number of classes of the network of this architecture that has these weights."""
    with torch.device("meta"):
        like = create_model(arch, "cnn")
    name, first = next((name, m) for name, m in like.named_modules() if isinstance(m, nn.Conv2d))
    return state[f"{name}.weight"].size(1) * first.groups, state[f"{classifier(like)[0]}.weight"].size(0)
