"""Accuracy of small networks at the cost of running them on a microcontroller: CNN and adder network, several widths.

    python experiments/edge_accuracy.py run --runs FOLDER      the missing rows, with the runs that they need (hours)
    python experiments/edge_accuracy.py run resnet8 --seeds 0 --epochs 20      of some networks and seeds, longer
    python experiments/edge_accuracy.py costs                  results/edge_costs.csv, see edge_costs.py (minutes)
    python experiments/edge_accuracy.py tables                 results/edge_accuracy.{md,png} from its .csv

Fashion-MNIST, all training images; accuracies are those on the 10,000 test images.  Two runs of
`python -m adderops.distill` per network and seed make three rows:

    cnn                the CNN by the labels: the teacher of the next row, which never affects it
    adder, distilled   the adder network by the labels and the logits of that CNN (`--features none`)
    adder, labels      the adder network by the labels alone, a run of its own

A row is added as soon as its run ends, and a run that has its rows is not repeated; a stopped run resumes.  Several
processes may work on one folder: each run has a lock file.  Columns of results/edge_accuracy.csv:

    dataset, network, kind, seed, epochs
    float_accuracy     in float32
    int8_accuracy      cnn: onnxruntime's static quantization (QDQ, 8-bit weights with one scale per filter), executed
                       operator by operator, so that no processor's saturating instruction changes it; adder:
                       `calibrate` with Scheme(ends="int8"), `reestimate_batchnorm`, `convert`; the same 2000 training
                       images for both
    seconds            of the training of the run, on a machine with other load; the first two kinds share a run
    command            repeats the run
"""

import argparse
import copy
import csv
import fcntl
import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import edge_tables
import torch
from torch import Tensor, nn

from adderops.atomic import write_atomically
from adderops.distill.data import Data, ImageSet, calibration_batches
from adderops.distill.evaluate import evaluate
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.onnxruntime_int8 import OnnxNetwork, quantize_cnn
from adderops.quant import IntegerNetwork, Scheme, calibrate, convert, reestimate_batchnorm

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/edge")
NAME = "edge_accuracy"
COLUMNS = "dataset network kind seed epochs float_accuracy int8_accuracy seconds command".split()
COMMON = "--data fashion-mnist --augment none --batch-size 32 --lr 0.05 --lr-per-step --channels-last"
EPOCHS = 15
METHODS = {"distilled": "--method pkkd --features none", "labels": "--method plain"}
KINDS = {  # kind: method of its run, role there
    "cnn": ("distilled", "teacher"),
    "adder, distilled": ("distilled", "student"),
    "adder, labels": ("labels", "student"),
}
# In this order: comparisons of CNN and adder network become complete one after the other.
QUEUE = [
    *(("resnet8", method) for method in METHODS),
    *((network, "distilled") for network in ("resnet8_x0_5", "ds_cnn", "ds_cnn_x0_5", "resnet8_x1_5")),
    ("ds_cnn", "labels"),
    ("ds_cnn_x1_5", "distilled"),
    *((network, "labels") for network in ("resnet8_x0_5", "ds_cnn_x0_5")),
    *((network, "distilled") for network in ("ds_cnn_x2_0", "resnet8_x2_0")),
    *((network, "labels") for network in ("resnet8_x1_5", "ds_cnn_x1_5", "ds_cnn_x2_0", "resnet8_x2_0")),
]
NETWORKS = tuple(dict.fromkeys(network for network, _ in QUEUE))
SEEDS = (0, 1, 2)


# --- rows ---


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def key_of(row: dict[str, object]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in ("network", "kind", "seed", "epochs"))


def add_rows(rows: list[dict[str, object]], path: Path) -> None:
    """Adds the rows that the file lacks; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        present = read_rows(path)
        keys = {key_of(row) for row in present}
        new = [row for row in rows if key_of(row) not in keys]
        write_atomically(path, csv_text([*present, *new], COLUMNS).encode())


def csv_text(rows: Sequence[dict[str, object]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# --- the int8 networks ---


def integer_network(student: nn.Module, batches: list[Tensor]) -> IntegerNetwork:
    """The int8 network of a trained adder network, first convolution and classifier included."""
    rounded = calibrate(copy.deepcopy(student), batches, Scheme(ends="int8"))
    return convert(reestimate_batchnorm(rounded, batches).eval(), batches[0])


def onnxruntime_accuracy(cnn: nn.Module, batches: list[Tensor], test: ImageSet) -> float:
    """Accuracy of a CNN after onnxruntime's static quantization, calibrated on the batches."""
    return accuracy(OnnxNetwork(quantize_cnn(cnn.eval(), batches), optimized=False), test)


