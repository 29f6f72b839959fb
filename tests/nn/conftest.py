"""All tests of this room run on one thread: the networks are small, and threads would mostly wait for each other."""

import pytest
from cases import one_thread


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    with one_thread():
        yield
