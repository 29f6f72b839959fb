"""Adder convolution for PyTorch: -sum|x - w| in place of sum x*w (AdderNet, arXiv 1912.13200)."""

import signal
import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and "adderops.distill" in sys.orig_argv and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # the command line is still importing, with nothing to save: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from adderops import functional, nn, optim, reference
from adderops.batchnorm import reestimate_batchnorm
from adderops.nn import AdderConv2d, AdderLinear, convert

__all__ = ["AdderConv2d", "AdderLinear", "convert", "functional", "nn", "optim", "reestimate_batchnorm", "reference"]
