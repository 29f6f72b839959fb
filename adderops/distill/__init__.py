"""PKKD training of adder networks (arXiv 2009.13044): `Distiller`, and the command line, `main`."""

from adderops.distill.command_line import main
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
