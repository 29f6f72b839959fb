"""Runs the experiments on PKKD and makes the tables and plots of docs/pkkd.md from their rows.

    python experiments/pkkd.py run lenet5 --runs runs/pkkd     the missing runs of an experiment (hours)
    python experiments/pkkd.py run lenet5 --seeds 0 1 --only pkkd plain
    python experiments/pkkd.py run lenet5 --results mine       all runs again, with rows in another folder
    python experiments/pkkd.py tables                          results/pkkd.{md,png} from results/pkkd.csv (seconds)

A finished run of `python -m adderops.distill` becomes one row of results/pkkd.csv.  A run that has a row is not
repeated, and a stopped run resumes.  Several processes may work on one experiment: each run folder has a lock file.
Columns:

    experiment, dataset, network, method, seed, epochs, train_images
    test_accuracy, train_accuracy      fractions, after the last epoch; on validation images if the command says so
    hours                              of training, on a machine with other load
    command                            repeats the run (version 0.1.0 for the methods under `dropped`)

The rows of method cnn are the teachers of other runs: a student never affects its teacher (a test compares bits).
"""

import argparse
import csv
import fcntl
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adderops.atomic import write_atomically
from adderops.distill.runs.paired import compare_groups, group_rows, paired_difference

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/pkkd")
COLLAPSED = 10  # points of accuracy; larger differences are written, not drawn
COLUMNS = (
    "experiment dataset network method seed epochs train_images test_accuracy train_accuracy hours command".split()
)


