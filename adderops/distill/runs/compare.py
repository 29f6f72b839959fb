"""`compare RUN RUN ...`: a table of several runs, the costs of their networks, statistics over seeds, and curves."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adderops.atomic import write_atomically
from adderops.distill.checkpoint import write_csv
from adderops.distill.config import Config
from adderops.distill.methods.task import COMPARE
from adderops.distill.options import option
from adderops.distill.runs.command import CommandOptions, run_folder
from adderops.distill.runs.folder import COMPARED, RunFolder, compared_runs, differing_options
from adderops.distill.runs.paired import compare_groups, group_rows
from adderops.distill.runs.tables import outcome, percent, shown, text_table

MEANS = """\
finished runs, last epoch: mean and standard deviation over the seeds; mean difference from the first line,
paired by seed, with its 95 % confidence interval (Student's t)"""


@dataclass(frozen=True)
class Options(CommandOptions):
    folders: tuple[Path, ...] = run_folder("run folders, or those of --method compare", nargs="+")
    plot: Path | None = option(None, "draw the curves of the test accuracy", type=Path, metavar="FILE.png")
    costs: bool | None = option(
        None,
        "count operations per image, and time the networks (default: if all runs are finished, on the same images)",
        type=bool,
    )
    trade_off: Path | None = option(
        None, "draw the accuracy over the energy of the operations", type=Path, metavar="FILE.png"
    )
    csv: Path | None = option(None, "write the table of runs, with all options", type=Path, metavar="FILE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trade_off is not None and self.costs is False:
            raise ValueError("--trade-off: expected --costs with it, got --no-costs, so it has no points")


def run(options: Options) -> None:
    folders = [folder for given in options.folders for folder in _run_folders(given)]
    twice = sorted(str(f) for f, n in Counter(folder.resolve() for folder in folders).items() if n > 1)
    if twice:
        raise ValueError(f"RUN: expected each run once, got {', '.join(twice)} twice")
    runs = [RunFolder.load(folder) for folder in folders]
    rows = [row for run in runs for row in run.results()]
    differing = differing_options([run.config for run in runs])
    by = ["method", *(name for name in differing if name not in ("method", "seed")), "network"]
    print(_runs_table(runs, rows, by), flush=True)
    if options.csv:
        write_csv(options.csv, rows)
    if options.plot:
        from adderops.distill.runs.figures import draw_comparison, png  # needs matplotlib

        write_atomically(options.plot, png(draw_comparison(runs, by)))
    if options.costs is not False:
        _print_costs(options, runs, by[:-1])
    finished = [row for row in rows if row["finished"]]
    if any(len(group) > 1 for group in group_rows(finished, by).values()):
        print(f"\n{MEANS}\n\n{_seeds_table(finished, by)}")


def _print_costs(options: Options, runs: list[RunFolder], by: list[str]) -> None:
    """Prints the costs of the networks; by default only if that needs nothing that the other tables do not need."""
    from adderops.distill.runs.costs import cost_rows, costs_table, why_not

    wanted = options.costs or options.trade_off is not None
    if reason := why_not(runs):
        if wanted:
            raise ValueError(reason)
        return
    torch.set_num_threads(runs[0].config.threads)
    try:
        data = runs[0].load_data()
        costs, notes = cost_rows(runs, data, by)
    except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
        if wanted:
            raise
        print(f"\nno costs: {error}")
        return
    print(f"\n{costs_table(costs, notes, data, runs[0].tested_on)}")
    if options.trade_off is not None:
        from adderops.distill.runs.figures import draw_trade_off, png  # needs matplotlib

        write_atomically(options.trade_off, png(draw_trade_off(costs)))


def _run_folders(folder: Path) -> list[Path]:
    """Returns the folder itself or, for one of --method compare, the run folders in it that have an epoch."""
    config = Config.load(folder / "config.json") if (folder / "config.json").is_file() else None
    if config is None or config.method != COMPARE:
        return [folder]
    found = [run for run in compared_runs(config, folder) if (run / "log.csv").is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: expected run folders {' and '.join(COMPARED)}, got none with an epoch done")
    return found


def _runs_table(runs: list[RunFolder], rows: list[dict[str, Any]], by: list[str]) -> str:
    """Returns one row per run and network, under a title that says what all have in common."""
    seeds = ["seed"] if len({row["seed"] for row in rows}) > 1 else []
    common = [str(rows[0][name]) for name in ("data", "arch") if name not in by]
    title = ", ".join([*common, f"{' or '.join(sorted({run.tested_on for run in runs}))} accuracy in %"])
    table = [
        {"run": row["run"]}
        | {name: shown(row[name]) for name in [*by, *seeds] if name != "epochs"}
        | {"epochs": f"{row['epochs_done']}" + ("" if row["finished"] else f"/{row['epochs']}")}
        | outcome(row)
        for row in rows
    ]
    return f"{title}\n\n{text_table(table)}"


def _seeds_table(rows: list[dict[str, Any]], by: list[str]) -> str:
    """Returns one row per group of runs that differ in the seed alone."""
    table = []
    for i, group in enumerate(compare_groups(rows, by, "test_accuracy")):
        low, high = (percent(group[name], signed=True) for name in ("low", "high"))
        table.append(
            {name: shown(group[name]) for name in by}
            | {
                "n": str(group["n"]),
                "mean": percent(group["mean"]),
                "deviation": percent(group["deviation"]),
                "pairs": str(group["pairs"]) if i else "-",
                "difference": percent(group["difference"], signed=True),
                "interval": "-" if group["low"] is None else f"{low} to {high}",
            }
        )
    return text_table(table)
