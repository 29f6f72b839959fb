"""A run folder as its files tell it: configuration, log, and the networks of a finished run."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from adderops.distill.build import load_data_of
from adderops.distill.checkpoint import LOG_COLUMNS, load_state_dict, reading
from adderops.distill.config import MACHINE, Config, Options
from adderops.distill.data import Data
from adderops.distill.data.facts import differences, read_facts
from adderops.distill.methods import METHODS, Distillation, Task
from adderops.distill.methods.task import COMPARE
from adderops.distill.networks import arch_of
from adderops.distill.runs.older import facts_of_images, sizes_of_network
from adderops.models import mark_adder_weights
from adderops.quant import Scheme, insert

COMPARED = ("pkkd", "plain")  # the methods that --method compare trains, in this order
LAYER_COLUMNS = ("epoch", "layer")
# `root` is a location, `recipe` only presets other options, and a frozen teacher is another file for each seed.
NOT_COMPARED = {*MACHINE, "root", "recipe", "teacher_checkpoint"}


@dataclass(frozen=True)
class RunFolder:
    """A run as its files tell it, finished or still in training.

    Attributes:
        path: of the folder.
        config: of the run.
        rows: log.csv, one dict of numbers per epoch.  At least one epoch was tested; the others have NaN for the test.
        layers: layers.csv, one dict per epoch and matched layer; empty if no layers were matched.
        finished: whether the last epoch is over and the networks are saved.
    """

    path: Path
    config: Config
    rows: list[dict[str, float]]
    layers: list[dict[str, Any]]
    finished: bool

    @classmethod
    def load(cls, path: Path) -> "RunFolder":
        """Reads a run folder; of a comparison, that of its first run.

        Raises:
            FileNotFoundError: not a run folder, or no epoch is over yet.
            ValueError: a damaged file.
        """
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path}: expected a run folder, got one without a config.json")
        config = Config.load(path / "config.json")
        if config.method == COMPARE:
            return cls.load(next(iter(compared_runs(config, path))))
        if not (path / "log.csv").is_file():
            raise FileNotFoundError(f"{path}: expected a run of at least one epoch, got a folder without a log.csv")
        rows = _read_csv(path / "log.csv", LOG_COLUMNS)
        layers = _read_csv(path / "layers.csv", LAYER_COLUMNS) if (path / "layers.csv").is_file() else []
        if layers and layers[0].keys() == set(LAYER_COLUMNS):
            raise ValueError(f"{path / 'layers.csv'}: expected columns besides epoch and layer, got none")
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
        """What the 'test' columns of the log refer to: 'test' or 'validation' images."""
        return "validation" if self.config.validation else "test"

    @property
    def task(self) -> type[Task]:
        """The class of the run's method."""
        return METHODS[self.config.method]

    @property
    def networks(self) -> list[str]:
        """Names of the networks that the run tests and saves, the one that it is about first."""
        roles = sorted(self.task.roles, key=lambda role: role != self.task.main)
        names = [name for role in roles for name in (role, f"{role}_ema")]
        return [name for name in names if f"{name}_test_accuracy" in self.rows[0]]

    def kind(self, name: str) -> str:
        """Returns the kind of a network by its name: 'adder' or 'cnn'."""
        return self.task.roles[role_of(name)]

    def curve(self, name: str) -> list[float]:
        """Returns a column of log.csv, one number per epoch."""
        return [row[name] for row in self.rows]

    def results(self) -> list[dict[str, Any]]:
        """Returns one row per network: all options of the run, and its results.

        The results: run (folder), network, finished, epochs_done, test_accuracy (of the last test), best_test_accuracy
        and best_epoch (the first one that reaches it), train_accuracy (None for an average of weights),
        images_per_second (mean over the epochs), hours.  Accuracies are shares from 0 to 1.  The options of the
        distillation are None for a method without one.
        """
        results = []
        for name in self.networks:
            column = f"{name}_test_accuracy"
            tests = [(row[column], int(row["epoch"])) for row in self.rows if not math.isnan(row[column])]
            best, best_epoch = max(tests, key=lambda test: test[0])
            results.append(
                {
                    **self.config.flat(),
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
        """Raises ValueError if the run is not finished: its networks are not saved yet."""
        if not self.finished:
            raise ValueError(
                f"{self.path}: expected a finished run, got one after epoch {len(self.rows)} of {self.config.epochs} "
                f"without a summary.json; continue it with --resume {self.path}"
            )

    def network(self, name: str) -> nn.Module:
        """Returns a network of a finished run, on the CPU and in evaluation mode.

        Args:
            name: one of `networks`, or the main network's name followed by '_best'.

        Raises:
            ValueError: the run has no such network or is not finished, or a file is damaged.
            FileNotFoundError: the file is missing.
        """
        path = self.path / f"{name}.pt"
        best = [file.stem for file in sorted(self.path.glob("*_best.pt"))]
        if name not in self.networks and name not in best:
            raise ValueError(f"weights: expected {' or '.join([*self.networks, *best])} for {self.path}, got {name}")
        self.require_finished()
        state, role = load_state_dict(path), role_of(name)
        arch = arch_of(self.config, role)
        facts = self._facts if self.records_data else None
        with reading(path, f"a state_dict of {arch}", "another"):
            sizes = (facts["channels"], facts["num_classes"]) if facts else sizes_of_network(arch, state)
            network = self.task.network(self.config, role, *sizes)
            if self.config.bits is not None and role == self.task.main:
                network = insert(network, Scheme(self.config.bits))
            network.load_state_dict(mark_adder_weights(state, network))  # older runs saved no marks
        return network.eval()

    @property
    def records_data(self) -> bool:
        """Whether the run recorded its images (data.json); older versions did not."""
        return (self.path / "data.json").is_file()

    @cached_property
    def _facts(self) -> dict[str, Any]:
        if self.records_data:
            return read_facts(self.path / "data.json")
        return facts_of_images(self.config, self.path / f"{self.networks[0]}.pt")

    @property
    def data(self) -> dict[str, Any]:
        """`Data.facts` of the images that the run was trained on: data.json, or for older runs `facts_of_images`.

        Raises:
            FileNotFoundError: a run of an older version whose images are missing.
            ValueError: data.json is damaged, or the images of an older run are.
        """
        if "mean" not in self._facts:
            raise FileNotFoundError(f"{self.path}: expected data.json or the images of {self.config.data}, got neither")
        return self._facts

    def input_shape(self) -> tuple[int, int, int]:
        """Returns (C, H, W) of the images that the run's networks take.

        Raises:
            FileNotFoundError, ValueError: as `data`, except that the name of a set is enough here.
        """
        return self._facts["channels"], self._facts["side"], self._facts["side"]

    def num_classes(self) -> int:
        """Returns the number of logits of the run's networks; raises as `input_shape`."""
        return self._facts["num_classes"]

    def load_data(self) -> Data:
        """Loads the images of the run.

        Raises:
            FileNotFoundError, ValueError: as `load_data`, or they are not those that the run was trained on.
        """
        data = load_data_of(self.config)
        if self.records_data and (found := differences(self.data, data.facts())):
            raise ValueError(f"{self.path}: expected the images of the run, got others: {'; '.join(found)}")
        return data


def role_of(name: str) -> str:
    """Returns the role of a network by its name in a run.

    >>> role_of("student_ema_best")
    'student'
    """
    return name.removesuffix("_best").removesuffix("_ema")


def compared_runs(config: Config, folder: Path) -> dict[Path, Config]:
    """Returns the runs of a comparison by their folders, in the order in which they are trained.

    >>> list(map(str, compared_runs(Options(seeds=2).resolve(), Path("runs"))))
    ['runs/seed0/pkkd', 'runs/seed0/plain', 'runs/seed1/pkkd', 'runs/seed1/plain']
    >>> list(map(str, compared_runs(Options(seeds=1).resolve(), Path("runs"))))
    ['runs/pkkd', 'runs/plain']
    """
    seeds = config.seeds or 1  # None: of a version without the option
    return {
        folder / (f"seed{seed}" if seeds > 1 else "") / method: config.changed(method=method, seed=seed, seeds=None)
        for seed in range(config.seed, config.seed + seeds)
        for method in COMPARED
    }


def differing_options(configs: Sequence[Config]) -> list[str]:
    """Returns the names of the options in which runs differ, except for those that do not make another run.

    The options of the distillation are compared among the runs that have one.

    >>> differing_options([Options(beta=0.1, threads=1).resolve(), Options(beta=0.5, threads=2).resolve()])
    ['beta']
    """
    of_distillation = {f.name for f in fields(Distillation)}
    flat = [config.flat() for config in configs]
    distilled = [config.flat() for config in configs if config.distillation is not None]

    def differs(name: str) -> bool:
        return len({options[name] for options in (distilled if name in of_distillation else flat)}) > 1

    return [f.name for f in fields(Options) if f.name not in NOT_COMPARED and differs(f.name)]


def _read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the rows of a log: at least one, with at least these columns; 'layer' is text.

    An empty cell is NaN: the epoch had no test.
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
