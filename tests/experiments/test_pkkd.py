"""experiments/pkkd.py makes each run once, goes on where one was stopped, and its tables are those of its rows."""

import csv
from pathlib import Path

import pytest
import torch
from distill.runs import write_bars

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def pkkd(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import pkkd

    return pkkd


@pytest.fixture
def small(pkkd, monkeypatch, tmp_path):
    """One experiment of the same form as the real ones, seconds long."""
    (tmp_path / "bars").mkdir()
    write_bars(tmp_path / "bars")
    experiment = pkkd.Experiment(
        "bars",
        f"--data {tmp_path / 'bars'} --epochs 1 --batch-size 32",
        {
            "plain": "--method plain",
            "two words": "--method pkkd --features none",
            "frozen": "--method pkkd --teacher frozen",
        },
        seeds=(0,),
        teacher_of="two words",
    )
    monkeypatch.setattr(pkkd, "EXPERIMENTS", {"small": experiment})
    return tmp_path


def rows_in(folder: Path) -> list[dict[str, str]]:
    with open(folder / "pkkd.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_runs_rows_tables(pkkd, small, capsys):
    command = ["run", "small", "--runs", str(small / "runs"), "--results", str(small / "results")]
    pkkd.main([*command, "--only", "plain", "two words"])
    pkkd.main(command)  # what is missing
    rows = rows_in(small / "results")
    assert [r["method"] for r in rows] == ["plain", "two words", "cnn", "frozen"]
    assert list(rows[0]) == pkkd.COLUMNS and all(0 <= float(r["test_accuracy"]) <= 1 for r in rows)

    # the frozen teacher is that of the run of the same seed, and its row names it independently of this machine
    folder = small / "runs" / "small"
    teachers = [torch.load(folder / name / "teacher.pt") for name in ("two-words-0", "frozen-0")]
    assert all(torch.equal(a, b) for a, b in zip(*(t.values() for t in teachers), strict=True))
    assert "--teacher-checkpoint runs/pkkd/small/two-words-0/teacher.pt" in rows[3]["command"]

    capsys.readouterr()
    pkkd.main(["tables", "--results", str(small / "results")])
    printed = capsys.readouterr().out
    assert printed.strip() == (small / "results" / "pkkd.md").read_text().strip()
    for row in rows:
        difference = 100 * (float(row["test_accuracy"]) - float(rows[0]["test_accuracy"]))
        shown = f"{difference:+.2f}" if row["method"] != "plain" else ""
        accuracies = [f"{100 * float(row[c]):.2f}" for c in ("test_accuracy", "train_accuracy")]
        assert f"| {row['method']} | 1 | {accuracies[0]} | {shown} | {accuracies[1]} |" in printed
    assert (small / "results" / "pkkd.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_finished_one_gets_its_row(pkkd, small, monkeypatch):
    command = ["run", "small", "--runs", str(small / "runs"), "--results", str(small / "results"), "--only", "plain"]
    pkkd.main(command)
    (row,) = rows_in(small / "results")
    log = (small / "runs" / "small" / "plain-0" / "log.csv").read_bytes()
    (small / "results" / "pkkd.csv").unlink()
    pkkd.main(command)
    assert rows_in(small / "results") == [row]
    assert (small / "runs" / "small" / "plain-0" / "log.csv").read_bytes() == log  # not trained again


def test_contrasts_are_those_of_the_means(pkkd):
    accuracies = {"a": (0.5, 0.6, 0.7), "b": (0.7, 0.6, 0.9), "c": (0.5, 0.55, 0.7), "d": (0.1,)}
    rows = [
        {"method": method, "seed": str(seed), "test_accuracy": str(value)}
        for method, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    experiment = pkkd.Experiment("?", "", {}, (0, 1, 2), contrasts={"ab over c": (["a", "b"], ["c"])})
    *_, line = pkkd.contrast_lines(experiment, rows)
    # the differences are .1, .05 and .1: a mean of .08333, a deviation of .02887, t(.975, 2) = 4.3027
    assert line == "| ab over c | 3 | +8.33 (+1.16 to +15.50) |"
    experiment = pkkd.Experiment("?", "", {}, (0, 1, 2), contrasts={"one seed": (["a", "d"], ["c"])})
    assert pkkd.contrast_lines(experiment, rows) == []  # no interval of one pair


def test_the_contrasts_of_the_ablation_have_every_cell(pkkd):
    for name, (ours, others) in pkkd.EXPERIMENTS["ablation"].contrasts.items():
        assert len(ours) == 4 and (others == ["plain"] or sorted(ours + others) == sorted(pkkd._CELLS)), name


def test_an_unknown_method_is_refused(pkkd, small, capsys):
    with pytest.raises(SystemExit):
        pkkd.main(["run", "small", "--only", "nothing"])
    assert "--only: expected some of plain, two words, frozen, got nothing" in capsys.readouterr().err


def test_every_experiment_is_one_that_the_trainer_takes(pkkd, tmp_path):
    from adderops.distill.command_line import training_parser

    for experiment in pkkd.EXPERIMENTS.values():
        for method in experiment.methods:
            training_parser().parse_args(experiment.options(method, 0, tmp_path))
