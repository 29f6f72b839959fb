"""Counts the multiplications and additions of a network per image, and estimates their energy.

The convention is AdderNet's (arXiv 1912.13200): a multiply-accumulate is one multiplication and one addition, a term
|x - w| of an adder layer is two additions (the subtraction and the accumulation).  Convolutions and matrix products
count, inside layers or not; biases, BatchNorm, activations, pooling and residual sums do not.

By this convention the paper's ResNet-32 (69.12 M of each as a CNN) is the stem, the 3x3 layers, the two 1x1 shortcuts
and the classifier.  Its ResNet-20 is not: the paper has 41.17 M (81.89 M additions as an adder network), and the same
layers take 40.81 M (81.18 M).  The two networks differ by twelve layers of 2.36 M, so no other choice of layers gives
both numbers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adderops import _ops

_ADDERS = (_ops.adder_conv2d.overloadpacket, _ops.adder_conv2d_int8.overloadpacket)

# pJ per (multiplication, addition), 45 nm, 0.9 V: M. Horowitz, "Computing's energy problem (and what we can
# do about it)", ISSCC 2014, figure 1.1.9, doi:10.1109/ISSCC.2014.6757323
_PICOJOULES = {"float32": (3.7, 0.9), "float16": (1.1, 0.4), "int32": (3.1, 0.1), "int8": (0.2, 0.03)}


class LayerOperations(NamedTuple):
    """Operations of one layer.

    Attributes:
        name: of the layer in the model.
        layer: its type.
        multiplications, additions: per image.

    >>> LayerOperations("conv1", "Conv2d", multiplications=100, additions=100).additions
    100
    """

    name: str
    layer: str
    multiplications: int
    additions: int


@dataclass(frozen=True)
class Operations:
    """Operations per image of a model; `str()` is a table.

    Attributes:
        layers: one row per layer, in the order of the model.

    >>> layer = LayerOperations("conv", "Conv2d", 100, 100)
    >>> counted = Operations((layer, LayerOperations("add", "AdderLinear", 0, 50)))
    >>> counted.multiplications, counted.additions
    (100, 150)
    """

    layers: tuple[LayerOperations, ...]

    @property
    def multiplications(self) -> int:
        """Total of all layers."""
        return sum(layer.multiplications for layer in self.layers)

    @property
    def additions(self) -> int:
        """Total of all layers."""
        return sum(layer.additions for layer in self.layers)

    def __str__(self) -> str:
        rows = [*self.layers, LayerOperations("total", "", self.multiplications, self.additions)]
        cells = [("name", "layer", "multiplications", "additions")]
        cells += [(row.name, row.layer, f"{row.multiplications:,}", f"{row.additions:,}") for row in rows]
        name, layer, multiplications, additions = (max(map(len, column)) for column in zip(*cells, strict=True))
        return "\n".join(f"{a:<{name}}  {b:<{layer}}  {c:>{multiplications}}  {d:>{additions}}" for a, b, c, d in cells)


def count_operations(model: nn.Module, example: Tensor | Sequence[int]) -> Operations:
    """Counts the multiplications and additions of a model per image.

    A layer of C_out filters with K weights each (K = C_in/groups·KH·KW, or in_features) and P output pixels takes

        C_out·P·K multiplications and as many additions   (Conv2d, Linear, any other convolution or matrix product)
        0 multiplications and 2·C_out·P·K additions       (AdderConv2d, AdderLinear)

    No values are computed: a copy of the model in evaluation mode runs on the meta device.

    Args:
        model: a model with one input; it is left unchanged.
        example: the input (N, ...), or its shape, for an input of the model's dtype. N and the values do not matter.

    Returns:
        One row per innermost layer with operations, summed over all its calls. A last row 'elsewhere', if needed, has
        the products outside of these layers (attention, for example).

    Raises:
        TypeError: example is neither a tensor nor a sequence of integers.
        ValueError: example has no dimension after N, or an empty one.

    Source: AdderNet, arXiv 1912.13200, section 4 (the counting); `torch.utils.flop_counter` (the products).

    >>> from adderops import AdderConv2d
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), AdderConv2d(8, 4, 3))
    >>> print(count_operations(model, (1, 3, 8, 8)))
    name   layer        multiplications  additions
    0      Conv2d                 7,776      7,776
    3      AdderConv2d                0      9,216
    total                         7,776     16,992
    """
    batch = _one_image(model, example)
    replica = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        replica(batch)

    flops, root = counter.get_flop_counts(), type(model).__name__
    layers = []
    for name, module in replica.named_modules(remove_duplicate=False):  # the counter knows one name per module
        key = f"{root}.{name}" if name else root
        if key in flops and not any(module.children()):
            layers.append(LayerOperations(name or root, type(module).__name__, *_split(flops[key])))
    counted = Operations(tuple(layers))
    multiplications, additions = _split(flops.get("Global", {}))
    if additions == counted.additions:
        return counted
    missing = multiplications - counted.multiplications, additions - counted.additions
    return Operations((*layers, LayerOperations("elsewhere", "", *missing)))


def _one_image(model: nn.Module, example: Tensor | Sequence[int]) -> Tensor:
    """Returns an input of batch size 1 on the meta device."""
    if isinstance(example, Tensor):
        shape, dtype = tuple(example.shape), example.dtype
    elif isinstance(example, Sequence) and all(isinstance(size, int) for size in example):
        shape = tuple(example)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    else:
        raise TypeError(f"count_operations: example: expected a tensor or the shape of one, got {example!r}")
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"count_operations: example: expected (N, ...) without zeros, got shape {tuple(shape)}")
    return torch.empty((1, *shape[1:]), dtype=dtype, device="meta")


def _split(flops: Mapping[Any, int]) -> tuple[int, int]:
    """Returns (multiplications, additions), given the floating-point operations per operator."""
    of_adders = sum(flops.get(adder, 0) for adder in _ADDERS)
    of_products = sum(flops.values()) - of_adders
    return of_products // 2, of_products // 2 + of_adders


def energy(operations: Operations, precision: str = "float32") -> float:
    """Returns the energy of the arithmetic for one image, in pJ.

    It is multiplications · e_mul + additions · e_add, with the energies of 45 nm circuits of one precision.
    Memory accesses, which often cost more, are not included.

    Args:
        operations: what `count_operations` returned.
        precision: 'float32', 'float16', 'int32' or 'int8'.

    Raises:
        ValueError: another precision.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9.

    >>> energy(Operations((LayerOperations("conv", "Conv2d", multiplications=1000, additions=1000),)))
    4600.0
    """
    if precision not in _PICOJOULES:
        raise ValueError(f"energy: precision: expected one of {', '.join(map(repr, _PICOJOULES))}, got {precision!r}")
    multiplication, addition = _PICOJOULES[precision]
    return operations.multiplications * multiplication + operations.additions * addition
