"""CNN, adder network and spiking networks on Fashion-MNIST: the runs behind docs/spiking.md.

    python experiments/spiking.py run --runs FOLDER [NAME ...]     trains what is missing (hours); a stopped run resumes
    python experiments/spiking.py table --runs FOLDER              results/spiking.{md,csv,png} from the finished runs
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

from adderops.atomic import write_atomically
from adderops.distill import main as distill

RESULTS = Path(__file__).parent / "results"
COMMON = "--data fashion-mnist --lr-per-step --threads 1 --device cpu"
STEPS = (8, 16, 32)  # of the conversions
CALIBRATIONS = ("none", "light", "advanced")
# Epochs of each network, and of its spiking methods, which cost T times as much.
NETWORKS = {"lenet5": (10, 5), "resnet20": (5, 1)}
# Where the recipe's rate is for hundreds of epochs, another rate or batch: chosen on the digits.
SPIKING = {
    "dsr": "--steps 8",
    "proxy": "--steps 8 --lr 2e-3",
    "snn2ann": "--steps 8 --batch-size 64",
    "joint": "--steps 4 --batch-size 128 --momentum 0.9",
    "surrogate": "--steps 8",
}


def commands() -> dict[str, str]:
    """Returns the options of each training by the name of its run, cheap ones first."""
    found = {}
    for arch, (epochs, of_spiking) in NETWORKS.items():
        for method in ("cnn", "plain", "pkkd"):
            found[f"{arch}-{method}"] = f"--method {method} --arch {arch} --epochs {epochs} {COMMON}"
        for method, options in SPIKING.items():
            found[f"{arch}-{method}"] = f"--method {method} --arch {arch} --epochs {of_spiking} {options} {COMMON}"
    found["vgg_small-cnn"] = f"--method cnn --arch vgg_small --epochs 2 {COMMON}"
    return found


def train(runs: Path, names: list[str]) -> None:
    """Trains what is missing, converts the CNNs, and quantizes CNNs and distilled adder networks."""
    found = commands()
    for name in names or found:
        folder = runs / name
        if not (folder / "summary.json").exists():
            words = ["--resume", str(folder)] if (folder / "config.json").exists() else shlex.split(found[name])
            words += [] if words[0] == "--resume" else ["--output", str(folder)]
            print(f"== {name}: {shlex.join(words)}", flush=True)
            if status := _run(words):
                print(f"== {name}: exit status {status}", flush=True)
                continue
        for words in _after(name, folder):
            if status := _run(words):
                print(f"== {shlex.join(words)}: exit status {status}", flush=True)


def _after(name: str, folder: Path) -> list[list[str]]:
    """Returns the commands on a finished run whose results are missing."""
    arch, method = name.split("-")
    missing: list[list[str]] = []
    if method in ("cnn", "pkkd") and arch in NETWORKS and not list(folder.glob("export/int8.*")):
        missing.append(["quantize", str(folder)])
    if method == "cnn":
        for steps in STEPS:
            for calibration in CALIBRATIONS:
                if not (folder / "spiking" / f"teacher-{steps}-{calibration}" / "spiking.json").exists():
                    missing.append(["spike", str(folder), "--steps", str(steps), "--calibrate", calibration])
    return missing


def _run(words: list[str]) -> int:
    return subprocess.run([sys.executable, "-W", "ignore", "-m", "adderops.distill", *words]).returncode


def table(runs: Path) -> None:
    """Writes the tables that `compare` prints, one per architecture."""
    parts = []
    for arch in NETWORKS:
        folders = [str(runs / name) for name in commands() if name.startswith(f"{arch}-")]
        finished = [folder for folder in folders if (Path(folder) / "summary.json").exists()]
        if not finished:
            continue
        text = io.StringIO()
        files = ["--csv", str(RESULTS / f"spiking-{arch}.csv"), "--trade-off", str(RESULTS / f"spiking-{arch}.png")]
        with contextlib.redirect_stdout(text):
            distill(["compare", *finished, *files])
        parts.append(f"## {arch}\n\n```\n{text.getvalue()}```\n")
    write_atomically(RESULTS / "spiking.md", "\n".join(["# CNN, adder and spiking networks\n", *parts]).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table", "list"))
    parser.add_argument("names", nargs="*", choices=[[], *commands()], metavar="NAME")
    parser.add_argument("--runs", type=Path, default=Path("runs/spiking"))
    options = parser.parse_intermixed_args()  # names may follow --runs
    if options.task == "run":
        train(options.runs, options.names)
    elif options.task == "table":
        table(options.runs)
    else:
        for name, words in commands().items():
            print(f"python -m adderops.distill {words} --output {options.runs / name}")


if __name__ == "__main__":
    main()
