"""Runs all kernels under AddressSanitizer, with guards that must not be read either. Prints the number of layers.

LD_PRELOAD=$(gcc -print-file-name=libasan.so) PYTHONPATH=tests python -m edge.sanitized_kernels kernels.so float32
"""

import ctypes
import sys

import numpy as np

from . import host_kernels
from .fixed_layers import RULES as FIXED_RULES
from .fixed_layers import fixed_layer, with_residual
from .kernel_layers import (
    BYTES,
    NO_RESIDUAL,
    RESIDUAL_BYTES,
    SHORTCUT,
    Layer,
    SumPool,
    add_residual,
    layer_of,
)
from .test_elements import POOL_BYTES, POOLS, one, some_floats, window_of
from .test_kernels import BYTE_CASES, RULES, depthwise_cases, one_image, orders, rule
from .vector_targets import layers

POINTER = ctypes.c_void_p


def float_layers() -> list[Layer]:
    found = layers()
    for i, c in enumerate(depthwise_cases()):
        found.append(layer_of(c, "adder_depthwise", i, rule=rule(list(RULES)[i % len(RULES)])))
        found.append(add_residual(layer_of(c, "adder_depthwise", i), floats=i % 2 == 1))
    for i, c in enumerate(c for c in map(one_image, BYTE_CASES) if c.groups == 1):
        found.append(layer_of(c, "multiply_conv", i, rule=rule(list(RULES)[i % len(RULES)])))
    return found


def fixed_layers() -> list[Layer]:
    found: list[Layer] = []
    for i, name in enumerate(FIXED_RULES):
        for k, c in enumerate(map(one_image, BYTE_CASES[i % 2 :: 2])):
            kind = (NO_RESIDUAL, RESIDUAL_BYTES, SHORTCUT if c.groups == 1 else NO_RESIDUAL)[k % 3]
            for order in orders(c):
                found.append(with_residual(fixed_layer(c, "adder_conv", name, k, order=order), kind))
            if c.groups == 1 and k % 4 == 0:
                found.append(fixed_layer(c, "multiply_conv", name, k))
        for c in depthwise_cases()[i % 3 :: 3]:
            found.append(fixed_layer(c, "adder_depthwise", name))
    return found


class Blocks:
    """Memory between guards."""

    def __init__(self) -> None:
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def place(self, content: np.ndarray, shift: int = 0) -> ctypes.c_void_p:
        """Returns the address of a copy, `shift` bytes off a word."""
        self.pairs.append(host_kernels.guarded(content.nbytes, shift=shift))
        self.pairs[-1][1][:] = content.view(np.uint8).ravel()
        return POINTER(self.pairs[-1][1].ctypes.data)

    def check(self) -> None:
        assert all(host_kernels.unharmed(*pair) for pair in self.pairs)


def run_elements(kernels: ctypes.CDLL) -> None:
    """Conversions, tables and pools, at small and odd sizes."""
    blocks = Blocks()
    place = blocks.place
    for n in (1, 3, 8, 17):
        for shift in range(4):
            x, y = place(np.full(n, 255, np.uint8), shift), place(np.zeros(n, np.uint8), (shift + 1) % 4)
            z = place(some_floats(n))
            kernels.run_lookup(x, y, n, place(np.arange(256, dtype=np.uint8)), 1)
            kernels.run_quantize(z, y, n, ctypes.c_float(0.7), 3, 0, 255)
            kernels.run_dequantize(x, z, n, ctypes.c_float(0.1), 3)
        a, b = place(some_floats(n)), place(some_floats(n, 1))
        kernels.run_add_floats(a, b, a, n)
        kernels.run_relu_floats(a, b, n)
    for c in map(one, POOLS):
        window = window_of(c)
        x, y = place(np.ones(c.H * c.W * c.C_in, np.uint8)), place(np.ones(int(np.prod(c.y_shape[1:])), np.uint8))
        kernels.run_max_pool(ctypes.byref(window), x, y)
        pool = SumPool(window, POOL_BYTES, BYTES, 9, 7, 0, 255, 2000, 0.1, 9.0, 0.01)
        kernels.run_sum_pool(ctypes.byref(pool), x, y)
    blocks.check()


def main(path: str, epilogue: str) -> None:
    process = ctypes.CDLL(None)
    host_kernels.poison = process.__asan_poison_memory_region
    host_kernels.unpoison = process.__asan_unpoison_memory_region
    kernels = ctypes.CDLL(path)
    found = float_layers() if epilogue == "float32" else fixed_layers()
    for layer in found:
        expected = layer.expected()
        got = host_kernels.run(kernels, layer)
        assert (got == expected).all(), f"{layer.kind} of {layer.case!r}, {layer.rule}"
    run_elements(kernels)
    print(len(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
