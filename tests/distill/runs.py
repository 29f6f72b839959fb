"""A small image set in its true format, its task, and comparisons of run folders."""

import csv
from pathlib import Path
from types import SimpleNamespace

import torch

from adderops.distill import METHODS, Options, Task, trainer
from adderops.distill.build import build_optimizer
from adderops.distill.data import IDX_FILES
from distill.idx_files import idx_bytes

TIMING = {"seconds", "images_per_second"}


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
