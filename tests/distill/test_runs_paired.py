"""Statistics over seeds against values worked out by hand and by scipy's own tests."""

import pytest
from scipy.stats import ttest_rel

from adderops.distill.runs.paired import compare_groups, group_rows, mean_and_deviation, paired_difference


def rows(accuracies: dict[int, float], **columns) -> list[dict]:
    return [{**columns, "seed": seed, "accuracy": accuracy} for seed, accuracy in accuracies.items()]


def test_mean_and_deviation():
    # squares of the distances from 5: 9 + 1 + 1 + 1 + 0 + 0 + 4 + 16 = 32, over n - 1 = 7
    assert mean_and_deviation([2, 4, 4, 4, 5, 5, 7, 9]) == (5, pytest.approx((32 / 7) ** 0.5))
    assert mean_and_deviation([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="values: expected at least one, got none"):
        mean_and_deviation([])


def test_paired_difference_by_hand():
    """Differences 1, 2, 6: mean 3, deviation sqrt(14 / 2); t(0.975, 2) = 4.302653, t(0.95, 2) = 2.919986 (tables)."""
    ours, theirs = rows({0: 11, 1: 22, 2: 36, 7: 1000}), rows({2: 30, 0: 10, 1: 20, 8: -1000})
    found = paired_difference(ours, theirs, "accuracy")
    assert (found["pairs"], found["difference"]) == (3, 3)
    assert found["difference_deviation"] == pytest.approx(7**0.5)
    half = 4.302653 * (7 / 3) ** 0.5
    assert (found["low"], found["high"]) == (pytest.approx(3 - half, abs=1e-5), pytest.approx(3 + half, abs=1e-5))
    narrower = paired_difference(ours, theirs, "accuracy", level=0.9)
    assert narrower["high"] == pytest.approx(3 + 2.919986 * (7 / 3) ** 0.5, abs=1e-5)


def test_the_interval_is_that_of_the_paired_t_test():
    ours, theirs = [0.9, 0.93, 0.88, 0.95, 0.91], [0.91, 0.9, 0.87, 0.94, 0.85]
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    found = paired_difference(rows(dict(enumerate(ours))), rows(dict(enumerate(theirs))), "accuracy")
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))


def test_too_few_pairs_have_no_interval():
    one = paired_difference(rows({0: 0.75, 1: 1}), rows({0: 0.5, 2: 1}), "accuracy")
    assert one == {"pairs": 1, "difference": 0.25, "difference_deviation": None, "low": None, "high": None}
    none = paired_difference(rows({0: 1}), rows({1: 1}), "accuracy")
    assert none == {"pairs": 0, "difference": None, "difference_deviation": None, "low": None, "high": None}


def test_equal_differences_have_an_interval_of_no_width():
    found = paired_difference(rows({0: 0.5, 1: 0.75}), rows({0: 0.25, 1: 0.5}), "accuracy")
    assert (found["difference"], found["low"], found["high"]) == (0.25, 0.25, 0.25)


def test_groups_keep_their_order_and_compare_with_the_first():
    plain, pkkd = rows({0: 0.5, 1: 0.75}, method="plain", beta=0), rows({1: 1.0, 0: 0.5}, method="pkkd", beta=0.5)
    other = rows({0: 0.25}, method="pkkd", beta=1)
    mixed = [plain[0], pkkd[0], other[0], plain[1], pkkd[1]]
    assert group_rows(mixed, ["method", "beta"]) == {("plain", 0): plain, ("pkkd", 0.5): pkkd, ("pkkd", 1): other}
    names = ("method", "beta", "n", "mean", "deviation", "pairs", "difference")
    assert [tuple(group[name] for name in names) for group in compare_groups(mixed, names[:2], "accuracy")] == [
        ("plain", 0, 2, 0.625, pytest.approx(0.03125**0.5), 0, None),
        ("pkkd", 0.5, 2, 0.75, pytest.approx(0.125**0.5), 2, 0.125),
        ("pkkd", 1, 1, 0.25, None, 1, -0.25),
    ]
    assert compare_groups([], ["method"], "accuracy") == []


def test_rows_of_a_csv_file_serve():
    text = [{name: str(value) for name, value in row.items()} for row in rows({0: 0.5, 1: 0.75}, method="plain")]
    assert compare_groups(text, ["method"], "accuracy")[0]["mean"] == 0.625


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rows": rows({0: 1}) + rows({0: 2})}, "rows: expected each seed once in a group, got seed 0 twice"),
        ({"value": "loss"}, "rows: expected a column 'loss', got seed, accuracy"),
        ({"pair": "fold"}, "rows: expected a column 'fold', got seed, accuracy"),
        ({"level": 95}, "level: expected a number between 0 and 1, got 95"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError) as raised:
        paired_difference(**{"rows": rows({0: 1}), "reference": rows({0: 2}), "value": "accuracy", **arguments})
    assert str(raised.value) == message
