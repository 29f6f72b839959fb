"""The options of a distillation, as one object."""

from dataclasses import dataclass
from functools import partial

from adderops.distill.methods.matching import FEATURES
from adderops.distill.methods.task import distilling_methods
from adderops.distill.options import check, option

TEACHERS = ("progressive", "frozen", "none")

_option = partial(option, group="distillation (methods with a teacher)")
_WITH_TEACHER = {"method": distilling_methods, "teacher": ("progressive", "frozen")}


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a teacher teaches: the options of the command line under this heading, and what `PKKDTask` takes.

    The help of each field says what it is.

    Raises:
        ValueError: a value of another type or outside its range; the message names field, expected, got.

    >>> Distillation().beta
    0.1
    """

    teacher: str = _option(
        "progressive",
        "progressive: trained along with the student; frozen: keeps the weights of --teacher-checkpoint; none: no "
        "teacher, as method plain",
        choices=TEACHERS,
        needs={"method": distilling_methods},
    )
    teacher_arch: str | None = _option(
        None,
        "network of the teacher (default: --arch); where the two differ, layers are matched by relative depth",
        type=str,
        needs=_WITH_TEACHER,
    )
    teacher_checkpoint: str | None = _option(
        None,
        "weights of the teacher, the initial ones unless it is frozen: teacher.pt of a run, or a pretrained file of "
        "timm or torchvision",
        type=str,
        needs=_WITH_TEACHER,
    )
    features: str = _option(
        "kernel+1x1",
        "how inner layers are matched: through kernels, 1x1 convolutions, both or not at all",
        choices=FEATURES,
        needs=_WITH_TEACHER,
    )
    logits: bool = _option(True, "imitate the logits of the teacher", needs=_WITH_TEACHER)
    alpha: float = _option(
        1.0, "weight of the cross entropy with the labels in the student's loss", least=0, needs=_WITH_TEACHER
    )
    beta: float = _option(
        0.1,
        "weight of L_mid, the distillation loss of the inner layers, in the student's loss",
        least=0,
        needs=_WITH_TEACHER | {"features": FEATURES[1:]},
    )
    temperature: float = _option(
        4.0,
        "temperature of the softmax of both logits in the imitation",
        least=1e-3,
        most=1e6,
        needs=_WITH_TEACHER | {"logits": (True,)},
    )

    def __post_init__(self) -> None:
        check(self)
