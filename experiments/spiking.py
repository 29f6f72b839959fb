"""CNN, adder network and spiking networks on Fashion-MNIST: the runs behind docs/spiking.md.

    python experiments/spiking.py run --runs FOLDER [NAME ...]     trains what is missing (hours); a stopped run resumes
    python experiments/spiking.py table --runs FOLDER              results/spiking-TABLE.{md,csv,png}, of finished runs
    python experiments/spiking.py list                             the commands

Every run is one command of `python -m adderops.distill`; `list` prints them all.  Several processes may work on one
folder of runs: a run that another process owns is skipped.
"""

import argparse
import contextlib
import io
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from adderops.atomic import write_atomically
from adderops.distill import main as distill
from adderops.distill.runs import costs

RESULTS = Path(__file__).parent / "results"
DATA = "--data fashion-mnist --lr-per-step"
MACHINE = "--threads 1 --device cpu"
STEPS = (8, 16, 32)  # of the conversions
CALIBRATIONS = ("none", "light", "advanced")
COUNTED = costs.COUNTED


class Table(NamedTuple):
    """One network, the first part of the table's name, trained in several ways."""

    epochs: int  # of CNN and adder networks
    spiking_epochs: int = 0  # of the methods that train spiking networks; 0: the CNN alone
    steps: int = 0  # of those
    training: str = ""  # further options
    conversion: str = ""  # options of `spike`
    seeds: int = 1
    counted: int = COUNTED  # images whose spikes are counted


TABLES = {
    "lenet5": Table(10, 5, 8, seeds=2),
    "resnet20": Table(3, 2, 4, "--train-images 12000", "--test-images 2000 --images 256"),
    "resnet20-all_images": Table(3, conversion="--test-images 1000 --images 512", counted=20),
    "vgg_small": Table(
        3, 0, 0, "--train-images 8000 --batch-size 64 --lr 0.02", "--test-images 300 --images 64", counted=20
    ),
}


class Run(NamedTuple):
    """A training: its table, its method and the options of its command."""

    table: str
    method: str
    options: str


# Runs beside those of the tables.
OTHERS = {
    **{
        f"lenet5-long-dsr-{steps}": Run(
            "lenet5-long", "dsr", f"--method dsr --arch lenet5 --epochs 10 --steps {steps} {DATA}"
        )
        for steps in (4, 8, 20)
    },
    "lenet5-20_epochs-cnn": Run("lenet5-20_epochs", "cnn", f"--method cnn --arch lenet5 --epochs 20 {DATA}"),
    "lenet5-20_epochs-dsr-4": Run(
        "lenet5-20_epochs", "dsr", f"--method dsr --arch lenet5 --epochs 20 --steps 4 {DATA}"
    ),
    "lenet5-crop-cnn": Run("lenet5-crop", "cnn", f"--method cnn --arch lenet5 --augment crop --epochs 12 {DATA}"),
    "lenet5-crop-proxy": Run(
        "lenet5-crop", "proxy", "--recipe proxy-fashion-mnist-lenet5 --epochs 24 --lr 2e-3 --lr-per-step"
    ),
    "mlp-desire": Run(
        *("mlp", "desire"),
        "--recipe desire-fashion-mnist-mlp --epochs 80 --lr 2e-3 --schedule cosine --warmup-epochs 2 --lr-per-step",
    ),
}
# Where the recipe's rate is for hundreds of epochs, another rate or batch: chosen on the digits.
SPIKING = {
    "dsr": "",
    "proxy": "--lr 2e-3",
    "snn2ann": "--batch-size 64",
    "joint": "--batch-size 128 --momentum 0.9",
    "surrogate": "",
}
JOINT_STEPS = 4  # it goes back through all steps


def runs_by_name() -> dict[str, Run]:
    """Returns each training by the name of its run."""
    found = {}
    for name, table in TABLES.items():
        methods = {method: f"--epochs {table.epochs}" for method in ("cnn", "plain", "pkkd")}
        if not table.spiking_epochs:
            methods = {"cnn": methods["cnn"]}
        for method, options in SPIKING.items() if table.spiking_epochs else ():
            steps = JOINT_STEPS if method == "joint" else table.steps
            methods[method] = f"--epochs {table.spiking_epochs} --steps {steps} {options}"
        for seed in range(table.seeds):
            for method, options in methods.items():
                words = f"--method {method} --arch {name.split('-')[0]} {options} {table.training} {DATA}"
                words += f" --seed {seed}" * (seed > 0)
                found[f"{name}-{method}" + f"-{seed}" * (seed > 0)] = Run(name, method, words)
    return {
        name: run._replace(options=" ".join(f"{run.options} {MACHINE}".split()))
        for name, run in (found | OTHERS).items()
    }


def train(runs: Path, names: list[str]) -> None:
    """Trains what is missing, converts the CNNs, and quantizes CNNs and distilled adder networks."""
    found = runs_by_name()
    for name in names or found:
        folder, run = runs / name, found[name]
        if not (folder / "summary.json").exists():
            words = ["--resume", str(folder)] if (folder / "config.json").exists() else shlex.split(run.options)
            words += [] if words[0] == "--resume" else ["--output", str(folder)]
            print(f"== {name}: {shlex.join(words)}", flush=True)
            if status := _run(words):
                print(f"== {name}: exit status {status}", flush=True)
                continue
        for words in _after(run, folder):
            if status := _run(words):
                print(f"== {shlex.join(words)}: exit status {status}", flush=True)


def _after(run: Run, folder: Path) -> list[list[str]]:
    """Returns the commands on a finished run whose results are missing."""
    missing: list[list[str]] = []
    if run.method in ("cnn", "pkkd") and not list(folder.glob("export/int8.*")):
        missing.append(["quantize", str(folder)])
    if run.method == "cnn" and run.table in TABLES:
        for steps in STEPS:
            for calibration in CALIBRATIONS:
                if not (folder / "spiking" / f"teacher-{steps}-{calibration}" / "spiking.json").exists():
                    missing.append(["spike", str(folder), "--steps", str(steps), "--calibrate", calibration])
                    missing[-1] += TABLES[run.table].conversion.split()
    return missing


def _run(words: list[str]) -> int:
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "adderops.distill", *words]).returncode


def table(runs: Path) -> None:
    """Writes what `compare` prints, one file per table with finished runs; other files stay."""
    found = runs_by_name()
    for of_table in dict.fromkeys(run.table for run in found.values()):
        folders = [str(runs / name) for name, run in found.items() if run.table == of_table]
        finished = [folder for folder in folders if (Path(folder) / "summary.json").exists()]
        if not finished:
            continue
        text, path = io.StringIO(), RESULTS / f"spiking-{of_table}"
        csv, plot = (str(path.with_suffix(suffix)) for suffix in (".csv", ".png"))
        costs.COUNTED = TABLES[of_table].counted if of_table in TABLES else COUNTED
        with contextlib.redirect_stdout(text):
            distill(["compare", *finished, "--csv", csv, "--trade-off", plot])
        write_atomically(path.with_suffix(".md"), f"# {of_table}\n\n```\n{text.getvalue()}```\n".encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table", "list"))
    parser.add_argument("names", nargs="*", choices=[[], *runs_by_name()], metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/spiking"))
    options = parser.parse_intermixed_args()  # names may follow --runs
    if options.task == "run":
        train(options.runs, options.names)
    elif options.task == "table":
        table(options.runs)
    else:
        for name, run in runs_by_name().items():
            print(f"python -m adderops.distill {run.options} --output {options.runs / name}")


if __name__ == "__main__":
    main()
