"""How a network is quantized."""

from dataclasses import dataclass

METHODS = ("redistribution", "shared")
ENDS = ("float", "int8")


@dataclass(frozen=True)
class Scheme:
    """What `calibrate` decides the grids by.

    Attributes:
        bits: of inputs and weights of the adder layers, 2 to 8; they are computed in bytes whatever the bits.
        method: 'redistribution' clips the inputs at the `rank` of their magnitude, and to that range the weights, which
            loses nothing but beyond the rank; 'shared' takes the range of inputs and weights together, unclipped.
        rank: share of the inputs of a batch that the grid covers; the largest of all batches counts.
        filter_groups: redistribution: k-means clusters of filters by max |w|, each with a grid of its own no wider than
            its weights.  More than one costs an input of its own for each.
        ends: the first convolution and the classifier, which multiply: 'float', or 'int8' with 8-bit inputs and, filter
            by filter, 8-bit weights.

    Raises:
        ValueError: a value out of range.

    Source of redistribution, rank and filter groups: arXiv 2212.10200.
    """

    bits: int = 8
    method: str = "redistribution"
    rank: float = 0.9997
    filter_groups: int = 1
    ends: str = "float"

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("bits", self.bits in range(2, 9), "an integer from 2 to 8"),
            ("method", self.method in METHODS, f"one of {', '.join(METHODS)}"),
            ("rank", 0 < self.rank <= 1, "a number above 0, at most 1"),
            ("filter_groups", self.filter_groups in range(1, 257), "an integer from 1 to 256"),
            ("ends", self.ends in ENDS, f"one of {', '.join(ENDS)}"),
        ):
            if not valid:
                raise ValueError(f"Scheme: {name}: expected {expected}, got {getattr(self, name)!r}")
        if self.method == "shared" and self.filter_groups > 1:
            raise ValueError(f"Scheme: filter_groups: expected 1 with method 'shared', got {self.filter_groups}")
