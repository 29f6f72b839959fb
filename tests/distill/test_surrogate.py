"""Surrogate gradients of tuned width: snnTorch's function, through all steps, on the command line."""

import sys
from dataclasses import replace

import pytest
import torch

from adderops.distill import METHODS, Options
from adderops.distill.methods.spiking.task import Spiking
from distill.runs import assert_continued_alike, build_task, error_of


@pytest.fixture
def neuron():
    """Returns the neurons of a width."""
    pytest.importorskip("snntorch")
    return lambda width: METHODS["surrogate"].neuron(Spiking(steps=1, threshold=1, decay=1, surrogate_width=width))()


@pytest.mark.parametrize("width", [0.125, 0.25, 2.0])
def test_width_is_a_width_and_not_a_height(neuron, width):
    """The peak is 1 for every width; at the width the gradient is a quarter of it, at (sqrt 2 - 1) widths half."""
    distances = torch.tensor([0, width, -width, (2**0.5 - 1) * width, 3 * width])
    x = (1 + distances).view(1, 1, -1).requires_grad_()
    neuron(width)(x).sum().backward()
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([1, 1 / 4, 1 / 4, 1 / 2, 1 / 16]), rtol=1e-5, atol=0)


def test_gradient_goes_back_through_the_steps(neuron):
    """Two steps, width 1/2, u_1 = 3/4 and u_2 = 5/4 about the threshold 1: both slopes are (1 + 1/2)^-2 = 4/9."""
    x = torch.tensor([0.75, 0.5]).view(2, 1, 1).requires_grad_()
    spikes = neuron(0.5)(x)
    assert spikes.flatten().tolist() == [0, 1]
    spikes.sum().backward()
    first = 4 / 9 + 4 / 9 * (1 - 4 / 9)  # the second by u_2 = u_1 - s_1 + x_2
    torch.testing.assert_close(x.grad.flatten(), torch.tensor([first, 4 / 9]))


def test_settings_reach_the_neurons(neuron, config):
    options = replace(config, method="surrogate", surrogate_width=0.5, steps=3, threshold=2.0, decay=0.5)
    task = build_task(options)
    [site, *_] = (module for module in task.networks["student"].modules() if hasattr(module, "neuron"))
    assert (site.steps, site.neuron.threshold.item(), site.neuron.decay) == (3, 2.0, 0.5)
    x = torch.full((1, 1, 1), 2.5).requires_grad_()
    site.neuron(x).sum().backward()
    assert x.grad.item() == 0.25


def test_width_without_effect_is_refused(capsys):
    assert "surrogate_width: expected --method surrogate with it, got --method dsr" in error_of(
        capsys, "--method", "dsr", "--surrogate-width", "0.5"
    )


def test_missing_library_is_named(monkeypatch, tmp_path, capsys, options):
    monkeypatch.setitem(sys.modules, "snntorch.surrogate", None)
    said = error_of(capsys, *options, "--method", "surrogate", "--output", tmp_path / "run")
    assert said == "adderops.distill: error: method surrogate needs snntorch: install the extra `adderops[spiking]`\n"


def test_a_run_is_continued_with_the_same_bits(neuron, config, data, tmp_path):
    assert_continued_alike(replace(config, method="surrogate", steps=4), data, tmp_path)
    assert Options(method="surrogate").resolve().spiking.surrogate_width == 0.1
