"""PKKD training of adder networks (arXiv 2009.13044); `python -m adderops.distill --help` is its command line."""

from adderops.distill.config import Config
from adderops.distill.data import Data, ImageSet, load_data
from adderops.distill.interrupt import Interrupted
from adderops.distill.matching import FeatureMatch
from adderops.distill.recipes import RECIPES, Recipe
from adderops.distill.task import Losses, PKKDTask, SingleTask
from adderops.distill.trainer import train

__all__ = [
    "RECIPES",
    "Config",
    "Data",
    "FeatureMatch",
    "ImageSet",
    "Interrupted",
    "Losses",
    "PKKDTask",
    "Recipe",
    "SingleTask",
    "load_data",
    "train",
]
