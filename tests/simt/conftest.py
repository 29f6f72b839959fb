"""The table of deliberate errors at the end of a run."""

import pytest

_mutants: list[tuple[str, str | None]] = []


@pytest.fixture
def record_mutant():
    """record_mutant(what, detector): one row of the table; detector is None if nothing caught the error."""
    return lambda what, detector: _mutants.append((what, detector))


def pytest_terminal_summary(terminalreporter):
    if _mutants:
        terminalreporter.section("deliberate errors in the CUDA kernels, and who caught them")
        for what, detector in _mutants:
            terminalreporter.write_line(f"{detector or 'NOBODY':10}{what}")
