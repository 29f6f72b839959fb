"""PKKD training of adder networks (arXiv 2009.13044): `Distiller`, and `python -m adderops.distill`."""

from adderops.distill.config import Config, Options
from adderops.distill.data import Data, ImageSet, load_data
from adderops.distill.distiller import Distiller
from adderops.distill.interrupt import Interrupted
from adderops.distill.loop import Progress
from adderops.distill.methods import (
    METHODS,
    Distillation,
    FeatureMatch,
    LabelLoss,
    Losses,
    PKKDTask,
    SingleTask,
    Task,
    register_method,
)
from adderops.distill.recipes import RECIPES, Recipe
from adderops.distill.trainer import train

__all__ = [
    "METHODS",
    "RECIPES",
    "Config",
    "Data",
    "Distillation",
    "Distiller",
    "FeatureMatch",
    "ImageSet",
    "Interrupted",
    "LabelLoss",
    "Losses",
    "Options",
    "PKKDTask",
    "Progress",
    "Recipe",
    "SingleTask",
    "Task",
    "load_data",
    "main",
    "register_method",
    "train",
]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line `python -m adderops.distill`, from a program that registers its own methods and networks.

    Args:
        arguments: by default those of the program.

    Returns:
        The exit status: 0, 1 for an error, or 128 + the signal that stopped it.
    """
    from adderops.distill.__main__ import main as command_line  # -m executes that file, which nothing may import before

    return command_line(arguments)
