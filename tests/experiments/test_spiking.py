"""experiments/spiking.py: its commands are valid, and it trains, converts and tabulates what is missing."""

import importlib.util
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from distill.runs import write_bars

from adderops.distill import Options
from adderops.distill.command_line import training_parser

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def experiment() -> ModuleType:
    """The script, whatever else is called spiking."""
    spec = importlib.util.spec_from_file_location("experiments_spiking", EXPERIMENTS / "spiking.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_are_options_of_the_trainer(experiment):
    parser = training_parser()
    for name, run in experiment.runs_by_name().items():
        config = Options(**vars(parser.parse_args(shlex.split(run.options)))).resolve()
        assert run.method == config.method
        assert name.startswith(f"{run.table}-{run.method}") and run.table.split("-")[0] == config.arch


@pytest.mark.slow
def test_trains_converts_and_tabulates_once(experiment, monkeypatch, tmp_path, capfd):
    data, runs = tmp_path / "bars", tmp_path / "runs"
    data.mkdir()
    write_bars(data)
    monkeypatch.setattr(experiment, "TABLES", {"lenet5": experiment.Table(1, 1, 4, conversion="--images 16", seeds=2)})
    monkeypatch.setattr(experiment, "DATA", f"--data {data}")
    monkeypatch.setattr(experiment, "SPIKING", {"dsr": "--batch-size 16"})
    monkeypatch.setattr(experiment, "OTHERS", {})
    monkeypatch.setattr(experiment, "STEPS", (2,))
    monkeypatch.setattr(experiment, "RESULTS", tmp_path)

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["spiking.py", *words, "--runs", str(runs)])
        experiment.main()
        return capfd.readouterr().out

    assert "exit status" not in call("run", "lenet5-cnn", "lenet5-dsr", "lenet5-dsr-1")
    assert {path.name for path in runs.iterdir()} == {"lenet5-cnn", "lenet5-dsr", "lenet5-dsr-1"}
    assert call("run", "lenet5-cnn", "lenet5-dsr", "lenet5-dsr-1") == ""
    call("table")
    found = (tmp_path / "spiking-lenet5.md").read_text()
    assert all(name in found for name in ("CNN, int8", "spiking, 2 steps, advanced", "spiking, by DSR"))
    assert (tmp_path / "spiking-lenet5.csv").exists() and (tmp_path / "spiking-lenet5.png").exists()
