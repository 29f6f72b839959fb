"""What a generated network needs: flash, memory, terms; as a table."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One layer.

    Attributes:
        name: of the layer in the original network; '' if it has none.
        operation: in words.
        output: height, width, channels and dtype.
        terms: |x - w| or products for one image.
        weights: bytes of flash, with the constants of its epilogue.
        live: bytes of the arena in use while it is computed.
        cycles: modelled, on the report's target; None without one.
    """

    name: str
    operation: str
    output: str
    terms: int
    weights: int
    live: int
    cycles: int | None = None


@dataclass(frozen=True)
class Report:
    """Sizes of a generated network, in bytes.

    `str()` of it is a table of the layers and the sums.

    Attributes:
        name: of the network in C.
        files: what was written.
        epilogue: 'float32' or 'integer'.
        rows: the layers, in the order of computation.
        constants: flash for weights, epilogues and the table of image bytes, without code.
        arena: memory that the caller provides, for activations and scratch.
        bound: the most bytes that live at once; no order of the buffers needs fewer.
        input, output: of the caller, too: bytes in, floats out.
        target: processor of the modelled cycles; None without.
    """

    name: str
    files: tuple[str, ...]
    epilogue: str
    rows: Sequence[Row]
    constants: int
    arena: int
    bound: int
    input: int
    output: int
    target: str | None = None

    @property
    def cycles(self) -> int | None:
        """Modelled cycles for one image (`adderops.edge.cost`); None without a target."""
        return None if self.target is None else sum(row.cycles or 0 for row in self.rows)

    @property
    def terms(self) -> int:
        """|x - w| and products for one image."""
        return sum(row.terms for row in self.rows)

    def __str__(self) -> str:
        heading = ["layer", "operation", "output", "terms", "weights", "arena", "cycles"]
        numbers = [(row.terms, row.weights, row.live, row.cycles) for row in self.rows]
        numbers.append((self.terms, sum(row.weights for row in self.rows), self.arena, self.cycles))
        words = [[row.name or "-", row.operation, row.output] for row in self.rows] + [["total", "", ""]]
        table = [heading, *([*w, *map(_number, n)] for w, n in zip(words, numbers, strict=True))]
        table = [row[: 6 if self.target is None else 7] for row in table]
        widths = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
        lines = []
        for row in table:
            cells = [c.ljust(w) if k < 3 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
            lines.append("  ".join(cells).rstrip())
        lines += [
            "",
            f"flash: {self.constants} bytes of weights and constants, beside the code",
            f"memory: {self.arena} bytes of arena, at least {self.bound} of them live at once; "
            f"{self.input} of input, {self.output} of output",
        ]
        return "\n".join(lines + ([] if self.target is None else [f"cycles: modelled, {self.target}"]))


def _number(value: int | None) -> str:
    return f"{value:,}".replace(",", " ") if value else ""
