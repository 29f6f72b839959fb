"""Adder convolution for PyTorch: -sum|x - w| in place of sum x*w."""

__version__ = "0.1.0"

from adderops import _ops  # noqa: F401
