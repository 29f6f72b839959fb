"""The report: every figure and number of a run, in one file; parts without data are left out."""

import base64
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import laplace, norm
from torch import nn

from adderops.distill import Options, load_data, train
from adderops.distill.__main__ import main
from adderops.distill.figures import (
    draw_accuracy,
    draw_comparison,
    draw_layers,
    draw_losses,
    draw_weights,
    fit_gaussian,
    fit_laplace,
    layer_weights,
)
from adderops.distill.report import write_report
from adderops.distill.run_folder import RunFolder
from adderops.models import resnet20


@pytest.fixture(scope="module")
def runs(folder_of_bars, tmp_path_factory) -> dict[str, RunFolder]:
    """A finished run of each method, two epochs each."""
    before, folder = torch.get_num_threads(), tmp_path_factory.mktemp("runs")
    data = load_data(str(folder_of_bars))
    for method in ("pkkd", "plain", "cnn"):
        config = Options(data=str(folder_of_bars), method=method, epochs=2, batch_size=16, lr=0.02, threads=1)
        train(config, data, folder / method)
    torch.set_num_threads(before)
    return {method: RunFolder.load(folder / method) for method in ("pkkd", "plain", "cnn")}


def embedded(page: str) -> dict[str, bytes]:
    """The figures in a page, by title."""
    found = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', page)
    return {title: base64.b64decode(content) for title, content in found}


