"""The options of quantization."""

import operator
from dataclasses import dataclass
from numbers import Real

METHODS = ("redistribution", "shared")
ENDS = ("float", "int8")


@dataclass(frozen=True)
class Scheme:
    """How `calibrate` chooses the grids.

    Attributes:
        bits: of inputs and weights of the adder layers, 2 to 8; they are stored as uint8 whatever the bits.
        method: 'redistribution' clips the inputs at the `rank` of their magnitude and the weights to the range of the
            inputs, which is exact except for inputs beyond the rank; 'shared' takes the common range of inputs and
            weights, unclipped.
        rank: fraction of the inputs of a batch that the grid covers, by magnitude; the batch with the largest range
            counts.
        filter_groups: with redistribution, the number of k-means clusters of filters by max |w|, each with a grid no
            wider than its weights. Every group beyond the first needs its own copy of the input, and, if inputs
            exceed its grid, a convolution with one filter for what they lose.
        ends: the first convolution and the classifier, which multiply: 'float', or 'int8' with 8-bit inputs and 8-bit
            weights, one weight grid per filter; `convert` then makes all sums of the network exact.

    Raises:
        ValueError: a value of another type, or out of range.

    Source of redistribution, rank and filter groups: arXiv 2212.10200.

    >>> Scheme(bits=4).rank
    0.9997
    """

    bits: int = 8
    method: str = "redistribution"
    rank: float = 0.9997
    filter_groups: int = 1
    ends: str = "float"

    def __post_init__(self) -> None:
        for name, least, most in (("bits", 2, 8), ("filter_groups", 1, 256)):
            value = getattr(self, name)
            try:
                number = operator.index(value) if not isinstance(value, bool) else least - 1
            except TypeError:
                number = least - 1
            self._check(name, least <= number <= most, f"an integer from {least} to {most}")
            object.__setattr__(self, name, number)  # an int also if it came as NumPy's
        valid = isinstance(self.rank, Real) and not isinstance(self.rank, bool) and 0 < self.rank <= 1
        self._check("rank", valid, "a number above 0, at most 1")
        object.__setattr__(self, "rank", float(self.rank))
        for name, words in (("method", METHODS), ("ends", ENDS)):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and value in words, f"one of {', '.join(words)}")
        if self.method == "shared" and self.filter_groups > 1:
            raise ValueError(f"Scheme: filter_groups: expected 1 with method 'shared', got {self.filter_groups}")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"Scheme: {name}: expected {expected}, got {getattr(self, name)!r}")
