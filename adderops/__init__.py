"""Adder convolution for PyTorch: -sum|x - w| instead of sum x*w (AdderNet, arXiv 1912.13200)."""

import importlib
import signal
import sys
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"] and "adderops.distill" in sys.orig_argv and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # the command line is still importing and has nothing to save: Ctrl-C ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from adderops import functional, nn, optim, reference
from adderops.batchnorm import reestimate_batchnorm
from adderops.nn import AdderConv2d, AdderLinear, convert

# Imported on first use: they are slow to import, or need packages that `pip install adderops` does not install.
_LAZY = ("distill", "edge", "export", "info", "models", "operations", "quant", "spiking")
if TYPE_CHECKING:
    from adderops import distill as distill
    from adderops import edge as edge
    from adderops import export as export
    from adderops import info as info
    from adderops import models as models
    from adderops import operations as operations
    from adderops import quant as quant
    from adderops import spiking as spiking

__all__ = ["AdderConv2d", "AdderLinear", "convert", "functional", "nn", "optim", "reestimate_batchnorm", "reference"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
