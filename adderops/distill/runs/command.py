"""What the commands on run folders share: options that several of them have, and where they write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adderops.distill import config
from adderops.distill.methods import METHODS
from adderops.distill.options import check, flag, kind_of, option


class CommandOptions:
    """Base of a command's dataclass of options; checks them as the options of training are checked."""

    def __post_init__(self) -> None:
        check(self, label=lambda name: name if name in ("folder", "folders") else flag(name))


def run_folder(help: str = "run folder", **metadata: Any) -> Any:
    """Declares the positional option RUN."""
    return option(help=help, type=Path, metavar="RUN", positional=True, **metadata)


def weights_option(help: str, kinds: Sequence[str] = ("adder", "cnn")) -> Any:
    """Declares --weights, the name of a saved network of one of these kinds."""

    def names() -> tuple[str, ...]:
        roles = dict.fromkeys(role for task in METHODS.values() for role, kind in task.roles.items() if kind in kinds)
        averaged = [name for role in sorted(roles) for name in (role, f"{role}_ema")]
        return (*averaged, *(f"{name}_best" for name in averaged))

    return option(None, help, choices=names, type=str)


def of_training(name: str, help: str) -> Any:
    """Declares an option that replaces the run's own: the option of training, with its type and range."""
    declared = config.Options.__dataclass_fields__[name]
    return option(None, **{**declared.metadata, "type": kind_of(declared), "help": help})


def output_file(output: Path | None, default: Path) -> Path:
    """Returns the file to write; checks its folder first, so that no work is lost because the folder is missing.

    Raises:
        FileNotFoundError: the file that the user names is not in an existing folder.
    """
    if output is None:
        default.parent.mkdir(exist_ok=True)
        return default
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output: expected a file in an existing folder, got {output}")
    return output
