"""`compare`: the costs of networks of any kind; `quantize` of a CNN; spikes in the report."""

import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from adderops.distill import Options, load_data, main, train
from adderops.distill.checkpoint import write_json
from adderops.distill.evaluate import evaluate
from adderops.distill.runs import costs
from adderops.distill.runs.costs import cost_rows, faster_batch, networks_of, why_not
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.onnxruntime_int8 import OnnxNetwork
from adderops.distill.runs.results import standard_error
from adderops.operations import count_spiking_operations, energy
from distill.runs import error_of, written_run

pytestmark = pytest.mark.usefixtures("one_thread", "quick_timing")

ENDS, INNER = 6 * 28**2 * 25 + 84 * 4, 298_080  # multiply-accumulates of LeNet-5-BN with four classes
CNN, ADDER, INT8 = "CNN", "adder, by PKKD", "adder, by PKKD, int8"


@pytest.fixture(scope="module")
def spiking(folder_of_bars, tmp_path_factory) -> list[RunFolder]:
    """Two seeds of a spiking network."""
    data, folder, found = load_data(str(folder_of_bars)), tmp_path_factory.mktemp("spiking"), []
    for seed in (0, 1):
        options = Options(
            data=str(folder_of_bars), method="dsr", steps=2, epochs=1, batch_size=16, seed=seed, threads=1
        )
        train(options, data, folder / f"seed{seed}")
        found.append(RunFolder.load(folder / f"seed{seed}"))
    return found


