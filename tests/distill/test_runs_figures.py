"""Figures draw what the log has; fits to the weights are those of maximum likelihood."""

import re

import pytest
import torch
from scipy.stats import laplace, norm
from torch import nn

from adderops.distill.runs.figures import (
    draw_accuracy,
    draw_comparison,
    draw_layers,
    draw_losses,
    draw_weights,
    fit_gaussian,
    fit_laplace,
    layer_weights,
)
from adderops.distill.runs.folder import RunFolder
from adderops.models import resnet20


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
    terms = {"weighted sum": "student_loss", "labels": "student_ce", "imitation (KL)": "imitation", "L_mid": "l_mid"}
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
