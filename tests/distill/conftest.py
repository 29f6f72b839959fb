"""Fixtures of the trainer's tests: a small image set, options of small runs on it, and finished runs."""

import shutil
from pathlib import Path

import pytest
import torch

from adderops.distill import Data, Options, load_data, main, train
from adderops.distill.runs.folder import RunFolder
from distill.runs import TINY, write_bars, write_pictures


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


@pytest.fixture
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="session")
def trained(folder_of_bars, tmp_path_factory) -> Path:
    """A finished run of pkkd with an averaged student; copy it before changing it."""
    folder = tmp_path_factory.mktemp("runs") / "pkkd"
    options = Options(data=str(folder_of_bars), method="pkkd", epochs=3, batch_size=16, lr=0.02, ema=0.5, threads=1)
    train(options, load_data(options.data), folder)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of `trained`."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="session")
def trained_on_pictures(tmp_path_factory) -> Path:
    """A finished run of plain on a folder of images, which lies next to it as `set`: classes dark and light."""
    root = tmp_path_factory.mktemp("pictures")
    write_pictures(root / "set", {"dark": 10, "light": 200})
    assert main([*TINY, "--data", str(root / "set"), "--output", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture(scope="session")
def runs(folder_of_bars, tmp_path_factory) -> dict[str, RunFolder]:
    """A finished run of each method, two epochs each."""
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("runs")
    data = load_data(str(folder_of_bars))
    for method in ("pkkd", "plain", "cnn"):
        options = Options(data=str(folder_of_bars), method=method, epochs=2, batch_size=16, lr=0.02, threads=1)
        train(options, data, folder / method)
    torch.set_num_threads(before)
    return {method: RunFolder.load(folder / method) for method in ("pkkd", "plain", "cnn")}


@pytest.fixture(scope="module")
def quick_timing():
    """Networks are timed for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("adderops.distill.runs.quantize.TIMED_SECONDS", 0.001)
        yield
