"""Accuracy of int8 networks, bits x method, for the student of each run; table and plot.

    python experiments/int8_accuracy.py run RUN... --runs FOLDER     the missing rows (minutes per run)
    python experiments/int8_accuracy.py tables                       results/int8_accuracy.{md,png} from its .csv

shared, redistribution     post-training: `adderops.quant.Scheme`, 2000 training images, BatchNorm re-estimated
+ 4 groups                 redistribution with 4 grids per layer
tuned                      redistribution, then 5 epochs of fine-tuning at these bits, learning rate from 0.01 to 0

Accuracies are those of the int8 network on the test images.  Columns of results/int8_accuracy.csv: dataset, network,
seed, bits, method, test_accuracy, float_accuracy (of the float32 network), command.
"""

import argparse
import contextlib
import copy
import csv
import io
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from adderops.atomic import write_atomically
from adderops.distill.build import load_data_of
from adderops.distill.data import calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.runs.folder import RunFolder
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

RESULTS = Path(__file__).parent / "results" / "int8_accuracy"
COLUMNS = "dataset network seed bits method test_accuracy float_accuracy command".split()
BITS = (8, 6, 5, 4)
METHODS = ("shared", "redistribution", "+ 4 groups", "tuned")
TUNING = ["--epochs", "5", "--lr", "0.01"]


def read_rows() -> list[dict[str, str]]:
    path = RESULTS.with_suffix(".csv")
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def add_row(row: dict[str, object]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(), row])
    write_atomically(RESULTS.with_suffix(".csv"), text.getvalue().encode())


def accuracy(network: torch.nn.Module, data) -> float:
    return evaluate({"it": network}, data.test, torch.device("cpu"))["it_test_accuracy"]


def scheme_of(method: str, bits: int) -> Scheme:
    if method == "shared":
        return Scheme(bits, "shared")
    return Scheme(bits, filter_groups=4 if method == "+ 4 groups" else 1)


def tuned(run: RunFolder, bits: int, folder: Path, threads: int) -> tuple[torch.nn.Module, str]:
    """The student after fine-tuning in its own run folder, and the command."""
    config, initial = run.config, (run.path / "student.pt").resolve()
    options = ["--data", config.data, "--root", config.root, "--arch", config.arch, "--method", "plain", *TUNING]
    options += ["--initial", str(initial), "--bits", str(bits), "--seed", str(config.seed)]
    options += ["--threads", str(threads)] + ["--channels-last"] * config.channels_last
    where = ["--resume", str(folder)] if (folder / "log.csv").exists() else [*options, "--output", str(folder)]
    with open(folder.with_suffix(".log"), "a") as log:
        subprocess.run([sys.executable, "-m", "adderops.distill", *where], check=True, stdout=log, stderr=log)
    shown = [word if word != str(initial) else "RUN/student.pt" for word in options]
    return RunFolder.load(folder).network("student"), " ".join(["python -m adderops.distill", *shown])


def make(path: Path, folder: Path, threads: int) -> None:
    """Adds the missing rows of one run."""
    run = RunFolder.load(path)
    torch.set_num_threads(threads)
    data, student = load_data_of(run.config), run.network("student")
    batches = list(calibration_batches(data.train))
    name = {"dataset": data.name, "network": run.config.arch, "seed": run.config.seed}
    before = accuracy(student, data)
    for bits in BITS:
        for method in METHODS:
            key = name | {"bits": bits, "method": method}
            if any(all(row[k] == str(v) for k, v in key.items()) for row in read_rows()):
                continue
            if method == "tuned":
                tuning = folder / f"{run.config.arch}-{run.config.seed}-{bits}"
                rounded, command = tuned(run, bits, tuning, threads)
            else:
                scheme = scheme_of(method, bits)
                rounded = reestimate_batchnorm(calibrate(copy.deepcopy(student), batches, scheme), batches).eval()
                command = f"python -m adderops.distill quantize RUN --bits {bits} --method {scheme.method}"
                command += f" --filter-groups {scheme.filter_groups}" * (scheme.filter_groups > 1)
            after = accuracy(convert(rounded, batches[0]), data)
            add_row(key | {"test_accuracy": after, "float_accuracy": before, "command": command})
            print(
                f"{run.title}: {bits} bits, {method}: {100 * after:.2f} % ({100 * (after - before):+.2f})", flush=True
            )


def tables() -> str:
    rows, parts = read_rows(), []
    for network in dict.fromkeys((row["network"], row["dataset"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["dataset"]) == network]
        floats = {row["seed"]: float(row["float_accuracy"]) for row in mine}
        parts.append(
            f"**{network[0]}, {network[1]}**: points of test accuracy over the same networks in float32 "
            f"({100 * statistics.mean(floats.values()):.2f} %, {len(floats)} seeds), mean and deviation over seeds.\n"
        )
        parts.append("| bits | " + " | ".join(METHODS) + " |\n|---|" + "---|" * len(METHODS))
        for bits in BITS:
            cells = []
            for method in METHODS:
                lost = _differences(mine, bits, method)
                deviation = f" ± {statistics.stdev(lost):.2f}" if len(lost) > 1 else ""
                cells.append(f"{statistics.mean(lost):+.2f}{deviation}" if lost else "")
            parts.append(f"| {bits} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def _differences(rows: list[dict[str, str]], bits: int, method: str) -> list[float]:
    chosen = [row for row in rows if (row["bits"], row["method"]) == (str(bits), method)]
    return [100 * (float(row["test_accuracy"]) - float(row["float_accuracy"])) for row in chosen]


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read_rows()
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(5 * len(networks), 3.6), squeeze=False, layout="constrained"
    )
    for axis, network in zip(axes[0], networks, strict=True):
        for method in METHODS:
            mine = [row for row in rows if row["network"] == network]
            points = [(bits, _differences(mine, bits, method)) for bits in BITS]
            points = [(bits, statistics.mean(lost)) for bits, lost in points if lost]
            axis.plot(*zip(*points, strict=True), marker="o", label=method)
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_xticks(BITS)
        axis.invert_xaxis()
        axis.set_title(f"{network}: points of accuracy over float32", fontsize=9)
        axis.set_xlabel("bits")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="add the missing rows")
    running.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="run folders with a student")
    running.add_argument("--runs", type=Path, default=Path("runs/int8"), help="folder for fine-tuning (%(default)s)")
    running.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    commands.add_parser("tables", help="results/int8_accuracy.md and .png from results/int8_accuracy.csv")
    options = parser.parse_args()
    if options.command == "run":
        options.runs.mkdir(parents=True, exist_ok=True)
        for folder in options.folders:
            make(folder, options.runs, options.threads)
        return
    with contextlib.suppress(ModuleNotFoundError):
        plot(RESULTS.with_suffix(".png"))
    write_atomically(RESULTS.with_suffix(".md"), (text := tables()).encode())
    print(text)


if __name__ == "__main__":
    main()
