"""The kernels compiled for another processor and run in the emulator, between guards."""

import ctypes
from pathlib import Path

import numpy as np

from .emulation import compiled, cortex_m
from .host_kernels import source
from .kernel_layers import SUMS, Layer

KINDS = ("adder_conv", "adder_depthwise", "multiply_conv")


def machine(
    folder: Path, core: str = "cortex-m4", options: tuple[str, ...] = ("-O2", "-std=c99"), compiler: str | None = None
):
    """Returns a machine with all kernels."""
    names = [f"run_{kind}" for kind in KINDS]
    text = source().replace('#include "layers.h"', "")
    return compiled(text, folder, names, core, compiler, (*options, "-Wall", "-Wextra", "-Werror", "-pedantic"))


def run(emulated: cortex_m.Machine, layer: Layer, count: bool = False) -> tuple[np.ndarray, cortex_m.Run]:
    """Runs a layer; the machine checks that it wrote nothing but its output and its scratch."""
    fresh = cortex_m.Machine(emulated.program) if isinstance(emulated, cortex_m.Machine) else emulated
    pointer = ctypes.c_uint64 if cortex_m.CORES[fresh.program.core].a64 else ctypes.c_uint32
    shortcut = 0
    if layer.shortcut is not None:
        weights = fresh.place(layer.shortcut.packed, name="weights of the shortcut")
        shortcut = fresh.place(bytes(layer.shortcut.struct(pointer, weights)), name="shortcut")
    struct = layer.struct(pointer, fresh.place(layer.packed, name="weights"), shortcut)
    shape = layer.y_shape[2:] if layer.rule.form == SUMS else layer.y_shape
    size = int(np.prod(shape)) * np.dtype(layer.rule.dtype).itemsize
    x = fresh.reserve(max(layer.x.size, size) if layer.ring else layer.x.size, name="x")
    fresh.write(x, layer.x)
    y = x if layer.ring else fresh.reserve(size, name="y")
    residual = layer.shortcut.x if layer.shortcut is not None else layer.residual
    r = 0 if residual is None else fresh.place(residual, name="residual")
    arguments = (fresh.place(bytes(struct), name="layer"), x, y, r, fresh.reserve(layer.scratch, name="scratch"))
    done = fresh.call(f"run_{layer.kind}", *arguments, count=count)
    return fresh.array(y, shape, layer.rule.dtype), done
