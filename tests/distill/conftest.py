"""A small image set, and the options of small runs on it."""

from pathlib import Path

import pytest

from adderops.distill import Data, Options, load_data
from distill.runs import write_bars


@pytest.fixture(scope="session")
def folder_of_bars(tmp_path_factory) -> Path:
    """128 and 40 images of four classes, as MNIST files."""
    folder = tmp_path_factory.mktemp("bars")
    write_bars(folder)
    return folder


@pytest.fixture
def options(folder_of_bars, set_threads) -> list[str]:
    """The command line of two epochs of eight steps on them."""
    set_threads(1)
    return f"--data {folder_of_bars} --epochs 2 --batch-size 16 --threads 1".split()


@pytest.fixture
def data(folder_of_bars) -> Data:
    return load_data(str(folder_of_bars))


@pytest.fixture
def config(folder_of_bars, set_threads) -> Options:
    set_threads(1)
    return Options(data=str(folder_of_bars), method="pkkd", epochs=2, batch_size=16, threads=1)
