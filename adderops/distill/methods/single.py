"""One network alone, trained on the labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adderops.distill.methods.task import LabelLoss, Losses, Task, register_method
from adderops.distill.networks import build_networks

if TYPE_CHECKING:
    from adderops.distill.config import Config
    from adderops.distill.data import Data


class SingleTask(Task):
    """One network alone, trained on the labels.

    Args:
        network: gives logits.
        role: its name in logs and checkpoints: 'student' for an adder network, 'teacher' for a CNN.
        label_loss: of logits and labels; the plain cross entropy by default.
    """

    def __init__(self, network: nn.Module, role: str, label_loss: LabelLoss | None = None) -> None:
        super().__init__({role: network}, label_loss)
        self.main = role

    @classmethod
    def build(cls, config: Config, data: Data, device: torch.device) -> Task:
        [(role, network)] = build_networks(config, cls.roles, cls.main, data, device).items()
        return cls(network, role, LabelLoss.build(config, data)).to(device)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        logits = self.networks[self.main](images)
        ce = self.label_loss(logits, labels)
        return Losses(ce, {f"{self.main}_ce": ce}, {self.main: logits})


@register_method("plain")
class PlainTask(SingleTask):
    """The adder network alone, by the labels."""

    roles = {"student": "adder"}
    label = "adder, by the labels"


@register_method("cnn")
class CNNTask(SingleTask):
    """The CNN alone, by the labels: PKKD's teacher."""

    roles = {"teacher": "cnn"}
    main = "teacher"
    label = "CNN"
