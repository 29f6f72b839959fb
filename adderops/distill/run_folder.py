"""What a run folder holds: configuration, log, and the networks of a finished run."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adderops.distill.build import load_data_of
from adderops.distill.checkpoint import LOG_COLUMNS, load_state_dict, reading
from adderops.distill.config import MACHINE, Config, Options
from adderops.distill.data import Data
from adderops.distill.data.facts import differences, read_facts
from adderops.distill.data.idx import SIDE
from adderops.distill.data.sources import find_source
from adderops.distill.methods import METHODS, Distillation, Task
from adderops.distill.networks import arch_of
from adderops.models import classifier, create_model, input_size, mark_adder_weights
from adderops.quant import Scheme, insert

COMPARED = ("pkkd", "plain")  # the methods that --method compare trains
LAYER_COLUMNS = ("epoch", "layer", "l_mid", "gradient_ratio", "var_yc")
# `root` is where the data lie, `recipe` no more than the values of other options, and frozen teachers are one a seed.
NOT_COMPARED = {*MACHINE, "root", "recipe", "teacher_checkpoint"}


def saved_networks() -> tuple[str, ...]:
    """Returns the names of the networks that runs may save; best: as it was at its best test."""
    roles = dict.fromkeys(role for task in METHODS.values() for role in sorted(task.roles))
    names = [name for role in roles for name in (role, f"{role}_ema")]
    return (*names, *(f"{name}_best" for name in names))


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it, finished or still in training.

    Attributes:
        path: of the folder.
        config: of the run.
        rows: log.csv: numbers by name, a dict per epoch; at least one is of a test, the others have NaN there.
        layers: layers.csv: a dict an epoch and matched layer; empty where nothing was matched.
        finished: whether the last epoch is over and the networks are saved.
    """

    path: Path
    config: Config
    rows: list[dict[str, float]]
    layers: list[dict[str, Any]]
    finished: bool

    @classmethod
    def load(cls, path: Path) -> "RunFolder":
        """Reads a run folder; of a comparison the first run by PKKD.

        Raises:
            FileNotFoundError: not a run folder, or no epoch is over yet.
            ValueError: a damaged file.
        """
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: expected a run folder, got one without a config.json")
        config = Config.load(path / "config.json")
        if config.method == "compare":
            return cls.load(next(iter(compared_runs(config, path))))
        if not (path / "log.csv").is_file():
            raise FileNotFoundError(f"{path}: expected a run of at least one epoch, got a folder without a log.csv")
        rows = _read_csv(path / "log.csv", LOG_COLUMNS)
        layers = _read_csv(path / "layers.csv", LAYER_COLUMNS) if (path / "layers.csv").is_file() else []
        run = cls(path, config, rows, layers, (path / "summary.json").is_file())
        if not run.networks:
            raise ValueError(f"{path / 'log.csv'}: expected a column with a test accuracy, got {', '.join(rows[0])}")
        if all(math.isnan(row[f"{name}_test_accuracy"]) for name in run.networks for row in rows):
            raise FileNotFoundError(f"{path}: expected a run of at least one test, got {len(rows)} epochs without")
        return run

    @property
    def title(self) -> str:
        config = self.config
        return f"{Path(config.data).name}, {config.arch}, {config.method}, seed {config.seed}"

    @property
    def tested_on(self) -> str:
        """What the 'test' of the log is: 'test' or 'validation' images."""
        return "validation" if self.config.validation else "test"

    @property
    def networks(self) -> list[str]:
        """Names of the networks that the run tests and saves, the one that it is about first."""
        roles = sorted(self.task.roles, key=lambda role: role != self.task.main)
        names = [name for role in roles for name in (role, f"{role}_ema")]
        return [name for name in names if f"{name}_test_accuracy" in self.rows[0]]

    @property
    def task(self) -> type[Task]:
        """The class of the run's method."""
        return METHODS[self.config.method]

    def curve(self, name: str) -> list[float]:
        """Returns a column of log.csv, a number an epoch."""
        return [row[name] for row in self.rows]

    def results(self) -> list[dict[str, Any]]:
        """Returns a row for each network: all options of the run, and what came of it.

        The latter: run (folder), network, finished, epochs_done, test_accuracy (of the last epoch), best_test_accuracy
        and best_epoch (the first one that reaches it), train_accuracy (None for an average of weights),
        images_per_second (mean over the epochs), hours.  Accuracies are shares.  Options of distillation are None for
        the other methods.
        """
        options = self.config.flat()
        results = []
        for name in self.networks:
            column = f"{name}_test_accuracy"
            tests = [(row[column], int(row["epoch"])) for row in self.rows if not math.isnan(row[column])]
            best, best_epoch = max(tests, key=lambda test: test[0])
            results.append(
                {
                    **options,
                    "run": str(self.path),
                    "network": name,
                    "finished": self.finished,
                    "epochs_done": len(self.rows),
                    "test_accuracy": tests[-1][0],
                    "best_test_accuracy": best,
                    "best_epoch": best_epoch,
                    "train_accuracy": self.rows[-1].get(f"{name}_train_accuracy"),
                    "images_per_second": sum(self.curve("images_per_second")) / len(self.rows),
                    "hours": sum(self.curve("seconds")) / 3600,
                }
            )
        return results

    def require_finished(self) -> None:
        """Raises ValueError where the run is not finished: its networks are not saved yet."""
        if not self.finished:
            raise ValueError(
                f"{self.path}: expected a finished run, got one after epoch {len(self.rows)} of {self.config.epochs} "
                f"without a summary.json; continue it with --resume {self.path}"
            )

    def network(self, name: str) -> nn.Module:
        """Returns a network of a finished run, on the CPU and in evaluation mode.

        Args:
            name: one of `networks`, or of those that the run is about with '_best' behind.

        Raises:
            ValueError: the run has no such network or is not finished, or the file is damaged.
            FileNotFoundError: the file is missing.
        """
        path = self.path / f"{name}.pt"
        best = [file.stem for file in sorted(self.path.glob("*_best.pt"))]
        if name not in self.networks and name not in best:
            raise ValueError(f"weights: expected {' or '.join([*self.networks, *best])} for {self.path}, got {name}")
        self.require_finished()
        state = load_state_dict(path)
        role = name.partition("_")[0]
        arch = arch_of(self.config, role)
        with reading(path, f"a state_dict of {arch}", "another"):
            network = create_model(arch, self.task.roles[role], *_sizes(arch, state))
            if self.config.bits is not None and role == self.task.main:
                network = insert(network, Scheme(self.config.bits))
            network.load_state_dict(mark_adder_weights(state, network))  # runs of before there were marks
        return network.eval()

    @cached_property
    def data(self) -> dict[str, Any]:
        """`Data.facts` of the images that the run was trained on: data.json.

        A run of an older version has none; its images are read for it.

        Raises:
            FileNotFoundError, ValueError: as `load_data`, or a damaged data.json.
        """
        path = self.path / "data.json"
        return read_facts(path) if path.is_file() else load_data_of(self.config).facts()

    def load_data(self) -> Data:
        """Loads the images of the run.

        Raises:
            FileNotFoundError, ValueError: as `load_data`, or they are others than it was trained on.
        """
        data = load_data_of(self.config)
        if (self.path / "data.json").is_file() and (found := differences(self.data, data.facts())):
            raise ValueError(f"{self.path}: expected the images of the run, got others: {'; '.join(found)}")
        return data

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the logits; None where the set has none, or an older run is exported."""
        return self.data.get("classes") if (self.path / "data.json").is_file() else None

    def input_shape(self, network: nn.Module) -> tuple[int, int, int]:
        """Returns (C, H, W) of the images that a network of the run takes.

        Raises:
            FileNotFoundError: a run of an older version on a folder of the user, which is gone.
            ValueError: data.json is damaged.
        """
        channels = first_convolution(network)[1].in_channels
        if (self.path / "data.json").is_file():
            return channels, self.data["side"], self.data["side"]
        source = find_source(self.config.data, Path(self.config.root), download=False)
        side = (self.config.side or input_size(self.config.arch)) if source.of_files else SIDE
        return channels, side, side

    def preprocessing(self) -> tuple[list[float], list[float]]:
        """Returns mean and standard deviation of each channel, for pixels from 0 to 1: x = (pixel - mean) / std.

        Raises:
            FileNotFoundError, ValueError: as `data`.
        """
        if not (self.path / "data.json").is_file():  # published numbers need no images
            source = find_source(self.config.data, Path(self.config.root), download=False)
            if source.statistics is not None:
                return tuple(map(list, source.statistics))
        return self.data["mean"], self.data["std"]


def compared_runs(config: Config, folder: Path) -> dict[Path, Config]:
    """Returns the runs of a comparison, each with its folder: by seed, pkkd first.

    >>> list(map(str, compared_runs(Options(seeds=2).resolve(), Path("runs"))))
    ['runs/seed0/pkkd', 'runs/seed0/plain', 'runs/seed1/pkkd', 'runs/seed1/plain']
    >>> list(map(str, compared_runs(Options(seeds=1).resolve(), Path("runs"))))
    ['runs/pkkd', 'runs/plain']
    """
    seeds = config.seeds or 1  # None: written before there was the option
    return {
        folder / (f"seed{seed}" if seeds > 1 else "") / method: config.changed(method=method, seed=seed, seeds=None)
        for seed in range(config.seed, config.seed + seeds)
        for method in COMPARED
    }


def differing_options(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the options in which rows of `RunFolder.results` differ, but for those that do not make another run.

    >>> common = dict(method="pkkd", threads=1)
    >>> differing_options([{**common, "beta": 0.1}, {**common, "beta": 0.5, "threads": 2}])
    ['beta']
    """
    differing = []
    of_distillation = {f.name for f in fields(Distillation)}
    for name in (f.name for f in fields(Options) if f.name not in NOT_COMPARED):
        values = {row.get(name) for row in rows if name not in of_distillation or METHODS[row["method"]].distills}
        if len(values) > 1:
            differing.append(name)
    return differing


def first_convolution(network: nn.Module) -> tuple[str, nn.Conv2d]:
    return next((name, m) for name, m in network.named_modules() if isinstance(m, nn.Conv2d))


def _sizes(arch: str, state: dict[str, Tensor]) -> tuple[int, int]:
    """Returns the channels of the images and the number of classes of the network whose state_dict this is."""
    with torch.device("meta"):
        like = create_model(arch, "cnn")
    name, layer = first_convolution(like)
    return state[f"{name}.weight"].size(1) * layer.groups, state[f"{classifier(like)[0]}.weight"].size(0)


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of a log, at least one, which has the columns named and maybe more; 'layer' is text.

    An empty cell, of an epoch without a test, is NaN.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        rows = [
            {name: v if name == "layer" else float("nan" if v == "" else v) for name, v in row.items()} for row in rows
        ]
    except (csv.Error, TypeError, ValueError) as error:  # TypeError: too few or too many fields
        raise ValueError(f"{path}: expected a number in each column, got a damaged file ({error})") from error
    if not rows or not set(columns) <= rows[0].keys():
        found = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"{path}: expected rows with {', '.join(columns)}, got {found}")
    return rows
