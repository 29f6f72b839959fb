"""Adder convolution for PyTorch: -sum|x - w| in place of sum x*w (AdderNet, arXiv 1912.13200)."""

__version__ = "0.1.0"

from adderops import functional, nn, optim, reference
from adderops.batchnorm import reestimate_batchnorm
from adderops.nn import AdderConv2d, AdderLinear, convert

__all__ = ["AdderConv2d", "AdderLinear", "convert", "functional", "nn", "optim", "reestimate_batchnorm", "reference"]
