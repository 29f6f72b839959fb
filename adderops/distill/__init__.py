"""PKKD training of adder networks (arXiv 2009.13044); `python -m adderops.distill --help` is its command line."""

from adderops.distill.config import Config
from adderops.distill.data import Dataset, load_dataset
from adderops.distill.task import Losses, PKKDTask, SingleTask
from adderops.distill.trainer import train

__all__ = ["Config", "Dataset", "Losses", "PKKDTask", "SingleTask", "load_dataset", "train"]
