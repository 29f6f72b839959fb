"""Tables for a terminal."""

from collections.abc import Mapping, Sequence


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows of equal keys under a header: words to the left, numbers to the right.

    >>> print(text_table([{"network": "CNN", "images/s": "900"}, {"network": "adder", "images/s": "1200"}]))
    network  images/s
    CNN           900
    adder        1200
    """
    lines = [{name: name for name in rows[0]}, *rows]
    columns = []
    for name in rows[0]:
        cells = [line[name] for line in lines]
        numeric = all(cell[:1].isdigit() or cell[:1] in "+-" for cell in cells[1:])
        width = max(map(len, cells))
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
