"""Layers for the kernels of adderops/edge/c: the structs of layers.h, packed weights, and what the operators return.

Packing is written here once more, from the comments of layers.h, without the exporter's: either can be wrong.
"""

import ctypes
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from cases import Case

from adderops import reference

BYTES, QUANTIZED, FLOATS, SUMS, INTEGERS = range(5)
NO_RESIDUAL, RESIDUAL_BYTES, RESIDUAL_FLOATS, SHORTCUT = range(4)
TAPS, ROWS_1, ROWS_2 = range(3)

_U8, _U16, _I32, _F32 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_int32, ctypes.c_float


class Output(ctypes.Structure):
    """struct output."""

    _fields_ = [
        *((name, _U8) for name in ("form", "residual", "relu", "zero_point", "least", "most", "shift")),
        ("bound", _I32),
        ("residual_scale", _F32),
        ("inverse", _F32),
        ("residual_m", _I32),
    ]


class Window(ctypes.Structure):
    """struct window."""

    _fields_ = [
        *(
            (name, _U16)
            for name in (
                *("height", "width", "channels", "out_height", "out_width", "filters", "kernel_height", "kernel_width"),
                *("stride_y", "stride_x", "dilation_y", "dilation_x", "top", "left"),
            )
        ),
        ("outside", _U8),
    ]


class SumPool(ctypes.Structure):
    """struct sum_pool."""

    _fields_ = [
        ("window", Window),
        *((name, _U8) for name in ("input", "form", "zero", "zero_point", "least", "most")),
        ("bound", _I32),
        *((name, _F32) for name in ("scale", "inverse", "factor")),
    ]


@cache
def structs(pointer: type) -> SimpleNamespace:
    """Returns the structs with pointers, for a machine whose pointers are of this type."""

    class AdderConv(ctypes.Structure):
        _fields_ = [
            ("weights", pointer),
            ("shortcut", pointer),
            ("window", Window),
            *((name, _U16) for name in ("groups", "words", "ring")),
            ("order", _U8),
            ("output", Output),
        ]

    class AdderDepthwise(ctypes.Structure):
        _fields_ = [("weights", pointer), ("window", Window), ("output", Output)]

    class MultiplyConv(ctypes.Structure):
        _fields_ = [("weights", pointer), ("window", Window), ("words", _U16), ("output", Output)]

    return SimpleNamespace(adder_conv=AdderConv, adder_depthwise=AdderDepthwise, multiply_conv=MultiplyConv)


@dataclass
class Rule:
    """The output rule of a layer; `residual` and `shortcut` are set by `add_residual` and `add_shortcut`."""

    form: int = BYTES
    relu: bool = False
    least: int = 0
    most: int = 255
    zero_point: int = 0
    inverse: float = 1.0
    bound: int = 2**20
    residual: int = NO_RESIDUAL
    residual_scale: float = 0.0

    @property
    def struct(self) -> Output:
        return Output(
            self.form,
            self.residual,
            self.relu,
            self.zero_point,
            self.least,
            self.most,
            0,
            self.bound,
            self.residual_scale,
            self.inverse,
        )

    @property
    def dtype(self) -> type:
        return {BYTES: np.uint8, QUANTIZED: np.uint8, FLOATS: np.float32, SUMS: np.int32}[self.form]


