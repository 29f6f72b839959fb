"""`--method compare`: its files, its costs, and that the commands take its folder."""

import csv
import json
import math

import pytest
import torch

from adderops.distill import Config, Options, comparison, main, train
from adderops.distill.checkpoint import load_state_dict
from adderops.distill.evaluate import evaluate
from adderops.distill.runs.folder import RunFolder, compared_runs
from adderops.models import lenet5
from adderops.quant.calibration import quantized_layers
from distill.runs import assert_same_state


@pytest.fixture(scope="module")
def arguments(folder_of_bars, quick_timing) -> list[str]:
    options = "--seeds 2 --epochs 6 --batch-size 16 --lr 0.05 --threads 1 --device cpu"
    return ["--data", str(folder_of_bars), *options.split()]


@pytest.fixture(scope="module")
def compared(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison") / "run"
    assert main([*arguments, "--output", str(folder)]) == 0
    return folder


def csv_of(folder) -> dict[str, dict[str, str]]:
    with open(folder / "comparison.csv") as file:
        return {row["network"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_files_of_a_comparison(compared):
    summaries = json.loads((compared / "summary.json").read_text())
    assert [(s["seed"], s["method"]) for s in summaries] == [(0, "pkkd"), (0, "plain"), (1, "pkkd"), (1, "plain")]
    config = Config.load(compared / "config.json")
    for path, summary in zip(compared_runs(config, compared), summaries, strict=True):
        for name in ("accuracy", "loss"):
            assert (f"int8_test_{name}" in summary) == (summary["method"] == "pkkd")
            summary.pop(f"int8_test_{name}", None)
        assert json.loads((path / "summary.json").read_text()) == summary
    rows = csv_of(compared)
    assert list(rows) == ["CNN", "adder, by the labels", "adder, by PKKD", "adder, PKKD, int8"]
    accuracies = [s["student_test_accuracy"] for s in summaries if s["method"] == "plain"]
    assert float(rows["adder, by the labels"]["accuracy"]) == pytest.approx(sum(accuracies) / 2)
    assert float(rows["adder, by the labels"]["uncertainty"]) == pytest.approx(
        abs(accuracies[0] - accuracies[1]) / math.sqrt(2)
    )
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_costs_are_those_of_the_networks(compared):
    """LeNet-5-BN with four classes: 416,016 multiply-accumulates, of which 298,080 in adder layers."""
    rows = csv_of(compared)
    ends, inner = 6 * 28**2 * 25 + 84 * 4, 298_080
    expected = {
        "CNN": (ends + inner, ends + inner, 3.7, 0.9),
        "adder, by the labels": (ends, ends + 2 * inner, 3.7, 0.9),
        "adder, by PKKD": (ends, ends + 2 * inner, 3.7, 0.9),
        "adder, PKKD, int8": (ends, ends + 2 * inner, 0.2, 0.03),
    }
    for label, (multiplications, additions, a_product, a_sum) in expected.items():
        row = rows[label]
        assert (int(row["multiplications"]), int(row["additions"])) == (multiplications, additions)
        assert float(row["picojoules"]) == pytest.approx(multiplications * a_product + additions * a_sum)
        assert float(row["images_per_second"]) > 0
    state = lenet5("adder", num_classes=4).state_dict()
    assert int(rows["adder, by PKKD"]["bytes"]) == sum(t.numel() * t.element_size() for t in state.values())
    weights = sum(t.numel() for name, t in state.items() if name.endswith("weight") and "bn" not in name)
    assert weights < int(rows["adder, PKKD, int8"]["bytes"]) < 1.1 * weights


@pytest.mark.slow
def test_int8_is_the_distilled_student_with_all_layers_in_8_bits(compared, data, monkeypatch):
    converted = []
    monkeypatch.setattr(comparison, "convert", lambda network, example: converted.append(network) or network)
    in_floats = comparison._in_int8(RunFolder.load(compared / "seed1" / "pkkd"), data)
    assert len(quantized_layers(converted[0])) == 5 and not in_floats.training
    [summary] = [s for s in json.loads((compared / "summary.json").read_text()) if "int8_test_accuracy" in s][1:]
    tested = evaluate({"it": in_floats}, data.test, torch.device("cpu"))["it_test_accuracy"]
    assert summary["seed"] == 1 and summary["int8_test_accuracy"] == pytest.approx(tested, abs=1 / len(data.test))


@pytest.mark.slow
def test_interrupted_and_continued_it_ends_with_the_same_bits(compared, arguments, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def interrupted(config, *rest):
        if (config.seed, config.method) == (1, "pkkd"):
            raise KeyboardInterrupt
        return train(config, *rest)

    monkeypatch.setattr(comparison, "train", interrupted)
    assert main([*arguments, "--output", str(run)]) == 130
    assert f"continue with --resume {run}" in capsys.readouterr().err
    assert not (run / "summary.json").exists()
    monkeypatch.setattr(comparison, "train", train)
    assert main(["--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "seeds 0 to 1" in printed and f"figure: {run / 'comparison.png'}" in printed
    for path in compared_runs(Config.load(run / "config.json"), run):
        other = compared / path.relative_to(run)
        assert_same_state(*(dict(load_state_dict(folder / "student.pt")) for folder in (path, other)))
    assert [row["accuracy"] for row in csv_of(run).values()] == [row["accuracy"] for row in csv_of(compared).values()]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval", "report", "export --format state_dict", "quantize"])
def test_commands_take_the_first_run_by_pkkd(compared, command, capsys):
    name, *options = command.split()
    assert main([name, str(compared), *options]) == 0
    printed = capsys.readouterr().out
    expected = "pkkd, seed 0" if name != "report" else str(compared / "seed0" / "pkkd" / "report")
    assert expected in printed


@pytest.mark.slow
def test_compare_lists_all_runs(compared, capsys):
    assert main(["compare", str(compared)]) == 0
    printed = capsys.readouterr().out
    for path in compared_runs(Config.load(compared / "config.json"), compared):
        assert str(path) in printed
    assert "mean" in printed.splitlines()[-4]


@pytest.mark.slow
def test_one_seed_has_no_folders_of_seeds(arguments, tmp_path, capsys):
    assert main([*arguments, "--epochs", "1", "--seeds", "1", "--output", str(tmp_path / "run")]) == 0
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} == {"pkkd", "plain"}
    assert "seed 0" in capsys.readouterr().out


@pytest.mark.slow
def test_what_cannot_be_made_int8_loses_no_table(arguments, tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise ValueError("no such layer")

    monkeypatch.setattr(comparison, "calibrate", refuse)
    assert main([*arguments, "--epochs", "1", "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "no int8: no such layer" in printed and "PKKD - CNN" in printed and "int8 -" not in printed


def test_without_a_teacher_there_is_nothing_to_compare(arguments, tmp_path, capsys):
    assert main([*arguments, "--teacher", "none", "--output", str(tmp_path / "run")]) == 2
    assert "teacher: expected progressive or frozen for the method compare, got none" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_seeds_are_for_comparisons():
    with pytest.raises(ValueError, match="seeds: expected none for the method pkkd, got 3"):
        Options(method="pkkd", seeds=3)


def test_only_the_default_has_few_images_and_several_seeds():
    default = Options().resolve()
    assert (default.data, default.train_images, default.validation, default.seeds) == ("digits", 100, 1000, 5)
    for given in ({"data": "digits"}, {"arch": "resnet20"}, {"data": "fashion-mnist"}):
        chosen = Options(**given).resolve()
        assert (chosen.train_images, chosen.validation, chosen.augment, chosen.seeds) == (None, 0, None, 1)
    assert Options(method="cnn").resolve().seeds is None
