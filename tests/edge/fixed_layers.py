"""Layers for the kernels with the fixed-point epilogue, and what adderops.reference returns for them."""

from dataclasses import dataclass

import numpy as np
import torch
from cases import Case

from adderops import reference

from .kernel_layers import (
    BYTES,
    FLOATS,
    INTEGERS,
    NO_RESIDUAL,
    SHORTCUT,
    SUMS,
    Layer,
    Output,
    Rule,
    add_shortcut,
    layer_of,
    random_bytes,
)

LEAST, MOST = -(2**31), 2**31 - 1


@dataclass
class FixedRule(Rule):
    """The output rule with integers."""

    shift: int = 0
    residual_m: int = 0

    @property
    def struct(self) -> Output:
        output = super().struct
        output.shift, output.residual_m = self.shift, self.residual_m
        return output

    @property
    def dtype(self) -> type:
        return np.int32 if self.form == INTEGERS else super().dtype

    @property
    def limits(self) -> tuple[int, int]:
        """Least and most v."""
        if self.form == BYTES:
            return self.least, self.most
        bound = self.bound if self.form == SUMS else MOST
        return 0 if self.relu else -bound - (self.form == INTEGERS), bound


RULES = {
    "bytes": FixedRule(BYTES),
    "bytes clamped": FixedRule(BYTES, least=11, most=195),
    "bytes shifted": FixedRule(BYTES, shift=3),
    "integers": FixedRule(INTEGERS),
    "integers relu": FixedRule(INTEGERS, relu=True, shift=1),
    "sums": FixedRule(SUMS, bound=90),
    "sums relu": FixedRule(SUMS, relu=True, bound=200),
    "floats": FixedRule(FLOATS),
}


@dataclass
class FixedLayer(Layer):
    """A layer whose constants are c, m of a and b."""

    @property
    def fixed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """c and m of the kernels: multiples of 2^shift, divided by it."""
        scale = 2.0**-self.rule.shift
        a, b = torch.from_numpy(self.a).double() * scale, torch.from_numpy(self.b).double() * scale
        c, m, _ = reference.fixed_point_constants(a, b, 0.0)
        return c, m

    @property
    def constants(self) -> np.ndarray:
        if self.rule.form == FLOATS:
            return np.pad(super().constants, ((0, 0), (0, 2)))
        c, m = self.fixed
        words = torch.stack([c, c >> 32, m, torch.zeros_like(m)], 1).numpy() & 0xFFFFFFFF
        return words.astype(np.uint32)

    def sums(self) -> torch.Tensor:
        """(1, C_out, OH, OW), integers."""
        one = Layer(self.kind, self.case, self.x, self.w, np.ones_like(self.a), np.zeros_like(self.b))
        one.outside = self.outside
        return one.z().long()

    def expected(self) -> np.ndarray:
        if self.rule.form == FLOATS:
            return super().expected()
        shift, (c, m) = self.rule.shift, self.fixed
        residual = None if self.residual is None else torch.from_numpy(self.residual).permute(2, 0, 1)[None]
        beside = None
        if self.shortcut is not None:
            other_c, other_m = self.shortcut.fixed
            beside = (other_c[:, None, None] + other_m[:, None, None] * self.shortcut.sums()) << shift
        u = reference.fixed_point_epilogue(
            self.sums(), c << shift, m << shift, residual, self.rule.residual_m << shift, beside, *self.rule.limits
        )
        if self.rule.form == SUMS:
            return u.long().sum((0, 2, 3)).numpy().astype(np.int32)
        return u[0].permute(1, 2, 0).contiguous().numpy().astype(self.rule.dtype)


def fixed_layer(c: Case, kind: str, name: str, seed: int = 0, **options: object) -> FixedLayer:
    """Returns `layer_of`, with the rule of that name."""
    layer = layer_of(c, kind, seed, **options)
    layer.a = np.clip(layer.a, -0.49, 0.49)  # m within 32 bits without a shift
    if kind != "multiply_conv":
        layer.b = -layer.a * np.float32(85 * c.terms["forward"]) + np.float32(120)
    return FixedLayer(**vars(layer) | {"rule": FixedRule(**vars(RULES[name]))})


def with_residual(layer: FixedLayer, kind: int, stride: int = 1) -> FixedLayer:
    """Adds bytes or a shortcut from another input, or nothing."""
    if kind == NO_RESIDUAL or layer.rule.form == FLOATS:
        return layer
    layer.rule.residual = kind
    if kind == SHORTCUT:
        other = vars(add_shortcut(layer, 8, stride).shortcut)
        layer.shortcut = FixedLayer(**other | {"rule": FixedRule(shift=layer.rule.shift)})
        layer.shortcut.a = np.clip(layer.shortcut.a, -0.4, 0.4)
    else:
        layer.residual, layer.rule.residual_m = random_bytes(99, layer.y_shape), (1 << 27) + 12345
    return layer
