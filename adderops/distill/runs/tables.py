"""Tables of results, as text and as HTML, and the one way in which they write numbers."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

KINDS = {"cnn": "CNN", "adder": "adder network"}  # what tables call a network by its kind alone


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows with equal keys under a header: words left-aligned, numbers right-aligned.

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


def html_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns rows with equal keys under a header as an HTML table; names and cells are escaped.

    >>> print(html_table([{"layer": "conv<1>", "weights": "150"}]))
    <table>
    <tr><th>layer</th><th>weights</th></tr>
    <tr><td>conv&lt;1&gt;</td><td>150</td></tr>
    </table>
    """

    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [line("th", list(rows[0])), *(line("td", list(row.values())) for row in rows)]
    return "\n".join(["<table>", *lines, "</table>"])


def shown(value: Any) -> str:
    """Returns the value of an option as a cell.

    >>> [shown(value) for value in (None, 0.1, 256, "crop")]
    ['-', '0.1', '256', 'crop']
    """
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def percent(share: float | None, error: float | None = None, signed: bool = False) -> str:
    """Returns a share in percent with two decimals, and its uncertainty if it has one.

    >>> percent(0.975), percent(0.0233, signed=True), percent(0.975, error=0.0066), percent(None)
    ('97.50', '+2.33', '97.50 +- 0.66', '-')
    """
    if share is None:
        return "-"
    return f"{100 * share:{'+' if signed else ''}.2f}" + ("" if error is None else f" +- {100 * error:.2f}")


def outcome(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cells that every table of runs has, from a row of `RunFolder.results`; accuracies are in percent."""
    return {
        "last": percent(row["test_accuracy"]),
        "best": percent(row["best_test_accuracy"]),
        "best_epoch": str(row["best_epoch"]),
        "training": percent(row["train_accuracy"]),
        "images/s": f"{row['images_per_second']:.0f}",
        "hours": f"{row['hours']:.3g}",
    }
