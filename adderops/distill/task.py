"""What is trained: a task holds the networks and turns a batch into losses; the trainer knows no more of the method."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.matching import FeatureMatch
from adderops.models import IntermediateOutputs


@dataclass
class Losses:
    """What a task makes of a batch.

    Attributes:
        total: sum of the losses of all networks in training; call `backward` on it.
        terms: what to log, one number each.
        logits: (N, classes) of each network by its role, 'teacher' or 'student'.
        layers: what to log of each matched layer, (layers) each.
        outputs: raw outputs of the student's matched layers.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: dict[str, Tensor]
    layers: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)


class SingleTask(nn.Module):
    """One network alone, trained on the labels by cross entropy.

    Args:
        network: gives logits.
        role: its name in logs and checkpoints: 'student' for an adder network, 'teacher' for a CNN.
    """

    layer_names: list[str] = []

    def __init__(self, network: nn.Module, role: str) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({role: network})

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        [(role, network)] = self.networks.items()
        logits = network(images)
        ce = cross_entropy(logits, labels)
        return Losses(ce, {f"{role}_ce": ce}, {role: logits})

    def diagnose(self, losses: Losses) -> dict[str, Tensor]:
        """Returns nothing: there is no distillation to watch."""
        return {}


class PKKDTask(nn.Module):
    r"""Kernel based knowledge distillation: an adder network taught by a CNN, which is trained beside it or frozen.

    .. math:: L_{student} = \beta L_{mid} + \alpha\,CE(student, labels)
              + T^2\,CE(student / T, softmax(teacher / T)), \quad L_{teacher} = CE(teacher, labels)

    The teacher's logits and layer outputs enter the student's losses detached, so the two losses share no parameter and
    `total` = L_student + L_teacher gives each network its own gradient.  One backward pass and one optimizer step are
    one step of each network, the student's against the teacher as it was before the step.

    The side branches are here and not in the networks: `networks['student']` is what gets deployed.

    Args:
        teacher, student: networks of the same architecture: `adderops.models.matched_layers` finds the same in both.
        match: makes L_mid, for the layers found; None: no L_mid.
        alpha: weight of the labels.
        beta: weight of L_mid.
        temperature: T; None: the teacher's logits are not imitated.
        frozen: the teacher is not trained, and runs as it does in testing.

    Raises:
        ValueError: the networks do not match layer by layer.

    Source: PKKD, arXiv 2009.13044, Algorithm 1 (which has T = 1).

    >>> from adderops.models import lenet5
    >>> task = PKKDTask(lenet5("cnn"), lenet5("adder"), FeatureMatch([16, 120, 84]))
    >>> losses = task(torch.randn(8, 1, 32, 32), torch.arange(8))
    >>> losses.total.backward()
    >>> sorted(losses.terms)
    ['imitation', 'l_mid', 'student_ce', 'student_loss', 'teacher_ce']
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        match: FeatureMatch | None,
        alpha: float = 1.0,
        beta: float = 0.1,
        temperature: float | None = 4.0,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"teacher": teacher, "student": student})
        self.match, self.alpha, self.beta, self.temperature, self.frozen = match, alpha, beta, temperature, frozen
        self.layer_names: list[str] = []
        if match is not None:
            self._outputs = {role: IntermediateOutputs(network) for role, network in self.networks.items()}
            channels = {role: [m.out_channels for m in o.layers] for role, o in self._outputs.items()}
            for role, found in channels.items():
                if found != match.channels:
                    raise ValueError(
                        f"PKKDTask: {role}: expected matched layers of {match.channels} channels, got {found}"
                    )
            self.layer_names = self._outputs["student"].names
            self._keep_outputs(False)
        teacher.requires_grad_(not frozen)
        self.train()

    def _keep_outputs(self, keep: bool) -> None:
        if self.match is not None:
            for outputs in self._outputs.values():
                outputs.enabled = keep

    def train(self, mode: bool = True) -> "PKKDTask":
        super().train(mode)
        if self.frozen:
            self.networks["teacher"].eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        """Returns the losses of a batch: images (N, C, H, W), labels (N) int64."""
        self._keep_outputs(True)  # and not while the networks are tested
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            teacher_logits = self.networks["teacher"](images)
        student_logits = self.networks["student"](images)
        self._keep_outputs(False)
        teacher_ce, student_ce = cross_entropy(teacher_logits, labels), cross_entropy(student_logits, labels)
        student_loss, terms = self.alpha * student_ce, {"student_ce": student_ce, "teacher_ce": teacher_ce}
        layers, outputs = {}, []
        if self.temperature is not None:
            terms["imitation"] = imitation_loss(student_logits, teacher_logits, self.temperature)
            student_loss = student_loss + terms["imitation"]
        if self.match is not None:
            of_teacher, outputs = (self._outputs[role].take() for role in ("teacher", "student"))
            terms["l_mid"], layers = self.match(outputs, of_teacher)
            student_loss = student_loss + self.beta * terms["l_mid"]
        return Losses(
            total=student_loss if self.frozen else student_loss + teacher_ce,
            terms={"student_loss": student_loss, **terms},
            logits={"teacher": teacher_logits, "student": student_logits},
            layers=layers,
            outputs=outputs,
        )

    def diagnose(self, losses: Losses) -> dict[str, Tensor]:
        r"""Returns what tells a collapse, of each matched layer; call it before `backward`.

        A falling L_mid alone does not: it may fall because features become constant (`var_yc`, the variance of y_c
        before its BatchNorm) or because it drowns the other losses (`gradient_ratio`,
        :math:`|\beta\,dL_{mid}/dY| / |d(L_{student} - \beta L_{mid})/dY|`).  Costs two backward passes of the student.
        """
        if self.match is None:
            return {}
        mid = self.beta * losses.terms["l_mid"]

        def gradient_norms(loss: Tensor) -> Tensor:
            return torch.stack([g.norm() for g in torch.autograd.grad(loss, losses.outputs, retain_graph=True)])

        ratio = gradient_norms(mid) / gradient_norms(losses.terms["student_loss"] - mid).clamp(min=1e-30)
        return {**losses.layers, "gradient_ratio": ratio}


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cross entropy over the images of all processes; target: labels (N) or shares (N, classes).

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    return global_mean(F.cross_entropy(logits.float(), target), len(logits))


def imitation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Returns :math:`T^2\,CE(student / T, softmax(teacher / T))`, the mean over the batch; no gradient to the teacher.

    Args:
        student_logits, teacher_logits: (N, classes).
        temperature: T; the factor keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    >>> imitation_loss(torch.zeros(1, 2), torch.tensor([[9.0, 5.0]]))
    tensor(0.6931)
    """
    target = (teacher_logits.detach().float() / temperature).softmax(1)
    return temperature**2 * cross_entropy(student_logits / temperature, target)
