"""Turns finished run folders of `python -m adderops.distill` into rows of results/pkkd.csv.

    python benchmarks/collect_runs.py EXPERIMENT RUN [RUN ...] >> benchmarks/results/pkkd.csv

One row a run: the network the method is about (the student of pkkd and plain, the CNN of cnn), accuracies of the last
epoch as fractions.  The first line of an empty file is the header, printed with --header.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

COLUMNS = "experiment,dataset,network,method,seed,epochs,train_images,test_accuracy,train_accuracy,hours,command".split(
    ","
)


def row_of(experiment: str, run: Path) -> dict[str, object]:
    """Returns the row of a run; raises FileNotFoundError where it has not finished."""
    summary = json.loads((run / "summary.json").read_text())
    role = "teacher" if summary["method"] == "cnn" else "student"
    accuracies = {f"{part}_accuracy": summary[f"{role}_{part}_accuracy"] for part in ("test", "train")}
    return {name: ({"experiment": experiment} | summary | accuracies)[name] for name in COLUMNS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="name of what the runs are compared for")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a summary.json")
    parser.add_argument("--header", action="store_true", help="print the header first")
    options = parser.parse_args()
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    if options.header:
        writer.writeheader()
    writer.writerows(row_of(options.experiment, run) for run in options.runs)


if __name__ == "__main__":
    main()
