"""Which values of a parametrized test run by default."""

from collections.abc import Container, Iterable

import pytest


def slow_except(quick: Container, values: Iterable) -> list:
    """The values as parameters for `pytest.mark.parametrize`: those that are not in `quick` are marked slow."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]
