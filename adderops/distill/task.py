"""What is trained: a task holds the networks and turns a batch into losses; the trainer knows no more of the method."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adderops.distill.losses import adder_branch, conv_branch, imitation_loss, kernel_width, mid_loss


@dataclass
class Losses:
    """What a task makes of a batch.

    Attributes:
        total: sum of the losses of all networks in training; call `backward` on it.
        terms: what to log, one number each.
        logits: (N, classes) of each network by its role, 'teacher' or 'student'.
        outputs: raw outputs of the matched layers of each network by its role, where the task matches them.
    """

    total: Tensor
    terms: dict[str, Tensor]
    logits: dict[str, Tensor]
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


class SingleTask(nn.Module):
    """One network alone, trained on the labels by cross entropy.

    Args:
        network: gives logits.
        role: its name in logs and checkpoints: 'student' for an adder network, 'teacher' for a CNN.
    """

    def __init__(self, network: nn.Module, role: str) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({role: network})

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        [(role, network)] = self.networks.items()
        logits = network(images)
        ce = F.cross_entropy(logits, labels)
        return Losses(ce, {f"{role}_ce": ce}, {role: logits})

    def diagnose(self, losses: Losses) -> dict[str, float]:
        """Returns nothing: there is no distillation to watch."""
        return {}


class PKKDTask(nn.Module):
    r"""Progressive kernel based knowledge distillation: a CNN and an adder network trained together.

    .. math:: L_{student} = \beta L_{mid} + L_{blend},  \quad L_{teacher} = CE(teacher, labels)

    .. math:: L_{blend} = \alpha\,CE(student, labels) + CE(student, softmax(teacher))

    The teacher's logits and layer outputs enter the student's losses detached, so the two losses share no parameter and
    `total` = L_student + L_teacher gives each network its own gradient.  One backward pass and one optimizer step are
    one step of each network, the student's against the teacher as it was before the step.

    The side branches are here and not in the networks: `networks['student']` is what gets deployed.

    Args:
        teacher, student: networks of the same architecture: `network(images, intermediates=True)` gives logits and the
            raw outputs of `network.matched_layers()`.
        alpha: weight of the labels in L_blend.
        beta: weight of L_mid.

    Raises:
        ValueError: the networks do not match layer by layer.

    Source: PKKD, arXiv 2009.13044, Algorithm 1.

    >>> from adderops.models import lenet5
    >>> task = PKKDTask(teacher=lenet5("cnn"), student=lenet5("adder"))
    >>> losses = task(torch.randn(8, 1, 32, 32), torch.arange(8))
    >>> losses.total.backward()
    >>> sorted(losses.terms)
    ['l_blend', 'l_mid', 'student_ce', 'student_loss', 'teacher_ce']
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, alpha: float = 1.0, beta: float = 0.1) -> None:
        super().__init__()
        channels = [layer.out_channels for layer in student.matched_layers()]
        of_teacher = [layer.out_channels for layer in teacher.matched_layers()]
        if channels != of_teacher:
            raise ValueError(f"PKKDTask: teacher: expected matched layers of {channels} channels, got {of_teacher}")
        self.networks = nn.ModuleDict({"teacher": teacher, "student": student})
        self.student_branches = nn.ModuleList(map(adder_branch, channels))
        self.teacher_branches = nn.ModuleList(map(conv_branch, channels))
        self.alpha = alpha
        self.beta = beta

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        """Returns the losses of a batch: images (N, C, H, W), labels (N) int64."""
        teacher_logits, teacher_outputs = self.networks["teacher"](images, intermediates=True)
        student_logits, student_outputs = self.networks["student"](images, intermediates=True)
        teacher_ce = F.cross_entropy(teacher_logits, labels)

        teacher_outputs = [output.detach() for output in teacher_outputs]
        l_mid = mid_loss(
            [branch(output) for branch, output in zip(self.student_branches, student_outputs, strict=True)],
            [branch(output) for branch, output in zip(self.teacher_branches, teacher_outputs, strict=True)],
        )
        student_ce = F.cross_entropy(student_logits, labels)
        l_blend = self.alpha * student_ce + imitation_loss(student_logits, teacher_logits)
        student_loss = self.beta * l_mid + l_blend
        return Losses(
            total=student_loss + teacher_ce,
            terms={
                "student_loss": student_loss,
                "l_mid": l_mid,
                "l_blend": l_blend,
                "student_ce": student_ce,
                "teacher_ce": teacher_ce,
            },
            logits={"teacher": teacher_logits, "student": student_logits},
            outputs={"teacher": teacher_outputs, "student": student_outputs},
        )

    def diagnose(self, losses: Losses) -> dict[str, float]:
        r"""Returns the signs of a collapse, which a falling L_mid alone does not show; call it before `backward`.

        Over the layers: the largest :math:`|\beta\,dL_{mid}/dY| / |dL_{blend}/dY|` (L_mid must not drown the labels),
        the smallest variance of y_c before its BatchNorm (0: the teacher's features have become constant), and the
        extremes of both kernel widths.  Costs two backward passes of the student.
        """
        outputs = losses.outputs["student"]

        def gradient_norms(loss: Tensor) -> Tensor:
            return torch.stack([g.norm() for g in torch.autograd.grad(loss, outputs, retain_graph=True)])

        ratios = self.beta * gradient_norms(losses.terms["l_mid"]) / gradient_norms(losses.terms["l_blend"])
        with torch.no_grad():
            pairs = list(zip(self.teacher_branches, losses.outputs["teacher"], strict=True))
            variances = [branch.transform(output).var(dim=(0, 2, 3)).mean() for branch, output in pairs]
            widths_c = [kernel_width(output, branch.factor) for branch, output in pairs]
            widths_a = [kernel_width(y, b.factor) for b, y in zip(self.student_branches, outputs, strict=True)]
        return {
            "mid_gradient_ratio_max": ratios.max().item(),
            "var_yc_min": torch.stack(variances).min().item(),
            "width_a_min": torch.stack(widths_a).min().item(),
            "width_a_max": torch.stack(widths_a).max().item(),
            "width_c_min": torch.stack(widths_c).min().item(),
            "width_c_max": torch.stack(widths_c).max().item(),
        }