@pytest.fixture(scope="module")
def quantized(runs, tmp_path_factory) -> Path:
    """A run of pkkd with both networks in int8."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = Path(shutil.copytree(runs["pkkd"].path, tmp_path_factory.mktemp("quantized") / "pkkd"))
    assert main(["quantize", str(folder), "--batch-size", "4", "--ends", "int8"]) == 0
    assert main(["quantize", str(folder), "--batch-size", "4", "--weights", "teacher"]) == 0
    return folder


def table_of(text: str) -> dict[str, list[str]]:
    """network -> cells of the table of costs"""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match("network +accuracy, % +mult.", line))
    rows = (re.split("  +", line) for line in lines[first + 1 : lines.index("", first)])
    return {name: cells for name, *cells in rows}


# --- rows ---


def test_networks_of_any_kind(quantized, spiking, tmp_path, capsys):
    plot = tmp_path / "energy.png"
    runs = [RunFolder.load(quantized), *spiking]
    assert main(["compare", *(str(run.path) for run in runs), "--trade-off", str(plot)]) == 0
    text = capsys.readouterr().out
    table = table_of(text)
    assert list(table) == [CNN, "CNN, int8", ADDER, INT8, "spiking, by DSR, 2 steps"]
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and "means over 40 test images" in text
    assert text.index("accuracy, %") < text.index("Student's t")  # the statistics stay last
    last = RunFolder.load(quantized).rows[-1]
    for label, name in ((CNN, "teacher"), (ADDER, "student")):
        assert float(table[label][0].split(" +-")[0]) == pytest.approx(100 * last[f"{name}_test_accuracy"], abs=0.006)
    both, adds = ENDS + INNER, ENDS + 2 * INNER
    for label, multiplications, additions, pj in (
        (CNN, both, both, both * 4.6),
        ("CNN, int8", both, both, both * 0.23),
        (ADDER, ENDS, adds, ENDS * 3.7 + adds * 0.9),
        (INT8, ENDS, adds, ENDS * 0.2 + adds * 0.03),
    ):
        in_int8 = multiplications * 0.2 + additions * 0.03
        expected = [f"{n / 1e6:.3g}" for n in (multiplications, additions, pj, in_int8)]
        assert table[label][1:5] == expected and float(table[label][5]) > 0
        assert table[label][6] == f"{sum(p.numel() for p in runs[0].network('student').parameters()):,}"


def test_spikes_are_counted_and_seeds_share_a_row(spiking, data):
    rows, notes = cost_rows(spiking, data, ["method"])
    [row] = rows
    [(images, _)] = data.test.batches([torch.arange(40)])
    counted = [count_spiking_operations(run.network("student"), images) for run in spiking]
    accuracies = [run.rows[-1]["student_test_accuracy"] for run in spiking]
    assert notes == [] and (row["network"], row["seeds"]) == ("spiking, by DSR, 2 steps", 2)
    assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
    assert row["uncertainty"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
    assert counted[0].additions != counted[1].additions
    assert row["additions"] == sum(one.additions for one in counted) / 2
    assert row["picojoules"] == pytest.approx(sum(map(energy, counted)) / 2)
    assert row["picojoules_in_int8"] == pytest.approx(sum(energy(one, "int8") for one in counted) / 2)


def test_only_some_images_are_counted(spiking, data, monkeypatch):
    monkeypatch.setattr(costs, "COUNTED", 3)
    [(images, _)] = data.test.batches([torch.arange(3)])
    [row], _ = cost_rows(spiking[:1], data, ["method"])
    assert row["additions"] == count_spiking_operations(spiking[0].network("student"), images).additions


@pytest.mark.parametrize("per_image", [0.01, -0.001])
def test_a_spiking_network_is_timed_with_the_faster_batch(spiking, runs, per_image):
    spiking_network, cnn = spiking[0].network("student"), runs["cnn"].network("teacher")
    images, fewer = torch.zeros(8, 1, 32, 32), 8 // 2  # of 2 steps

    def slowed(module, args):  # a time per image that grows or shrinks with the batch
        time.sleep(len(args[0]) * (0.01 + per_image * len(args[0])))

    for network in (spiking_network, cnn):
        network.register_forward_pre_hook(slowed)
    assert len(faster_batch(spiking_network, images)) == (fewer if per_image > 0 else 8)
    assert faster_batch(cnn, images) is images


def test_float_ends_of_an_int8_network_cost_what_floats_cost(runs, tmp_path):
    folder = Path(shutil.copytree(runs["plain"].path, tmp_path / "run"))
    assert main(["quantize", str(folder), "--batch-size", "4"]) == 0
    floats, rounded = networks_of(RunFolder.load(folder))
    assert rounded.label == "adder, by the labels, int8, ends in float32"
    counts = rounded.count(torch.zeros(1, 1, 32, 32))
    assert counts["picojoules"] == pytest.approx(ENDS * 4.6 + 2 * INNER * 0.03)
    assert floats.count(torch.zeros(1, 1, 32, 32))["picojoules"] == pytest.approx(ENDS * 4.6 + 2 * INNER * 0.9)


def test_a_cnn_made_spiking_has_a_row(runs, data, tmp_path):
    folder = Path(shutil.copytree(runs["cnn"].path, tmp_path / "run"))
    assert main(["spike", str(folder), "--steps", "2", "--calibrate", "none", "--images", "16"]) == 0
    cnn, spiking = networks_of(RunFolder.load(folder))
    assert (cnn.label, spiking.label) == ("CNN", "spiking, 2 steps, none")
    accuracy = evaluate({"it": spiking.network}, data.test, torch.device("cpu"))["it_test_accuracy"]
    [(images, _)] = data.test.batches([torch.arange(4)])
    assert spiking.accuracy == accuracy and spiking.count(images)["multiplications"] == ENDS


def test_a_network_tested_on_few_images_says_so(runs, data, tmp_path):
    folder = Path(shutil.copytree(runs["cnn"].path, tmp_path / "run"))
    assert main(["spike", str(folder), "--steps", "2", "--images", "16", "--test-images", "7"]) == 0
    run = RunFolder.load(folder)
    rows, _ = cost_rows([run], data, [])
    assert [row["network"] for row in rows] == ["CNN", "spiking, 2 steps, advanced, 7 images"]
    for row, images in zip(rows, (len(data.test), 7), strict=True):
        assert row["uncertainty"] == standard_error({"accuracy": row["accuracy"], "images": images})


def test_labels_of_several_runs_are_told_apart():
    keys = [("CNN", "pkkd", 0.5, 3), ("CNN", "pkkd", 0.1, 3), ("CNN", "cnn", None, 3), ("adder", "pkkd", 0.5, 3)]
    names = [costs._name(key, keys, ["method", "beta", "epochs"]) for key in keys]
    assert names == ["CNN, beta 0.5", "CNN, beta 0.1", "CNN, method cnn", "adder"]
    keys = [("CNN", "pkkd", 0.5), ("CNN", "pkkd", 0.1), ("CNN", "joint", 0.5)]  # no option is enough for the first
    names = [costs._name(key, keys, ["method", "beta"]) for key in keys]
    assert names == ["CNN, method pkkd, beta 0.5", "CNN, beta 0.1", "CNN, method joint"]


def test_conversions_are_in_the_order_of_their_steps(runs, tmp_path):
    folder = Path(shutil.copytree(runs["cnn"].path, tmp_path / "run"))
    for steps, calibration in ((10, "none"), (2, "advanced"), (2, "none")):
        words = ["--steps", str(steps), "--calibrate", calibration, "--images", "16", "--test-images", "4"]
        assert main(["spike", str(folder), *words]) == 0
    labels = [one.label.split(", ", 1)[-1] for one in networks_of(RunFolder.load(folder))]
    assert labels == ["CNN", "2 steps, none", "2 steps, advanced", "10 steps, none"]


def test_what_cannot_be_counted_has_a_note(runs, data, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(costs, "count_operations", refuse)
    assert main(["compare", str(runs["cnn"].path)]) == 0
    text = capsys.readouterr().out
    assert "CNN: not counted: no such operator" in text and table_of(text)["CNN"][1:5] == ["-"] * 4


# --- when there is a table ---


def test_without_the_same_images_there_is_a_table_on_request_only(runs, tmp_path, capsys):
    finished = runs["plain"].path
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    write_json(other / "data.json", runs["plain"].data | {"test_images": 41})
    running = written_run(tmp_path / "running", [0.5], method="plain", epochs=2)
    old = Path(shutil.copytree(finished, tmp_path / "old", ignore=shutil.ignore_patterns("data.json")))
    for run, reason in (
        (other, f"{other}: expected the images of {finished}, got others: test images 40 -> 41"),
        (running, f"{running}: expected a finished run, got one without a summary.json"),
        (old, f"{old}: expected a finished run, got one without a data.json"),
    ):
        assert why_not([RunFolder.load(finished), RunFolder.load(run)]) == reason
        assert reason in error_of(capsys, "compare", finished, run, "--costs")
        main(["compare", str(finished), str(run)])
        assert "uJ" not in capsys.readouterr().out


def test_missing_images_lose_no_other_table(runs, capsys, monkeypatch):
    def missing(self):
        raise FileNotFoundError("no images")

    monkeypatch.setattr(RunFolder, "load_data", missing)
    run = str(runs["plain"].path)
    assert main(["compare", run]) == 0
    assert capsys.readouterr().out.endswith("\n\nno costs: no images\n")
    assert "no images" in error_of(capsys, "compare", run, "--costs")


def test_no_costs(runs, tmp_path, capsys):
    run = str(runs["plain"].path)
    assert main(["compare", run, "--no-costs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    options = ["--no-costs", "--trade-off", str(tmp_path / "x.png")]
    assert "--trade-off: expected --costs with it" in error_of(capsys, "compare", run, *options)


# --- quantize ---


def test_a_cnn_in_int8(quantized, data):
    network = OnnxNetwork((quantized / "export" / "int8.onnx").read_bytes())
    accuracy = evaluate({"it": network}, data.test, torch.device("cpu"))["it_test_accuracy"]
    assert network.facts["weights"] == "teacher" and float(network.facts["test_accuracy"]) == accuracy > 0.5
    cnn = RunFolder.load(quantized).network("teacher")
    [(images, _)] = data.test.batches([torch.arange(40)])
    error = (network(images) - cnn(images)).abs().max() / cnn(images).std()
    assert 0 < error < 0.1  # rounded, without saturation
    one_by_one = OnnxNetwork((quantized / "export" / "int8.onnx").read_bytes(), optimized=False)
    torch.testing.assert_close(network(images), one_by_one(images), rtol=0, atol=0.02 * cnn(images).std().item())


@pytest.mark.parametrize(
    "option", ["--bits 8", "--method shared", "--filter-groups 2", "--no-reestimate", "--ends int8"]
)
def test_options_of_adder_networks_have_no_effect_on_a_cnn(runs, option, capsys):
    error = error_of(capsys, "quantize", runs["cnn"].path, *option.split())
    name = option.split()[0].replace("--no-", "--")
    assert f"{name}: expected none for a CNN, which onnxruntime quantizes, got" in error


def test_a_spiking_network_is_not_quantized(spiking, capsys):
    error = error_of(capsys, "quantize", spiking[0].path)
    assert "expected one with an adder network or a CNN, got the spiking student" in error


def test_without_onnxruntime_there_is_a_remedy(runs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime: pip install" in error_of(capsys, "quantize", runs["cnn"].path, "--batch-size", "4")


# --- report ---


def test_the_report_has_the_spikes_of_each_layer(spiking, data, tmp_path, capsys):
    assert main(["report", str(spiking[0].path), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    [(images, _)] = data.test.batches([torch.arange(40)])
    counted = count_spiking_operations(spiking[0].network("student"), images)
    for row in counted.layers:
        rate = f"{counted.rates[row.name]:g}" if row.name in counted.rates else "-"
        cells = (f"student {row.name}", row.layer, rate, f"{row.multiplications:,}", f"{row.additions:,}")
        assert "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert f"<td>{counted.additions:,}</td>" in page and "Means over 40 test images." in page