def test_the_report_holds_every_figure_and_number(runs, tmp_path, capsys):
    run = runs["pkkd"]
    assert main(["report", str(run.path), "--output", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    page = (tmp_path / "report.html").read_text()
    figures = embedded(page)
    assert list(figures) == ["Accuracy", "Losses", "Match of the layers", "Weights"]
    for name, content in zip(("accuracy", "losses", "layers", "weights"), figures.values(), strict=True):
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and content.endswith(b"IEND\xaeB`\x82")
        assert (tmp_path / f"{name}.png").read_bytes() == content
    assert re.findall("<h2>(.*?)</h2>", page) == [
        *("Result", "Accuracy", "Losses", "Match of the layers", "Weights", "Fits to the weights"),
        *("Operations of an image", "Command", "Configuration"),
    ]
    for row in run.results():
        cells = (row["network"], f"{100 * row['test_accuracy']:.2f} %", f"{100 * row['best_test_accuracy']:.2f} %")
        assert "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) in page
    assert run.config.command() in page and "<td>beta</td><td>0.1</td>" in page and "<td>lr</td><td>0.02</td>" in page
    assert "After epoch 2 of 2." in page
    gaussian = fit_gaussian(run.network("student").conv3.weight)
    assert f"<td>student conv3</td><td>adder layers</td><td>48000</td><td>{gaussian.scale:.4g}</td>" in page
    # 416,016 multiply-accumulates, 298,080 of them in the layers that become adders; 3.7 and 0.9 pJ, 0.2 and 0.03 pJ
    for cells in ("CNN 416,016 416,016 1,913,674 95,684", "adder_network 117,936 714,096 1,079,050 45,010"):
        assert "".join(f"<td>{cell.replace('_', ' ')}</td>" for cell in cells.split()) in page
    # nothing of it lies elsewhere
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page


@pytest.mark.parametrize("method, network", [("plain", "student"), ("cnn", "teacher")])
def test_without_distillation_its_parts_are_left_out(runs, tmp_path, method, network):
    page = write_report(runs[method], tmp_path).read_text()
    assert list(embedded(page)) == ["Accuracy", "Losses", "Weights"] and not (tmp_path / "layers.png").exists()
    assert set(re.findall(r"<td>(student|teacher) conv3</td>", page)) == {network}
    assert [axes.get_title() for axes in draw_losses(runs[method]).axes] == ["cross entropy with the labels"]


def test_the_report_is_a_function_of_the_run(runs, tmp_path):
    run = runs["plain"]
    assert main(["report", str(run.path)]) == 0
    assert (run.path / "report" / "report.html").read_bytes() == write_report(run, tmp_path).read_bytes()


def test_a_run_in_training_has_no_weights_yet_and_names_are_escaped(runs, tmp_path):
    run = runs["pkkd"]
    config = replace(run.config, data="a<b>&c")
    page = write_report(RunFolder(run.path, config, run.rows[:1], run.layers[:3], finished=False), tmp_path).read_text()
    assert list(embedded(page)) == ["Accuracy", "Losses", "Match of the layers"]
    assert "After epoch 1 of 2." in page and "Fits" not in page
    assert "<title>a&lt;b&gt;&amp;c, lenet5" in page and "<b>" not in page


def test_operations_are_not_counted_where_the_images_are_gone(runs, tmp_path):
    """Of a run without a data.json, as older versions left them."""
    run = runs["plain"]
    old = shutil.copytree(run.path, tmp_path / "old", ignore=shutil.ignore_patterns("data.json"))
    gone = replace(run, path=Path(old), config=replace(run.config, data=str(tmp_path / "gone")))
    page = write_report(gone, tmp_path / "report").read_text()
    assert "Not counted, because the size of the images is not known" in page and "energy" not in page


# --- figures ---


def drawn(axes) -> dict[str, list[float]]:
    return {line.get_label(): list(line.get_ydata()) for line in axes.lines}


def test_the_curves_are_those_of_the_log(runs):
    run = runs["pkkd"]
    [axes] = draw_accuracy(run).axes
    assert drawn(axes) == {
        f"{name}, {part}": [100 * row[f"{name}_{part}_accuracy"] for row in run.rows]
        for name in ("student", "teacher")
        for part in ("test", "train")
    }
    left, right = draw_losses(run).axes
    assert drawn(left) == {
        "student, test": run.curve("student_test_loss"),
        "student, train": run.curve("student_ce"),
        "teacher, test": run.curve("teacher_test_loss"),
        "teacher, train": run.curve("teacher_ce"),
    }
    terms = {"sum as weighted": "student_loss", "labels": "student_ce", "imitation (KL)": "imitation", "L_mid": "l_mid"}
    assert drawn(right) == {label: run.curve(name) for label, name in terms.items()}


def test_the_layers_are_those_of_the_log(runs):
    run = runs["pkkd"]
    panels = draw_layers(run).axes
    for axes, column in zip(panels, ("l_mid", "gradient_ratio", "var_yc"), strict=True):
        assert drawn(axes) == {
            layer: [row[column] for row in run.layers if row["layer"] == layer] for layer in ("conv2", "conv3", "conv4")
        }
    assert [axes.get_legend() is not None for axes in panels] == [False, False, True]


def test_many_layers_have_a_colour_bar(runs):
    run = runs["pkkd"]
    layers = [{**run.layers[0], "layer": f"layer{i}"} for i in range(20)]
    *panels, bar = draw_layers(RunFolder(run.path, run.config, run.rows, layers, finished=True)).axes
    assert len(panels[0].lines) == 20 and panels[-1].get_legend() is None
    assert [label.get_text() for label in bar.get_yticklabels()] == ["layer0", "layer19"]


def test_a_comparison_has_a_curve_for_each_network(runs):
    [axes] = draw_comparison(list(runs.values()), ["method", "network"]).axes
    assert drawn(axes) == {
        f"{method}, {name}": [100 * value for value in runs[method].curve(f"{name}_test_accuracy")]
        for method, name in (("pkkd", "student"), ("pkkd", "teacher"), ("plain", "student"), ("cnn", "teacher"))
    }


# --- weights ---


@pytest.mark.parametrize("sampled, fits_better", [(torch.randn, "gaussian"), (None, "laplace")])
def test_fits_are_those_of_maximum_likelihood(sampled, fits_better):
    torch.manual_seed(0)
    weights = 3 * torch.randn(2001) + 1 if sampled else torch.distributions.Laplace(1.0, 3.0).sample((2001,))
    gaussian, fitted = fit_gaussian(weights), fit_laplace(weights)
    for ours, theirs in ((gaussian, norm), (fitted, laplace)):
        center, scale = theirs.fit(weights.double().numpy())
        assert (ours.center, ours.scale) == pytest.approx((center, scale))
        expected = theirs.logpdf(weights.double().numpy(), center, scale).mean()
        assert ours.log_likelihood == pytest.approx(expected)
    assert (gaussian.log_likelihood > fitted.log_likelihood) == (fits_better == "gaussian")


def test_layers_by_kind():
    kinds = layer_weights(resnet20("adder"))
    assert {kind: len(layers) for kind, layers in kinds.items()} == {
        "first convolution": 1,
        "adder layers": 20,
        "classifier": 1,
    }
    assert list(layer_weights(resnet20("cnn"))) == ["first convolution", "convolutions", "classifier"]
    assert len(kinds["adder layers"]["layer1.0.conv1"]) == 16 * 16 * 9


def test_layers_of_different_scale_do_not_make_a_laplace_density():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), *(nn.Conv2d(8, 100, 5) for _ in range(4)), nn.Linear(8, 8))
    for i, layer in enumerate(network[1:5]):
        nn.init.normal_(layer.weight, std=0.1 * 4**i)
    nn.init.zeros_(network[0].weight)  # no density fits
    figure = draw_weights({"teacher": network})
    assert [axes.get_title() for axes in figure.axes[:2]] == ["teacher: convolutions", "teacher: classifier"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    gaussian, fitted = (float(re.search(r"-?\d+\.\d+", label)[0]) for label in labels)
    assert labels[0].startswith("Gaussian") and gaussian > fitted + 0.04  # 0.0485 of many
    pooled = torch.cat(list(layer_weights(network)["convolutions"].values()))
    assert fit_laplace(pooled).log_likelihood > fit_gaussian(pooled).log_likelihood


# --- what is missing ---


def test_a_missing_file_ends_with_a_reason(runs, tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path}: expected a run folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_a_remedy(runs, monkeypatch, capsys, tmp_path):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("report", "figures"):
        monkeypatch.delitem(sys.modules, f"adderops.distill.{name}")
    run = str(runs["plain"].path)
    for arguments in (["report", run], ["compare", run, "--plot", str(tmp_path / "x.png")]):
        assert main(arguments) == 1
        assert "figures need matplotlib: install the extra `adderops[distill]`" in capsys.readouterr().err
