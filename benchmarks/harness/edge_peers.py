"""What the adder is compared with on a Cortex-M: an int8 convolution of the same care, and CMSIS-NN's counts.

The convolution (int8_conv.c, int8_conv.S) is emulated and counted in the same run; its bytes are checked first.
"""

import functools
import struct
from pathlib import Path

import numpy as np

from .cortex_m import Machine, Program, Toolchain
from .edge_layers import EdgeLayer

HERE = Path(__file__).resolve().parent

# CMSIS-NN main 99f736a (2026-07-15): instructions and cycles a term on Cortex-M4, counted 2026-11-29 by emulation, the
# best of seven builds (gcc 12.2 -O2, -O3, -Ofast; clang 14), and modelled with the rules of cortex_m_cycles.py.
# arm_convolve_s8, arm_convolve_1x1_s8(_fast), arm_depthwise_conv_s8_opt; all outputs were equal to numpy's.
CMSIS_NN = {
    "16-16.3x3@32": (2.16, 2.73),
    "16-32.3x3s2@32": (1.93, 2.42),
    "32-32.3x3@16": (1.73, 2.14),
    "32-64.3x3s2@16": (1.64, 2.03),
    "64-64.3x3@8": (1.56, 1.91),
    "16-32.1x1s2@32": (4.08, 5.17),
    "32-64.1x1s2@16": (3.11, 3.99),
    "64-64.1x1@12": (2.02, 2.42),
    "128-128.1x1@6": (1.80, 2.16),
    "64-64.1x1@25x5": (2.03, 2.44),
    "dw.64.3x3@12": (7.88, 9.41),
    "dw.64.3x3@25x5": (7.79, 9.36),
}
CMSIS_NN_RESNET8 = (34.1e6, 35.9e6)  # cycles, the whole network of MLPerf Tiny: 2.73 to 2.87 a multiply-accumulate

KINDS = ("conv_float", "conv_fixed", "conv_narrow_float", "conv_narrow_fixed")


class WrongResult(RuntimeError):
    """A contestant computes something else: its counts would mean nothing."""


@functools.cache
def program(tools: Toolchain, core: str) -> Program:
    """The convolutions, compiled."""
    sources = [HERE / "int8_conv.c", HERE / "int8_conv.S"]
    return tools.compile(core, sources, KINDS, ("-O2", "-std=gnu99", "-fno-strict-aliasing"))


def convolution(layer: EdgeLayer, kind: str, tools: Toolchain, core: str = "cortex-m4") -> dict:
    """Instructions, cycles, scratch and weight bytes of one layer; WrongResult if a byte differs."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (layer.height, layer.width, layer.c_in), dtype=np.uint8)
    w = rng.integers(-127, 128, (layer.c_out, layer.kernel, layer.kernel, layer.c_in), dtype=np.int8)
    zero, scale = 117, (rng.random(layer.c_out) + 1) * 0.5 / (4096 * layer.terms_of_filter**0.5) * 64
    offset = rng.normal(120, 20, layer.c_out)
    narrow, fixed = "narrow" in kind, kind.endswith("fixed")
    oh, ow = layer.out
    rows = not narrow and layer.kernel == 3 and ow % 4 == 0
    words, packed = _pack(w, zero, scale, offset, narrow, fixed, rows)
    pixels = 2 if narrow else 4
    scratch = 4 * pixels * words + pixels * layer.c_out
    if rows:
        scratch = 4 * (6 if layer.stride == 1 else 9) * 3 * layer.c_in // 2
    machine = Machine(program(tools, core))
    at = [machine.place(x, name="x"), machine.reserve(oh * ow * layer.c_out, name="y")]
    at.append(machine.reserve(scratch, name="scratch"))
    sizes = (layer.height, layer.width, layer.c_in, oh, ow, layer.c_out, layer.kernel, layer.stride, layer.padding)
    fields = struct.pack("<12I", *sizes, zero, words, machine.place(packed, name="weights"))
    run = machine.call(kind, machine.place(fields), *at, alignment=False)
    y = machine.array(at[1], (oh, ow, layer.c_out))
    if not np.array_equal(y, _expected(layer, x, w, zero, scale, offset, fixed)):
        raise WrongResult(f"{layer.name} {kind}: wrong result")
    return {
        "instructions": run.instructions,
        "cycles": run.cycles,
        "scratch_bytes": scratch,
        "weight_bytes": packed.nbytes,
        "code_bytes": sum(f.size for f in (machine.program.elf.functions[n] for n in run.functions)),
    }


def _fixed_point(scale: np.ndarray, offset: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.rint(scale * 2**32).astype(np.int64), np.rint(offset * 2**32).astype(np.int64) + 2**31


def _pack(w, zero, scale, offset, narrow, fixed, rows) -> tuple[int, np.ndarray]:
    """Words of a filter as x has them (pairs of terms), and the stream of int8_conv.S."""
    filters = len(w)
    quads = w.reshape(*w.shape[:3], -1, 4)
    if narrow:
        words = quads.reshape(filters, -1).view(np.uint32)
        words = np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))
        count = 2 * words.shape[1]
    else:
        pairs = quads.astype(np.int16)[..., [0, 2, 1, 3]]  # terms 0 and 2, 1 and 3
        words = np.ascontiguousarray(pairs).view(np.uint32).reshape(*w.shape[:3], -1)
        if rows:
            words = words.swapaxes(2, 3)  # ky, word, kx
        words = words.reshape(filters, -1)
        words = np.pad(words, ((0, 0), (0, -words.shape[1] % 4)))
        count = words.shape[1]
    start = (-zero * w.reshape(filters, -1).astype(np.int64).sum(1)).astype(np.int32).view(np.uint32)
    if fixed:
        m, c = _fixed_point(scale, offset)
        constants = np.stack([c & 0xFFFFFFFF, c >> 32 & 0xFFFFFFFF, m & 0xFFFFFFFF], 1).astype(np.uint32)
    else:
        constants = np.stack([scale, offset], 1).astype(np.float32).view(np.uint32)
    parts = []
    for f in range(0, filters, 2):
        parts += [start[f : f + 2], words[f : f + 2].T.ravel(), constants[f : f + 2].ravel()]
    return count, np.concatenate(parts)


def _expected(layer, x, w, zero, scale, offset, fixed) -> np.ndarray:
    p, k, s = layer.padding, layer.kernel, layer.stride
    padded = np.pad(x.astype(np.int64) - zero, ((p, p), (p, p), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (0, 1))[::s, ::s]  # OH, OW, C, KH, KW
    sums = np.einsum("yxcij,fijc->yxf", windows.astype(np.float64), w.astype(np.float64)).astype(np.int64)
    if fixed:
        m, c = _fixed_point(scale, offset)
        return np.clip((c + m * sums) >> 32, 0, 255).astype(np.uint8)
    z = sums.astype(np.float32) * scale.astype(np.float32) + offset.astype(np.float32)
    return np.clip(np.rint(z), 0, 255).astype(np.uint8)
