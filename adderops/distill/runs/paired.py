"""Statistics of runs that are repeated with several seeds: means of groups, differences of groups in pairs of a seed.

Runs of one seed share initial weights and order of images, so the difference in pairs varies less than the means do.
Rows are plain dicts, as `RunFolder.results` gives them or csv.DictReader.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns mean and standard deviation (with n - 1); the latter is None for one value.

    Raises:
        ValueError: no value.

    >>> mean_and_deviation([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    if not values:
        raise ValueError("values: expected at least one, got none")
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def group_rows(rows: Sequence[Row], by: Sequence[str]) -> dict[tuple[Any, ...], list[Row]]:
    """Returns the rows of each combination of values in the columns `by`, in order of first appearance.

    >>> group_rows([{"method": "pkkd", "seed": 0}, {"method": "pkkd", "seed": 1}], by=["method"]).keys()
    dict_keys([('pkkd',)])
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(_value(row, column) for column in by), []).append(row)
    return groups


def paired_difference(
    rows: Sequence[Row], reference: Sequence[Row], value: str, pair: str = "seed", level: float = 0.95
) -> dict[str, Any]:
    r"""Returns mean and confidence interval of the difference rows - reference, over the seeds that both have.

    .. math:: \bar d \pm t_{(1 + level) / 2,\,n - 1}\; s_d / \sqrt n

    with Student's t: it holds for differences that are normally distributed about their mean.

    Args:
        rows, reference: at most one row a seed each.
        value: column to compare.
        pair: column whose equal values make a pair.
        level: of confidence, between 0 and 1.

    Returns:
        pairs (n), difference (mean), difference_deviation (s_d), low, high; difference is None without a pair, the
        rest is None with fewer than two.

    Raises:
        ValueError: a seed occurs twice, a column is missing, or level is out of range.
        ModuleNotFoundError: scipy is not installed.

    >>> ours = [{"seed": s, "accuracy": a} for s, a in enumerate((0.91, 0.93, 0.92))]
    >>> theirs = [{"seed": s, "accuracy": a} for s, a in enumerate((0.90, 0.91, 0.89))]
    >>> found = paired_difference(ours, theirs, "accuracy")
    >>> print(f"{found['difference']:.3f} in {found['low']:.3f} to {found['high']:.3f}, {found['pairs']} pairs")
    0.020 in -0.005 to 0.045, 3 pairs
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    own, other = _by_pair(rows, value, pair), _by_pair(reference, value, pair)
    differences = [own[key] - other[key] for key in own if key in other]
    found = dict.fromkeys(("difference", "difference_deviation", "low", "high")) | {"pairs": len(differences)}
    if differences:
        found["difference"], found["difference_deviation"] = mean_and_deviation(differences)
    if len(differences) > 1:
        half = _student_t((1 + level) / 2, len(differences) - 1)
        half *= found["difference_deviation"] / len(differences) ** 0.5
        found |= {"low": found["difference"] - half, "high": found["difference"] + half}
    return found


def compare_groups(
    rows: Sequence[Row], by: Sequence[str], value: str, pair: str = "seed", level: float = 0.95
) -> list[dict[str, Any]]:
    """Returns a row for each group: its values of `by`, n, mean, deviation, and its difference to the first group.

    Args:
        rows: at least one.
        by: columns whose equal values make a group.
        value, pair, level: as in `paired_difference`, whose keys are in each row, too; for the first group, which has
            nothing to be compared with, they are None and `pairs` is 0.

    Raises:
        ValueError, ModuleNotFoundError: as `paired_difference`.

    >>> rows = [{"method": m, "seed": s, "accuracy": a} for m, s, a in
    ...         (("plain", 0, 0.5), ("plain", 1, 0.75), ("pkkd", 0, 0.75), ("pkkd", 2, 1.0))]
    >>> for group in compare_groups(rows, ["method"], "accuracy"):
    ...     print(group["method"], group["n"], group["mean"], group["pairs"], group["difference"])
    plain 2 0.625 0 None
    pkkd 2 0.875 1 0.25
    """
    groups = group_rows(rows, by)
    first = next(iter(groups.values()), [])
    compared = []
    for key, members in groups.items():
        mean, deviation = mean_and_deviation(list(_by_pair(members, value, pair).values()))
        difference = paired_difference(members, [] if members is first else first, value, pair, level)
        compared.append({**dict(zip(by, key, strict=True)), "n": len(members), "mean": mean, "deviation": deviation})
        compared[-1] |= difference
    return compared


def _by_pair(rows: Sequence[Row], value: str, pair: str) -> dict[Any, float]:
    found: dict[Any, float] = {}
    for row in rows:
        key = _value(row, pair)
        if key in found:
            raise ValueError(f"rows: expected each {pair} once in a group, got {pair} {key} twice")
        found[key] = float(_value(row, value))
    return found


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise ValueError(f"rows: expected a column {column!r}, got {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _student_t(probability: float, degrees: int) -> float:
    try:
        from scipy.stats import t  # takes a second to import
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError("confidence intervals need scipy: install the extra `adderops[distill]`") from missing
    return float(t.ppf(probability, degrees))
