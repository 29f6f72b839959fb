"""PKKD training of adder networks (arXiv 2009.13044): `Distiller`, and `python -m adderops.distill`."""

from adderops.distill.config import Config
from adderops.distill.data import Data, ImageSet, load_data
from adderops.distill.distiller import Distiller
from adderops.distill.interrupt import Interrupted
from adderops.distill.loop import Progress
from adderops.distill.matching import FeatureMatch
from adderops.distill.recipes import RECIPES, Recipe
from adderops.distill.task import LabelLoss, Losses, PKKDTask, SingleTask
from adderops.distill.trainer import train

__all__ = [
    "RECIPES",
    "Config",
    "Data",
    "Distiller",
    "FeatureMatch",
    "ImageSet",
    "Interrupted",
    "LabelLoss",
    "Losses",
    "PKKDTask",
    "Progress",
    "Recipe",
    "SingleTask",
    "load_data",
    "train",
]
