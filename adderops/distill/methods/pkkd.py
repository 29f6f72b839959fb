"""PKKD (arXiv 2009.13044): an adder network taught by a CNN, through logits and inner layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adderops.distill.distributed import global_mean
from adderops.distill.methods.distillation import Distillation
from adderops.distill.methods.matching import FeatureMatch, layer_pairs, pair_channels
from adderops.distill.methods.task import LabelLoss, Losses, Task, register_method
from adderops.distill.networks import build_networks, load_weights
from adderops.models import IntermediateOutputs

if TYPE_CHECKING:
    from adderops.distill.config import Config
    from adderops.distill.data import Data

DEFAULT = Distillation()


@register_method("pkkd")
class PKKDTask(Task):
    r"""The adder network with a CNN as its teacher, which is trained along with it or frozen.

    .. math:: L_{student} = \beta L_{mid} + \alpha\,CE(student, labels)
              + T^2\,KL(softmax(teacher / T) \| softmax(student / T)), \quad L_{teacher} = CE(teacher, labels)

    The paper has a cross entropy where KL stands: the same gradient, and a value that differs by the teacher's entropy.

    The teacher's logits and layer outputs enter the student's losses detached, so the two losses share no parameter and
    `total` = L_student + L_teacher gives each network its own gradient.  One backward pass and one optimizer step are
    one step of each network, the student's against the teacher as it was before the step.

    The matching is part of the task, not of the networks: `networks['student']` is what gets deployed.

    Args:
        teacher, student: networks that give logits of the same classes.
        distillation: weights and temperature of the losses, features to match, frozen teacher; its `teacher_arch` and
            `teacher_checkpoint` are for `build`.
        layers: the layers to match, see `layer_pairs`; by default all between the first convolution and the classifier.
        label_loss: of logits and labels, for both networks; the plain cross entropy by default.

    Attributes:
        match: computes L_mid; None where no features are matched.

    Raises:
        ValueError: layers that cannot be matched or, in `forward`, logits of different numbers of classes.

    Source: PKKD, arXiv 2009.13044, Algorithm 1 (which has T = 1).

    >>> from adderops.models import lenet5
    >>> task = PKKDTask(lenet5("cnn"), lenet5("adder"), Distillation(beta=0.5))
    >>> losses = task(torch.randn(8, 1, 32, 32), torch.arange(8))
    >>> losses.total.backward()
    >>> sorted(losses.terms)
    ['imitation', 'l_mid', 'student_ce', 'student_loss', 'teacher_ce']
    """

    roles = {"teacher": "cnn", "student": "adder"}
    label = "adder, by PKKD"
    distills = True
    without_teacher = "plain"
    extremes = {"gradient_ratio": max, "var_yc": min}

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        distillation: Distillation = DEFAULT,
        layers: Mapping[str, str] | Iterable[str] | None = None,
        label_loss: LabelLoss | None = None,
    ) -> None:
        super().__init__({"teacher": teacher, "student": student}, label_loss)
        self.distillation = distillation
        self.frozen = distillation.teacher == "frozen"
        self.match: FeatureMatch | None = None
        self._of_teacher: list[str] = []
        self._outputs: dict[str, IntermediateOutputs] = {}
        if distillation.features != "none":
            pairs = layer_pairs(student, teacher, layers)
            self.match = FeatureMatch(pair_channels(student, teacher, pairs), distillation.features)
            self.layer_names, self._of_teacher = list(pairs), list(pairs.values())
            self._keep_outputs(False)
        if self.frozen:
            teacher.requires_grad_(False)
        self.train()

    @classmethod
    def build(cls, config: Config, data: Data, device: torch.device) -> PKKDTask:
        networks = build_networks(config, cls, data, device)
        distillation = config.distillation or Distillation()
        if distillation.teacher_checkpoint is not None:
            frozen = distillation.teacher == "frozen"
            load_weights(networks["teacher"], Path(distillation.teacher_checkpoint), any_classifier=not frozen)
        torch.manual_seed(config.seed)  # of the maps between layers of different widths
        task = cls(networks["teacher"], networks["student"], distillation, label_loss=LabelLoss.build(config, data))
        return task.to(device)

    def release(self) -> None:
        """Takes the hooks off the networks, to copy, export or pickle them; the next forward puts them on again."""
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

    def train(self, mode: bool = True) -> PKKDTask:
        super().train(mode)
        if self.frozen:
            self.networks["teacher"].eval()
        return self

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        options = self.distillation
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
        student_loss, terms = options.alpha * student_ce, {"student_ce": student_ce, "teacher_ce": teacher_ce}
        layers: dict[str, Tensor] = {}
        outputs: list[Tensor] = []
        if options.logits:
            terms["imitation"] = imitation_loss(student_logits, teacher_logits, options.temperature)
            student_loss = student_loss + terms["imitation"]
        if self.match is not None:
            outputs = self._outputs["student"].take()
            of_teacher = dict(zip(self._outputs["teacher"].names, self._outputs["teacher"].take(), strict=True))
            terms["l_mid"], layers = self.match(outputs, [of_teacher[name] for name in self._of_teacher])
            student_loss = student_loss + options.beta * terms["l_mid"]
        return Losses(
            total=student_loss if self.frozen else student_loss + teacher_ce,
            terms={"student_loss": student_loss, **terms},
            logits={"teacher": teacher_logits, "student": student_logits},
            layers=layers,
            outputs=outputs,
        )

    def diagnose(self, losses: Losses) -> dict[str, Tensor]:
        r"""Returns what shows a collapse, of each matched layer; call it before `backward`.

        A falling L_mid alone does not: it may fall because features become constant (`var_yc`, the variance of y_c
        before its BatchNorm) or because it drowns the other losses (`gradient_ratio`,
        :math:`|\beta\,dL_{mid}/dY| / |d(L_{student} - \beta L_{mid})/dY|`).  Costs two backward passes of the student.
        """
        if self.match is None:
            return {}
        mid = self.distillation.beta * losses.terms["l_mid"]

        def gradient_norms(loss: Tensor) -> Tensor:
            return torch.stack([g.norm() for g in torch.autograd.grad(loss, losses.outputs, retain_graph=True)])

        ratio = gradient_norms(mid) / gradient_norms(losses.terms["student_loss"] - mid).clamp(min=1e-30)
        return {**losses.layers, "gradient_ratio": ratio}


def imitation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Returns :math:`T^2\,KL(softmax(teacher / T) \| softmax(student / T))`, the mean over the batch.

    It is 0 where the networks agree, and its gradient is the gradient of the cross entropy; the teacher gets none.

    Args:
        student_logits, teacher_logits: (N, classes).
        temperature: T; the factor keeps the size of the gradient (Hinton et al., arXiv 1503.02531).

    >>> logits = torch.tensor([[9.0, 5.0]])
    >>> imitation_loss(torch.zeros(1, 2), logits), imitation_loss(logits, logits)
    (tensor(0.6031), tensor(0.))
    """
    student, teacher = (logits.float() / temperature for logits in (student_logits, teacher_logits.detach()))
    difference = teacher.log_softmax(1) - student.log_softmax(1)
    divergence = (teacher.softmax(1) * difference).sum() * (temperature**2 / len(student))
    return global_mean(divergence, len(student))
