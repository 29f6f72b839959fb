"""The kernels as a shared library of this machine's compiler, called through ctypes between guards."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .kernel_layers import SUMS, Layer

KERNELS = Path(__file__).parents[2] / "adderops" / "edge" / "c"
FRAGMENTS = (
    *(
        "layers.h",
        "prelude.c",
        "finish_float.c",
        "gather.c",
        "sums_*.c",
        "adder_conv.c",
        "adder_depthwise.c",
        "multiply_conv.c",
    ),
    *("max_pool.c", "sum_pool.c", "elements.c", "lookup.c"),
)
C_TARGET = "-DADDER_TARGET=0"
GUARD = 64
# AddressSanitizer's functions, in a process that has it: guards must not be read either
poison = unpoison = None

_EXPORTS = """
void run_adder_conv(const struct adder_conv *l, const uint8_t *x, void *y, const void *r, void *s) {
  adder_conv(l, x, y, r, s);
}
void run_adder_depthwise(const struct adder_depthwise *l, const uint8_t *x, void *y, const void *r, void *s) {
  adder_depthwise(l, x, y, r, s);
}
void run_multiply_conv(const struct multiply_conv *l, const uint8_t *x, void *y, const void *r, void *s) {
  multiply_conv(l, x, y, r, s);
}
void run_max_pool(const struct window *w, const uint8_t *x, uint8_t *y) { max_pool(w, x, y); }
void run_sum_pool(const struct sum_pool *l, const void *x, void *y) { sum_pool(l, x, y); }
void run_quantize(const float *x, uint8_t *y, int32_t n, float inverse, int zero, int least, int most) {
  quantize(x, y, n, inverse, zero, least, most);
}
void run_dequantize(const uint8_t *x, float *y, int32_t n, float scale, int zero) { dequantize(x, y, n, scale, zero); }
void run_add_floats(const float *a, const float *b, float *y, int32_t n) { add_floats(a, b, y, n); }
void run_relu_floats(const float *x, float *y, int32_t n) { relu_floats(x, y, n); }
void run_lookup(const uint8_t *x, uint8_t *y, int32_t n, const uint8_t *t, int c) { lookup(x, y, n, t, c); }
"""


def source(finish: str = "finish_float.c") -> str:
    """Returns all kernels as one C file with an exported function for each."""
    names = [finish if name == "finish_float.c" else name for name in FRAGMENTS]
    files = [path for name in names for path in sorted(KERNELS.glob(name))]
    head = f"#define ADDER_EPILOGUE_INTEGER {int(finish == 'finish_integer.c')}\n"
    return head + "".join(path.read_text() for path in files) + _EXPORTS


def built(folder: Path, compiler: str, flags: str, finish: str = "finish_float.c") -> Path:
    """Compiles the kernels with every warning an error, to a shared library."""
    found = shutil.which(compiler)
    if found is None:
        pytest.skip(f"needs {compiler}")
    stem = f"{compiler}{abs(hash((flags, finish)))}"
    path = folder / f"{stem}.c"
    path.write_text(source(finish))
    strict = "-Wall -Wextra -Werror -pedantic -shared -fPIC"
    command = [found, *flags.split(), *strict.split(), str(path), "-o", str(folder / f"{stem}.so")]
    subprocess.run(command, check=True, timeout=120)
    return folder / f"{stem}.so"


@cache
def library(
    folder: Path, compiler: str = "gcc", flags: str = f"-std=c99 -O2 {C_TARGET}", finish: str = "finish_float.c"
) -> ctypes.CDLL:
    """Loads `built` kernels."""
    return ctypes.CDLL(str(built(folder, compiler, flags, finish)))


def guarded(size: int, value: int = 0xA5, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns memory, and `size` bytes between its guards that start `shift` bytes after a multiple of 16."""
    memory = np.full(size + 2 * GUARD + 32, value, np.uint8)
    begin = GUARD + -(memory.ctypes.data + GUARD) % 16 + shift
    if poison:
        poison(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(begin))
        end = begin + size
        poison(ctypes.c_void_p(memory.ctypes.data + end), ctypes.c_size_t(memory.size - end))
    return memory, memory[begin : begin + size]


def unharmed(memory: np.ndarray, inside: np.ndarray, value: int = 0xA5) -> bool:
    begin = inside.ctypes.data - memory.ctypes.data
    if unpoison:
        unpoison(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.size))
    return bool((memory[:begin] == value).all() and (memory[begin + inside.size :] == value).all())


def run(kernels: ctypes.CDLL, layer: Layer) -> np.ndarray:
    """Runs a layer; checks that it wrote nothing but its output and its scratch."""
    pointer = ctypes.c_void_p
    keep = [layer.packed]
    shortcut = None
    if layer.shortcut is not None:
        keep.append(layer.shortcut.packed)
        shortcut = layer.shortcut.struct(pointer, keep[-1].ctypes.data)
    struct = layer.struct(pointer, keep[0].ctypes.data, ctypes.addressof(shortcut) if shortcut else 0)
    shape = layer.y_shape[2:] if layer.rule.form == SUMS else layer.y_shape
    size = int(np.prod(shape)) * np.dtype(layer.rule.dtype).itemsize
    x_memory, x = guarded(max(layer.x.size, size) if layer.ring else layer.x.size)
    y_memory, y = (x_memory, x[:size]) if layer.ring else guarded(size)
    scratch_memory, scratch = guarded(layer.scratch)
    x[: layer.x.size] = layer.x.ravel()
    residual = layer.shortcut.x if layer.shortcut is not None else layer.residual
    residual_memory, r = guarded(0 if residual is None else residual.nbytes)
    if residual is not None:
        r[:] = residual.view(np.uint8).ravel()
    function = getattr(kernels, f"run_{layer.kind}")
    function(ctypes.byref(struct), *(pointer(memory.ctypes.data) for memory in (x, y, r, scratch)))
    for memory, inside in (
        (x_memory, x),
        (y_memory, x if layer.ring else y),
        (scratch_memory, scratch),
        (residual_memory, r),
    ):
        assert unharmed(memory, inside), f"{layer.kind} of {layer.case!r} wrote beyond its memory"
    if not layer.ring:
        assert (x == layer.x.ravel()).all(), "x was changed"
    return y.copy().view(layer.rule.dtype).reshape(shape)
