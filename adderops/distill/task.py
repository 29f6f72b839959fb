"""What is trained: a task holds the networks and turns a batch into losses; the trainer knows no more of the method."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.matching import FeatureMatch, layer_pairs, pair_channels
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


class LabelLoss(nn.Module):
    r"""The cross entropy with the labels, :math:`-\frac1N \sum_{n,c} w_c\, p_{nc} \log q_{nc}`.

    Args:
        label_smoothing: s in p = (1 - s) label + s / classes.
        class_weights: (classes) w; none are 1 for all.  The mean is over the images, so that parts of a batch add up.

    Shape:
        logits (N, classes); labels (N) int64, or shares (N, classes) as mixup makes them.

    >>> loss = LabelLoss(class_weights=torch.tensor([1.0, 3.0]))
    >>> loss(torch.zeros(2, 2), torch.tensor([0, 1]))
    tensor(1.3863)
    """

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return cross_entropy(logits, labels, self.label_smoothing)
        if self.class_weights.shape != logits.shape[1:]:
            raise ValueError(
                f"class_weights: expected one for each of {logits.size(1)} classes, got {self.class_weights.numel()}"
            )
        losses = F.cross_entropy(
            logits.float(),
            labels,
            self.class_weights,
            label_smoothing=self.label_smoothing,
            reduction="none",  # torch's mean is over the weights for labels, and over the images for shares
        )
        return global_mean(losses.mean(), len(logits))


class SingleTask(nn.Module):
    """One network alone, trained on the labels.

    Args:
        network: gives logits.
        role: its name in logs and checkpoints: 'student' for an adder network, 'teacher' for a CNN.
        label_loss: of logits and labels; the plain cross entropy by default.
    """

    layer_names: list[str] = []

    def __init__(self, network: nn.Module, role: str, label_loss: LabelLoss | None = None) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({role: network})
        self.label_loss = label_loss or LabelLoss()

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        [(role, network)] = self.networks.items()
        logits = network(images)
        ce = self.label_loss(logits, labels)
        return Losses(ce, {f"{role}_ce": ce}, {role: logits})

    def diagnose(self, losses: Losses) -> dict[str, Tensor]:
        """Returns nothing: there is no distillation to watch."""
        return {}


class PKKDTask(nn.Module):
    r"""Kernel based knowledge distillation: an adder network taught by a CNN, which is trained beside it or frozen.

    .. math:: L_{student} = \beta L_{mid} + \alpha\,CE(student, labels)
              + T^2\,KL(softmax(teacher / T) \| softmax(student / T)), \quad L_{teacher} = CE(teacher, labels)

    The paper has a cross entropy where KL stands: the same gradient, and a value that differs by the teacher's entropy.

    The teacher's logits and layer outputs enter the student's losses detached, so the two losses share no parameter and
    `total` = L_student + L_teacher gives each network its own gradient.  One backward pass and one optimizer step are
    one step of each network, the student's against the teacher as it was before the step.

    The side branches are here and not in the networks: `networks['student']` is what gets deployed.

    Args:
        teacher, student: networks that give logits of the same classes.
        match: makes L_mid, for the layers matched; None: no L_mid.
        alpha: weight of the labels.
        beta: weight of L_mid.
        temperature: T; None: the teacher's logits are not imitated.
        frozen: the teacher is not trained, and runs as it does in testing.
        layers: what to match, see `layer_pairs`; by default all between the first convolution and the classifier.
        label_loss: of logits and labels, for both networks; the plain cross entropy by default.

    Raises:
        ValueError: the networks' layers are not those that `match` is made for, or, in `forward`, the logits differ in
            the number of classes.

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
        layers: Mapping[str, str] | None = None,
        label_loss: LabelLoss | None = None,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({"teacher": teacher, "student": student})
        self.match, self.alpha, self.beta, self.temperature, self.frozen = match, alpha, beta, temperature, frozen
        self.label_loss = label_loss or LabelLoss()
        self.layer_names: list[str] = []
        if match is not None:
            pairs = layer_pairs(student, teacher, layers)
            found = list(zip(*pair_channels(student, teacher, pairs), strict=True))
            expected = list(zip(*match.channels, strict=True))
            for role, of_role, got in zip(("student", "teacher"), expected, found, strict=True):
                if got != of_role:
                    raise ValueError(
                        f"PKKDTask: {role}: expected matched layers of {list(of_role)} channels, got {list(got)}"
                    )
            self.layer_names, self._of_teacher = list(pairs), list(pairs.values())
            self._outputs: dict[str, IntermediateOutputs] = {}
            self._keep_outputs(False)
        if frozen:
            teacher.requires_grad_(False)
        self.train()

    def release(self) -> None:
        """Takes the hooks off the networks, to copy, export or pickle them; the next forward puts them on again."""
        if self.match is not None:
            for outputs in self._outputs.values():
                outputs.remove()
            self._outputs = {}

    def _keep_outputs(self, keep: bool) -> None:
        if self.match is not None:
            if not self._outputs:
                names = {"teacher": list(dict.fromkeys(self._of_teacher)), "student": self.layer_names}
                self._outputs = {role: IntermediateOutputs(self.networks[role], names[role]) for role in names}
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
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"PKKDTask: teacher: expected logits of shape {tuple(student_logits.shape)} as the student's, "
                f"got {tuple(teacher_logits.shape)}"
            )
        teacher_ce, student_ce = self.label_loss(teacher_logits, labels), self.label_loss(student_logits, labels)
        student_loss, terms = self.alpha * student_ce, {"student_ce": student_ce, "teacher_ce": teacher_ce}
        layers, outputs = {}, []
        if self.temperature is not None:
            terms["imitation"] = imitation_loss(student_logits, teacher_logits, self.temperature)
            student_loss = student_loss + terms["imitation"]
        if self.match is not None:
            outputs = self._outputs["student"].take()
            of_teacher = dict(zip(self._outputs["teacher"].names, self._outputs["teacher"].take(), strict=True))
            terms["l_mid"], layers = self.match(outputs, [of_teacher[name] for name in self._of_teacher])
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


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross entropy over the images of all processes; target: labels (N) or shares (N, classes).

    >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
    tensor(0.6931)
    """
    return global_mean(F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing), len(logits))


def imitation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Returns :math:`T^2\,KL(softmax(teacher / T) \| softmax(student / T))`, the mean over the batch.

    It is 0 where the networks agree, and its gradient is that of the cross entropy; none goes to the teacher.

    Args:
        student_logits, teacher_logits: (N, classes).
        temperature: T; the factor keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    >>> logits = torch.tensor([[9.0, 5.0]])
    >>> imitation_loss(torch.zeros(1, 2), logits), imitation_loss(logits, logits)
    (tensor(0.6031), tensor(0.))
    """
    scaled = teacher_logits.detach().float() / temperature
    target = scaled.softmax(1)
    entropy = cross_entropy(scaled, target)
    return temperature**2 * (cross_entropy(student_logits / temperature, target) - entropy)
