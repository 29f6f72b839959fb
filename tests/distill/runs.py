"""Small image sets, tasks and run folders for tests, what a command prints, and comparisons of run folders."""

import csv
import io
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from adderops.distill import METHODS, Data, Interrupted, Options, Task, main, train, trainer
from adderops.distill.build import build_optimizer
from adderops.distill.checkpoint import write_csv, write_json
from adderops.distill.data import IDX_FILES
from adderops.distill.methods.task import COMPARE
from distill.idx_files import idx_bytes

TIMING = {"seconds", "images_per_second"}
TINY = "--arch lenet5 --side 32 --method plain --epochs 2 --batch-size 8 --threads 1".split()  # on `write_pictures`


def _bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 28x28 images of a bright bar at one of four heights: the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (count, 28, 28), generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[7 * label : 7 * label + 5] += 150
    return images, labels


def write_bars(folder: Path, train: int = 128, test: int = 40) -> None:
    """Writes the four idx files."""
    for array, name in zip((*_bars(train, seed=1), *_bars(test, seed=2)), IDX_FILES, strict=True):
        (folder / name).write_bytes(idx_bytes(array))


def build_task(options: Options) -> Task:
    """Builds networks and task for images of bars."""
    config, bars = options.resolve(), SimpleNamespace(in_channels=1, num_classes=4)
    return METHODS[config.method].build(config, bars, torch.device("cpu"))


def keep_tasks(monkeypatch) -> list[Task]:
    """Returns a list that gets the task of each training from now on."""
    tasks: list[Task] = []
    monkeypatch.setattr(trainer, "build_optimizer", lambda c, task: tasks.append(task) or build_optimizer(c, task))
    return tasks


def rows_of(log: Path) -> list[dict[str, str]]:
    with open(log) as file:
        return list(csv.DictReader(file))


def assert_same_state(a: object, b: object, where: str = "checkpoint") -> None:
    """Same structure, same bits."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMING:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@contextmanager
def interrupted(after: int) -> Iterator[None]:
    """Sends SIGTERM after some optimizer steps; expects the training to be interrupted by it, then."""
    steps: list[int] = []

    def count(*_: object) -> None:
        steps.append(1)
        if len(steps) == after:
            signal.raise_signal(signal.SIGTERM)

    hook = register_optimizer_step_post_hook(count)
    try:
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            yield
    finally:
        hook.remove()
    assert len(steps) == after


def assert_continued_alike(options: Options, data: Data, folder: Path, after: int = 11) -> None:
    """A run stopped after some steps and continued has the bits of one without; folders `stopped` and `whole`."""
    train(options, data, folder / "whole")
    with interrupted(after):
        train(options, data, folder / "stopped")
    train(options, data, folder / "stopped")
    files = ["checkpoint.pt", *(path.name for path in folder.glob("whole/*.pt") if path.name != "checkpoint.pt")]
    assert len(files) > 1
    for name in files:
        stopped, whole = (torch.load(folder / run / name, weights_only=True) for run in ("stopped", "whole"))
        assert_same_state(stopped, whole, name)


def written_run(folder: Path, accuracies: list[float], **options) -> Path:
    """A run folder as the trainer leaves it, without networks; `accuracies` are the main network's, one per epoch."""
    config = Options(**{"data": "digits", "epochs": len(accuracies), "threads": 1, **options}).resolve()
    name = "student" if config.method == COMPARE else METHODS[config.method].main
    rows = [
        {
            "epoch": i + 1,
            f"{name}_train_accuracy": 1.0,
            f"{name}_test_accuracy": accuracy,
            "images_per_second": 100.0 + i,
            "seconds": 1800.0,
        }
        for i, accuracy in enumerate(accuracies)
    ]
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.flat())
    write_csv(folder / "log.csv", rows)
    if len(rows) == config.epochs:
        write_json(folder / "summary.json", {})
    return folder


def lines_of(capsys) -> list[list[str]]:
    """Returns the words of each printed line."""
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def error_of(capsys, *arguments: object) -> str:
    """Runs a command that is refused; returns what it prints as its error."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def saved(content: object) -> bytes:
    """Returns the file that `torch.save` makes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_pictures(folder: Path, classes: dict[str, int], train: int = 12, val: int = 4) -> Path:
    """Writes train/CLASS/IMAGE and val/CLASS/IMAGE: noise about one grey level per class."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, level in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 50, (32, 32), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder
