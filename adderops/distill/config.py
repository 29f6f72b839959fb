"""The configuration of a run: one dataclass, from which the command line, its help and config.json follow."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from adderops.models import ARCHITECTURES

METHODS = ("compare", "pkkd", "plain", "cnn")


def _option(default, help: str, **metadata):
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class Config:
    """All that decides a run's result, and the number of threads.

    The help of each field says what it is; a None is replaced by `resolve()`.

    Raises:
        ValueError: a value outside its range; the message names field, expected, got.

    >>> Config().resolve().epochs
    20
    """

    data: str = _option(
        "digits", "digits (embedded), fashion-mnist (Debian's package dataset-fashion-mnist), or a folder of idx files"
    )
    arch: str = _option("lenet5", "network of teacher and student", choices=tuple(ARCHITECTURES))
    method: str = _option(
        "compare",
        "pkkd: CNN teacher and adder student together; plain: the adder network alone; cnn: the CNN alone; "
        "compare: pkkd, then plain, and a table",
        choices=METHODS,
    )
    epochs: int | None = _option(
        None, "passes over the training images (default: 20 for digits, else 50)", type=int, least=1
    )
    batch_size: int | None = _option(None, "images a step (default: 64 for digits, else 256)", type=int, least=2)
    lr: float = _option(0.1, "learning rate of the first epoch, falling to 0 as a cosine, set once an epoch", least=0)
    weight_decay: float = _option(5e-4, "weight decay of all parameters", least=0)
    nesterov: bool | None = _option(None, "Nesterov momentum (default: yes for lenet5, no for resnet20)", type=bool)
    alpha: float = _option(1.0, "pkkd: weight of the labels' cross entropy in the student's loss", least=0)
    beta: float = _option(0.1, "pkkd: weight of L_mid, the match of inner features, in the student's loss", least=0)
    seed: int = _option(
        0, "decides initial weights and the order of images; the same for every method", least=0, most=2**32 - 1
    )
    threads: int | None = _option(None, "CPU threads (default: what torch chooses here)", type=int, least=1)

    def __post_init__(self) -> None:
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value not in choices:
                raise ValueError(f"{f.name}: expected one of {', '.join(choices)}, got {value!r}")
            least, most = f.metadata.get("least"), f.metadata.get("most", sys.float_info.max)
            if least is not None and value is not None and not least <= value <= most:
                upper = f" and at most {most}" if "most" in f.metadata else ""
                raise ValueError(f"{f.name}: expected a finite number of at least {least}{upper}, got {value}")

    def resolve(self) -> "Config":
        """Returns the same configuration with no None left and a folder of data as an absolute path."""
        chosen = {
            "epochs": 20 if self.data == "digits" else 50,
            "batch_size": 64 if self.data == "digits" else 256,
            "nesterov": self.arch == "lenet5",
            "threads": torch.get_num_threads(),
        }
        missing = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        known = self.data in ("digits", "fashion-mnist")
        return replace(self, data=self.data if known else str(Path(self.data).resolve()), **missing)

    def command(self) -> str:
        """Returns the command that starts this run anew."""
        words = ["python", "-m", "adderops.distill"]
        for name, value in asdict(self).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return shlex.join(words)

    @classmethod
    def load(cls, path: Path) -> "Config":
        """Reads config.json; raises ValueError where it is not one of ours."""
        try:
            return cls(**json.loads(path.read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: expected a configuration as this program writes it ({error})") from error