@dataclass
class Layer:
    """A layer of one image, with what it reads. x: (H, W, C) bytes; w: (C_out, C_in/groups, KH, KW); a, b: (C_out)."""

    kind: str  # of structs()
    case: Case
    x: np.ndarray
    w: np.ndarray
    a: np.ndarray
    b: np.ndarray
    rule: Rule = field(default_factory=Rule)
    order: int = TAPS
    outside: int = 0
    ring: bool = False
    residual: np.ndarray | None = None
    shortcut: "Layer | None" = None

    @property
    def y_shape(self) -> tuple[int, int, int]:
        _, filters, oh, ow = self.case.y_shape
        return oh, ow, filters

    @property
    def window(self) -> Window:
        c, (oh, ow, filters) = self.case, self.y_shape
        geometry = (c.KH, c.KW, *c.stride, *c.dilation, c.padding[0], c.padding[2])
        return Window(c.H, c.W, c.C_in, oh, ow, filters, *geometry, self.outside)

    # --- weights ---

    @property
    def words(self) -> int:
        """Words of one filter."""
        c = self.case
        if self.kind == "multiply_conv":
            return -(-c.C_in * c.KH * c.KW // 4) * 2
        words = c.KH * c.KW * -(-c.C_in // c.groups // 4)
        return words if self.order else -(-words // 4) * 4

    @property
    def constants(self) -> np.ndarray:
        """(C_out, 2) words."""
        return np.stack((self.a, self.b), 1).astype(np.float32).view(np.uint32)

    @property
    def packed(self) -> np.ndarray:
        return {"adder_conv": self._pairs, "adder_depthwise": self._quads, "multiply_conv": self._products}[self.kind]()

    def _pairs(self) -> np.ndarray:
        c = self.case
        parts = []
        for w, constants in zip(np.split(self.w, c.groups), np.split(self.constants, c.groups), strict=True):
            w = w.transpose(0, 2, 3, 1)  # (filters, KH, KW, channels)
            w = np.pad(w, ((0, len(w) % 2), (0, 0), (0, 0), (0, -w.shape[3] % 4)))
            words = np.ascontiguousarray(w).view(np.uint32)
            if self.order:
                words = words.swapaxes(2, 3)
            words = words.reshape(len(w), -1)
            words = np.pad(words, ((0, 0), (0, self.words - words.shape[1])))
            constants = np.pad(constants, ((0, len(constants) % 2), (0, 0)))
            for f in range(0, len(w), 2):
                parts += [words[f : f + 2].T.ravel(), constants[f : f + 2].ravel()]
        return np.concatenate(parts)

    def _quads(self) -> np.ndarray:
        w = np.pad(self.w[:, 0], ((0, -len(self.w) % 4), (0, 0), (0, 0)))
        constants = np.pad(self.constants, ((0, -len(self.w) % 4), (0, 0)))
        parts = []
        for c in range(0, len(w), 4):
            parts += [
                np.ascontiguousarray(w[c : c + 4].reshape(4, -1).T).view(np.uint32).ravel(),
                constants[c : c + 4].ravel(),
            ]
        return np.concatenate(parts)

    def _products(self) -> np.ndarray:
        w = self.w.transpose(0, 2, 3, 1).reshape(len(self.w), -1).astype(np.int16)
        w = np.pad(w, ((0, len(w) % 2), (0, 2 * self.words - w.shape[1])))
        words, constants = w.view(np.uint32), np.pad(self.constants, ((0, len(self.w) % 2), (0, 0)))
        parts = []
        for f in range(0, len(w), 2):
            sums = -self.outside * w[f : f + 2].astype(np.int32).sum(1)
            parts += [words[f : f + 2].T.ravel(), sums.astype(np.int32).view(np.uint32), constants[f : f + 2].ravel()]
        return np.concatenate(parts)

    # --- memory ---

    @property
    def scratch(self) -> int:
        """Bytes of scratch by the rules of layers.h."""
        c, (oh, ow, _) = self.case, self.y_shape
        if self.kind == "adder_depthwise":
            rows = (oh - 1) * c.stride[0] + (c.KH - 1) * c.dilation[0] + 1
            return 4 + 4 * rows * ((ow - 1) * c.stride[1] + (c.KW - 1) * c.dilation[1] + 1)
        if self.kind == "adder_conv" and self.order:
            size = {ROWS_1: 24, ROWS_2: 36}[self.order] * c.KH * (c.C_in // c.groups // 4)
        else:
            size = 16 * self.words
        if self.shortcut is not None:
            size += 16 * self.shortcut.words
        return size + -(-self.ring_rows * c.W * c.C_in // 4) * 4

    @property
    def ring_rows(self) -> int:
        return (self.case.KH - 1) * self.case.dilation[0] + 1 if self.ring else 0

    @property
    def may_overlap(self) -> bool:
        """Whether y may start where x starts."""
        c, (oh, ow, filters) = self.case, self.y_shape
        size, rows = np.dtype(self.rule.dtype).itemsize, (c.KH - 1) * c.dilation[0] + 1
        return self.rule.form != SUMS and all(
            (oy + 1) * ow * filters * size <= c.W * c.C_in * min(c.H, oy * c.stride[0] - c.padding[0] + rows)
            for oy in range(oh)
        )

    def struct(self, pointer: type, weights: int, shortcut: int = 0) -> ctypes.Structure:
        kind = getattr(structs(pointer), self.kind)
        if self.kind == "adder_conv":
            return kind(
                weights,
                shortcut,
                self.window,
                self.case.groups,
                self.words,
                self.ring_rows,
                self.order,
                self.rule.struct,
            )
        if self.kind == "multiply_conv":
            return kind(weights, self.window, self.words, self.rule.struct)
        return kind(weights, self.window, self.rule.struct)

    # --- what it should return ---

    def z(self) -> torch.Tensor:
        """b + a * sum, without the residual: (1, C_out, OH, OW)."""
        x = torch.from_numpy(self.x).permute(2, 0, 1)[None]
        c, a, b = self.case, torch.from_numpy(self.a), torch.from_numpy(self.b)
        if self.kind != "multiply_conv":
            geometry = (c.stride, c.padding, c.dilation, c.groups)
            return reference.adder_conv2d_int8(
                x, torch.from_numpy(self.w), -a, b, None, 1.0, False, False, 0, 255, self.outside, *geometry
            )
        top, bottom, left, right = c.padding
        padded = torch.nn.functional.pad(x.double() - self.outside, (left, right, top, bottom))
        sums = torch.nn.functional.conv2d(padded, torch.from_numpy(self.w).double(), None, c.stride, 0, c.dilation)
        return sums.float() * a[:, None, None] + b[:, None, None]

    def expected(self) -> np.ndarray:
        """(OH, OW, C_out), or (C_out) for sums."""
        z, rule = self.z(), self.rule
        scale = torch.tensor(rule.residual_scale, dtype=torch.float32)
        if self.shortcut is not None:
            z = z + scale * self.shortcut.z()
        elif self.residual is not None:
            z = z + scale * torch.from_numpy(self.residual).permute(2, 0, 1)[None].float()
        inverse = torch.tensor(rule.inverse, dtype=torch.float32)
        if rule.form == BYTES:
            y = z.round().clamp(rule.least, rule.most)
        elif rule.form == QUANTIZED:
            y = ((z * inverse).round() + rule.zero_point).clamp(rule.least, rule.most)
        elif rule.form == FLOATS:
            y = z.clamp(min=0) if rule.relu else z
        else:
            u = (z * inverse).round().clamp(0 if rule.relu else -rule.bound, rule.bound)
            return u.to(torch.int64).sum((0, 2, 3)).numpy().astype(np.int32)
        return y[0].permute(1, 2, 0).contiguous().numpy().astype(rule.dtype)


def random_bytes(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def layer_of(c: Case, kind: str = "adder_conv", seed: int = 0, **options: object) -> Layer:
    """Returns a layer with random bytes, whose outputs cover the range of a byte and exceed it slightly."""
    rng = np.random.default_rng(seed)
    x = random_bytes(seed + 1, (c.H, c.W, c.C_in))
    K = c.terms["forward"]
    scale = ((1 + rng.random(c.C_out)) * 4 / K**0.5).astype(np.float32)
    if kind == "multiply_conv":
        w = rng.integers(-128, 128, c.w_shape, dtype=np.int8)
        a, b = scale / 64, rng.normal(120, 9, c.C_out).astype(np.float32)
    else:
        w = random_bytes(seed + 2, c.w_shape)
        a, b = -scale, (scale * 85 * K + 120).astype(np.float32)
    return Layer(kind, c, x, w, a, b, outside=int(rng.integers(256)), **options)


def add_residual(layer: Layer, floats: bool = False) -> Layer:
    """Adds a residual of bytes or floats."""
    layer.residual = random_bytes(99, layer.y_shape)
    layer.rule.residual, layer.rule.residual_scale = RESIDUAL_BYTES, 0.3
    if floats:
        layer.residual = layer.residual.astype(np.float32) / 8 - 20
        layer.rule.residual, layer.rule.residual_scale = RESIDUAL_FLOATS, 1.7
    return layer


def add_shortcut(layer: Layer, channels: int, stride: int) -> Layer:
    """Adds a 1x1 shortcut from another input."""
    oh, ow, filters = layer.y_shape
    c = Case("shortcut", 1, channels, (oh - 1) * stride + 1, (ow - 1) * stride + 1, filters, 1, 1, (stride, stride))
    layer.shortcut = layer_of(c, seed=77)
    layer.shortcut.b -= np.float32(120)
    layer.rule.residual, layer.rule.residual_scale = SHORTCUT, 0.37
    return layer