def accuracy(network: nn.Module, test: ImageSet) -> float:
    return evaluate({"it": network}, test, torch.device("cpu"))["it_test_accuracy"]


# --- runs ---


def train(network: str, method: str, seed: int, epochs: int, folder: Path) -> None:
    """Makes a run, or the rest of it."""
    options = f"{COMMON} --arch {network} {METHODS[method]} --epochs {epochs} --seed {seed} --threads 1"
    started = (folder / "config.json").exists()
    where = ["--resume", str(folder)] if started else [*shlex.split(options), "--output", str(folder)]
    with open(folder.with_suffix(".log"), "a") as log:
        command = [sys.executable, "-m", "adderops.distill", *where]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=environment)


def rows_of_run(method: str, folder: Path, data: Data) -> list[dict[str, object]]:
    """The rows of a finished run."""
    run = RunFolder.load(folder)
    summary = json.loads((folder / "summary.json").read_text())
    batches, rows = list(calibration_batches(data.train)), []
    for kind, (of_method, role) in KINDS.items():
        if of_method != method:
            continue
        trained = run.network(role).eval()
        if kind == "cnn":
            in_int8 = onnxruntime_accuracy(trained, batches, data.test)
        else:
            in_int8 = accuracy(integer_network(trained, batches), data.test)
        row = {"dataset": data.name, "network": run.config.arch, "kind": kind, "seed": run.config.seed}
        row |= {"epochs": run.config.epochs, "float_accuracy": accuracy(trained, data.test), "int8_accuracy": in_int8}
        command = summary["command"].replace(f"{folder.parent}/", f"{RUNS}/")
        rows.append(row | {"seconds": round(sum(run.curve("seconds"))), "command": command})
    return rows


def run(networks: Sequence[str], seeds: Sequence[int], epochs: int, runs: Path, path: Path) -> None:
    """Adds the missing rows in the order of the queue; a run that another process makes is left to it."""
    runs.mkdir(parents=True, exist_ok=True)
    data = None
    for network, method in QUEUE:
        for seed in seeds if network in networks else ():
            wanted = {
                (network, kind, str(seed), str(epochs)) for kind, (of_method, _) in KINDS.items() if of_method == method
            }
            if wanted <= {key_of(row) for row in read_rows(path)}:
                continue
            folder = runs / f"{network}-{method}-{epochs}-{seed}"
            with open(folder.with_suffix(".lock"), "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if not (folder / "summary.json").exists():
                    train(network, method, seed, epochs, folder)
                data = data or RunFolder.load(folder).load_data()
                rows = rows_of_run(method, folder, data)
                add_rows(rows, path)
            for row in rows:
                shares = " ".join(f"{100 * float(row[c]):.2f}" for c in ("float_accuracy", "int8_accuracy"))
                print(f"{network}, {row['kind']}, seed {seed}: {shares} (float32, int8)", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="add the missing rows")
    running.add_argument("--runs", type=Path, default=RUNS, help="folder of the run folders (default: %(default)s)")
    running.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    running.add_argument("--epochs", type=int, default=EPOCHS, help="of training (default: %(default)s)")
    counting = commands.add_parser("costs", help="results/edge_costs.csv: size and modelled cycles (minutes)")
    making = commands.add_parser("tables", help=f"results/{NAME}.md and .png from results/{NAME}.csv")
    for command in (running, counting):
        command.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: {', '.join(NETWORKS)}")
    for command in (running, counting, making):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
    options = parser.parse_args(argv)
    path = options.results / f"{NAME}.csv"
    unknown = set(getattr(options, "networks", ())) - set(NETWORKS)
    if unknown:
        parser.error(f"NETWORK: expected some of {', '.join(NETWORKS)}, got {', '.join(sorted(unknown))}")
    if options.command == "run":
        torch.set_num_threads(1)
        run(options.networks or NETWORKS, options.seeds, options.epochs, options.runs.resolve(), path)
        return
    if options.command == "costs":
        import edge_costs  # needs a cross compiler and an emulator

        file = options.results / "edge_costs.csv"
        for network in options.networks or NETWORKS:
            kept = [row for row in read_rows(file) if row["network"] != network]
            rows = [*kept, *edge_costs.costs_of(network)]
            write_atomically(file, csv_text(rows, edge_costs.COLUMNS).encode())
        return
    rows, costs = read_rows(path), read_rows(options.results / "edge_costs.csv")
    text = edge_tables.page(rows, costs)
    write_atomically(path.with_suffix(".md"), text.encode())
    edge_tables.plot(edge_tables.plotted(rows), costs, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
