"""One network alone, trained on the labels."""

from torch import nn

from adderops.distill.methods.task import LabelLoss, Task, register_method


@register_method("plain")
class PlainTask(Task):
    """The adder network alone, by the labels."""

    roles = {"student": "adder"}
    label = "adder, by the labels"


@register_method("cnn")
class CNNTask(Task):
    """The CNN alone, by the labels: the teacher of PKKD."""

    roles = {"teacher": "cnn"}
    main = "teacher"
    label = "CNN"


class SingleTask(Task):
    """A network of your own alone, trained on the labels.

    Args:
        network: gives logits.
        role: its name in logs and checkpoints: 'student' for an adder network, 'teacher' for a CNN.
        label_loss: of logits and labels; the plain cross entropy by default.

    >>> import torch
    >>> task = SingleTask(nn.Sequential(nn.Flatten(), nn.Linear(16, 10)), "student")
    >>> task(torch.randn(8, 1, 4, 4), torch.arange(8)).terms.keys()
    dict_keys(['student_ce'])
    """

    def __init__(self, network: nn.Module, role: str, label_loss: LabelLoss | None = None) -> None:
        super().__init__({role: network}, label_loss)
        self.main = role