@dataclass(frozen=True)
class Experiment:
    """A comparison: every method with every seed.

    Attributes:
        question: the title of its table.
        common: options of all runs.
        methods: {method: options}; the others are compared with the first.
        seeds: one run per method and seed.
        dropped: methods by options that only version 0.1.0 has; their rows stay in the tables.
        teacher_of: the method whose teacher is the table's CNN; None if there is none.
        contrasts: {name: (methods, others)}; the means of both are compared, seed by seed.
    """

    question: str
    common: str
    methods: dict[str, str]
    seeds: tuple[int, ...]
    dropped: tuple[str, ...] = ()
    teacher_of: str | None = None
    contrasts: dict[str, tuple[list[str], list[str]]] = field(default_factory=dict)

    def ordered(self, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        """The rows in the order of the methods."""
        order = [*self.methods, *self.dropped, "cnn"]
        return sorted(rows, key=lambda row: order.index(row["method"]))

    def options(self, method: str, seed: int, runs: Path) -> list[str]:
        """The options of one run; a frozen teacher comes from the run of `teacher_of` with the same seed."""
        words = shlex.split(f"{self.common} {self.methods[method]} --seed {seed} --threads 1")
        if "frozen" in words:
            words += ["--teacher-checkpoint", str(run_folder(runs, self.teacher_of, seed) / "teacher.pt")]
        return words


def run_folder(runs: Path, method: str, seed: int) -> Path:
    return runs / f"{method.replace(' ', '-')}-{seed}"


# Few training images: the networks fit all of them (training accuracy 1), which leaves a gap to the test accuracy.
_FEW = "--data fashion-mnist --train-images 4000 --epochs 100 --batch-size 64"
_FEATURES = {"logits": "none", "+1x1": "1x1", "+kernel": "kernel", "+both": "kernel+1x1"}
_CELLS = {
    f"{teacher} {name}": f"--method pkkd --teacher {teacher} --features {features}"
    for teacher in ("progressive", "frozen")
    for name, features in _FEATURES.items()
}


def _with(*words: str) -> list[str]:
    """The cells whose names contain one of the words."""
    return [name for name in _CELLS if any(word in name.split() for word in words)]


_PKKD = "--method pkkd"
_COLD = f"{_PKKD} --temperature 1"

EXPERIMENTS = {
    "choices": Experiment(
        "the choices that the paper leaves open, on validation images",
        f"{_FEW} --validation 5000",
        {
            "plain": "--method plain",
            "logits": f"{_COLD} --features none",
            **{f"beta {beta}": f"{_COLD} --beta {beta}" for beta in ("0.1", "1", "10", "100")},
            **{f"alpha {alpha}": f"{_COLD} --alpha {alpha}" for alpha in ("0.1", "10")},
            "temperature 4": _PKKD,
            "logits, temperature 4": f"{_PKKD} --features none",
            "logits, temperature 10": f"{_PKKD} --features none --temperature 10",
            "beta 0.01, temperature 4": f"{_PKKD} --beta 0.01",
            "1x1, temperature 4": f"{_PKKD} --features 1x1",
            "kernel, temperature 4": f"{_PKKD} --features kernel",
            "no logits": f"{_COLD} --beta 10 --no-logits",
        },
        dropped=(
            "identity, temperature 4",
            "identity, beta 1, temperature 4",
            "teacher's 1x1 identity",
            "teacher's 1x1 random",
            "width learned",
            "width shared",
            "width fixed",
        ),
        seeds=(0, 1, 2),
        teacher_of="logits",
    ),
    "ablation": Experiment(
        "the eight cells of the paper's ablation, where the networks fit the training images",
        _FEW,
        {"plain": "--method plain", **_CELLS},
        seeds=(0, 1, 2, 3, 4),
        teacher_of="progressive logits",
        contrasts={
            "progressive over frozen teacher": (_with("progressive"), _with("frozen")),
            "kernel over none": (_with("+kernel", "+both"), _with("logits", "+1x1")),
            "1x1 over none": (_with("+1x1", "+both"), _with("logits", "+kernel")),
            "progressive cells over plain": (_with("progressive"), ["plain"]),
        },
    ),
    "lenet5": Experiment(
        "LeNet-5-BN on all of Fashion-MNIST, 50 epochs",
        "--recipe fashion-mnist-lenet5",
        {"plain": "--method plain", "logits": f"{_PKKD} --features none", "pkkd": _PKKD},
        seeds=(0, 1, 2, 3, 4),
        teacher_of="logits",
        contrasts={
            "pkkd over logits": (["pkkd"], ["logits"]),
            "logits over cnn": (["logits"], ["cnn"]),
            "pkkd over cnn": (["pkkd"], ["cnn"]),
        },
    ),
    "resnet20": Experiment(
        "ResNet-20 on all of Fashion-MNIST",
        "--recipe fashion-mnist-resnet20 --epochs 5 --channels-last",
        {"plain": "--method plain", "pkkd": _PKKD},
        seeds=(0,),
        teacher_of="pkkd",
    ),
}


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_rows(rows: list[dict[str, object]], path: Path) -> None:
    """Adds the rows that the file lacks; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        present = read_rows(path)
        keys = {(r["experiment"], r["method"], r["seed"]) for r in present}
        new = [r for r in rows if (r["experiment"], r["method"], str(r["seed"])) not in keys]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*present, *new])
        write_atomically(path, text.getvalue().encode())


def rows_of_run(name: str, method: str, folder: Path, of_teacher: bool) -> list[dict[str, object]]:
    """The rows of a finished run: its own and, with `of_teacher`, that of its teacher as method cnn."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = []
    for label, role in [(method, "student")] + [("cnn", "teacher")] * of_teacher:
        accuracies = {f"{part}_accuracy": summary[f"{role}_{part}_accuracy"] for part in ("test", "train")}
        command = summary["command"].replace(f"{folder.parent.parent}/", f"{RUNS}/")
        row = summary | accuracies | {"experiment": name, "method": label, "command": command}
        rows.append({column: row[column] for column in COLUMNS})
    return rows


def run(name: str, runs: Path, methods: list[str], seeds: list[int], path: Path) -> None:
    """Makes the runs of an experiment that have no row in the file, seed by seed."""
    experiment = EXPERIMENTS[name]
    for seed in seeds:
        for method in methods:
            if any((r["experiment"], r["method"], r["seed"]) == (name, method, str(seed)) for r in read_rows(path)):
                continue
            folder = run_folder(runs, method, seed)
            runs.mkdir(parents=True, exist_ok=True)
            lock = open(runs / f"{folder.name}.lock", "w")  # noqa: SIM115  (held during the run)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # another process makes this run
            options = experiment.options(method, seed, runs)
            if (folder / "log.csv").exists():
                options = ["--resume", str(folder)]
            else:
                options += ["--output", str(folder)]
            print(f"{name}: {method}, seed {seed}", flush=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            with open(folder.with_suffix(".log"), "a") as log:
                command = [sys.executable, "-m", "adderops.distill", *options]
                subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)
            add_rows(rows_of_run(name, method, folder, method == experiment.teacher_of), path)
            lock.close()


def table(name: str, rows: list[dict[str, str]]) -> str:
    """The table of an experiment in Markdown: mean, deviation, and the paired difference to the first method."""
    experiment = EXPERIMENTS[name]
    mine = experiment.ordered([r for r in rows if r["experiment"] == name])
    if not mine:
        return f"{experiment.question}: no runs yet\n"
    first = mine[0]
    lines = [
        f"**{name}**: {experiment.question}. {first['network']}, {first['dataset']}, {first['train_images']} training "
        f"images, {first['epochs']} epochs.\n",
        f"| | seeds | accuracy, % | difference to {first['method']}, 95 % interval | training accuracy, % |",
        "|---|---|---|---|---|",
    ]
    for group in compare_groups(mine, ["method"], "test_accuracy"):
        members = [r for r in mine if r["method"] == group["method"]]
        deviation = "" if group["deviation"] is None else f" ± {100 * group['deviation']:.2f}"
        difference = "" if group["difference"] is None else f"{100 * group['difference']:+.2f}"
        if group["low"] is not None:
            difference += f" ({100 * group['low']:+.2f} to {100 * group['high']:+.2f})"
        trained = sum(float(r["train_accuracy"]) for r in members) / len(members)
        lines.append(
            f"| {group['method']} | {group['n']} | {100 * group['mean']:.2f}{deviation} | {difference} "
            f"| {100 * trained:.2f} |"
        )
    return "\n".join(lines + contrast_lines(experiment, mine)) + "\n"


def contrast_lines(experiment: Experiment, rows: list[dict[str, str]]) -> list[str]:
    """The table of the contrasts, over the seeds that have all methods of a contrast."""
    lines = []
    for name, groups in experiment.contrasts.items():
        means = [_means_by_seed([r for r in rows if r["method"] in methods], len(methods)) for methods in groups]
        found = paired_difference(*means, "test_accuracy")
        if found["low"] is not None:
            difference, low, high = (100 * found[key] for key in ("difference", "low", "high"))
            lines.append(f"| {name} | {found['pairs']} | {difference:+.2f} ({low:+.2f} to {high:+.2f}) |")
    if lines:
        head = "| means of methods, seed by seed | seeds | difference, 95 % interval |"
        lines = ["", head, "|---|---|---|", *lines]
    return lines


def _means_by_seed(rows: list[dict[str, str]], methods: int) -> list[dict[str, object]]:
    """One row per seed that has `methods` methods: the mean of their accuracies."""
    groups = group_rows(rows, ["seed"])
    return [
        {"seed": seed, "test_accuracy": statistics.fmean(float(r["test_accuracy"]) for r in members)}
        for (seed,), members in groups.items()
        if len(members) == methods
    ]


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Differences to the first method with their intervals, one axis per experiment."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [n for n in EXPERIMENTS if sum(r["experiment"] == n for r in rows) > 1]
    if not names:
        return
    compared = {
        n: [g for g in compare_groups(_ordered(n, rows), ["method"], "test_accuracy") if g["difference"] is not None]
        for n in names
    }
    heights = [len(groups) + 1.5 for groups in compared.values()]
    figure, axes = plt.subplots(
        len(names),
        1,
        figsize=(7, 0.32 * sum(heights) + 0.8),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (n, groups) in zip(axes[:, 0], compared.items(), strict=True):
        for i, group in enumerate(reversed(groups)):
            x = 100 * group["difference"]
            low, high = (100 * group[end] if group[end] is not None else x for end in ("low", "high"))
            if abs(x) > COLLAPSED:  # would hide the others
                axis.annotate(f"{x:+.1f}", (0, i), xycoords=("axes fraction", "data"), fontsize=8, va="center")
                continue
            axis.errorbar(x, i, xerr=[[x - low], [high - x]], fmt="o", color="C0" if group["method"] != "cnn" else "C1")
        axis.set_ylim(-0.7, len(groups) - 0.3)
        axis.set_yticks(range(len(groups)), [f"{g['method']} ({g['pairs']})" for g in reversed(groups)])
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_title(f"{n}: points of accuracy over {_ordered(n, rows)[0]['method']}, 95 %", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)


def _ordered(name: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return EXPERIMENTS[name].ordered([r for r in rows if r["experiment"] == name])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="make the missing runs of an experiment")
    running.add_argument("experiment", choices=EXPERIMENTS)
    running.add_argument("--runs", type=Path, default=RUNS, help=f"folder of the run folders (default: {RUNS})")
    running.add_argument("--seeds", type=int, nargs="+", help="default: those of the experiment")
    running.add_argument("--only", nargs="+", metavar="METHOD", help="default: all methods")
    tables = commands.add_parser("tables", help="pkkd.md and pkkd.png from pkkd.csv")
    for command in (running, tables):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of pkkd.csv (default: results/)")
    options = parser.parse_args(argv)
    if options.command == "run":
        experiment = EXPERIMENTS[options.experiment]
        unknown = set(options.only or []) - set(experiment.methods)
        if unknown:
            parser.error(f"--only: expected some of {', '.join(experiment.methods)}, got {', '.join(sorted(unknown))}")
        folder = (options.runs / options.experiment).resolve()
        run(
            options.experiment,
            folder,
            options.only or list(experiment.methods),
            options.seeds or list(experiment.seeds),
            options.results / "pkkd.csv",
        )
        return
    rows = read_rows(options.results / "pkkd.csv")
    text = "\n".join(table(name, rows) for name in EXPERIMENTS)
    write_atomically(options.results / "pkkd.md", text.encode())
    plot(rows, options.results / "pkkd.png")
    print(text)


if __name__ == "__main__":
    main()
