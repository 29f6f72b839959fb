"""SNN2ANN: the CNN trains on counted spikes; thresholds are drawn, saved, and rise by a rule.  Runs of proxy, too."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops.distill import METHODS, Options, main, train
from adderops.distill.methods import SNN2ANNTask
from adderops.distill.runs.folder import RunFolder
from adderops.models import create_model
from adderops.spiking import IntegrateAndFire, sites, spiking
from distill.runs import assert_continued_alike, assert_same_state, error_of, keep_tasks, rows_of

STEPS = 4  # rates are exact
BARS = SimpleNamespace(in_channels=1, num_classes=4, side=32)


class Substitute(torch.autograd.Function):
    """A ReLU whose output is replaced and whose gradient is its own."""

    @staticmethod
    def forward(ctx, z, rate, gate):
        ctx.save_for_backward(z > 0)
        return rate * (z > 0) if gate == "resu" else rate.clone()

    @staticmethod
    def backward(ctx, grad):
        [positive] = ctx.saved_tensors
        return grad * positive, None, None


def lenet5(cnn, images, rates, gate):
    """LeNet-5-BN with substituted activations, written out."""
    a, b, c, d = rates
    x = F.max_pool2d(Substitute.apply(cnn.bn1(cnn.conv1(images)), a, gate), 2)
    x = F.max_pool2d(Substitute.apply(cnn.bn2(cnn.conv2(x)), b, gate), 2)
    x = Substitute.apply(cnn.bn3(cnn.conv3(x)), c, gate)
    x = Substitute.apply(cnn.bn4(cnn.conv4(x)), d, gate)
    return cnn.fc(x.flatten(1))


def spikes_of(network, images) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the logits of a spiking network, and the number of spikes of all neurons over the steps."""
    counts = []

    def count(site, inputs, spikes):
        counts.append(spikes.unflatten(0, (site.steps, -1)).sum(0))

    hooks = [site.register_forward_hook(count) for site in sites(network).values()]
    with torch.no_grad():
        logits = network(images)
    for hook in hooks:
        hook.remove()
    return logits, counts


# --- the gradient ---


@pytest.mark.parametrize("gate", ["resu", "stsu"])
def test_gradient_is_the_cnns_with_substituted_activations(gate):
    """To the bit; and the CNN leaves the statistics of BatchNorm to the spikes."""
    torch.manual_seed(0)
    images, labels = torch.randn(6, 1, 32, 32), torch.arange(6)
    cnn = create_model("lenet5", "cnn", 1, 10)
    student = spiking(copy.deepcopy(cnn), STEPS, partial(IntegrateAndFire, 0.5, reset="zero"))
    other = copy.deepcopy(student)
    spiking_logits, counts = spikes_of(other, images)
    loss = F.cross_entropy(lenet5(cnn, images, [count / STEPS for count in counts], gate), labels)
    loss.backward()

    losses = SNN2ANNTask({"student": student}, gate=gate)(images, labels)
    losses.total.backward()
    assert torch.equal(losses.logits["student"], spiking_logits)
    assert losses.total.item() == losses.terms["student_ce"].item() == loss.item()
    for name, parameter in cnn.named_parameters():
        assert torch.equal(student.get_parameter(name).grad, parameter.grad) and parameter.grad.any(), name
    for name, buffer in other.named_buffers():
        assert name.startswith("spikes") or torch.equal(student.get_buffer(name), buffer), name


def test_without_a_gate_the_cnn_has_the_rates_of_the_spiking_network():
    """Between linear layers it is the mean of the spiking network over the steps, also in its logits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 5),
    )
    images, labels = torch.randn(6, 1, 14, 14), torch.zeros(6, dtype=torch.int64)
    nn.init.normal_(model[3].weight)
    student = spiking(model, 4, partial(IntegrateAndFire, 0.5, reset="zero"))
    expected = F.cross_entropy(spikes_of(student, images)[0], labels)
    losses = {gate: SNN2ANNTask({"student": student}, gate=gate)(images, labels).total for gate in ("stsu", "resu")}
    torch.testing.assert_close(losses["stsu"], expected, rtol=1e-6, atol=0)
    assert abs(losses["resu"] - expected) > 1e-6


# --- thresholds ---


@pytest.mark.parametrize("neurons, rises", [(1, False), (2, True)])
def test_thresholds_rise_where_too_many_neurons_spike_without_their_relu(neurons, rises):
    """Ten neurons in the second layer; `neurons` of them get the current 1, then -2: a spike, and a mean below 0.

    One in ten is a share of 0.1, two are more.  Two neurons in the first layer fire in both steps and in the second.
    """
    model = nn.Sequential(*(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 10, bias=False), nn.ReLU()))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[2].weight.zero_()
        model[2].weight[:neurons] = torch.tensor([1.0, -3.0])
    student = spiking(model, 2, partial(IntegrateAndFire, 1.0, reset="zero"))
    first, second = (site.neuron for site in sites(student).values())
    first.threshold = torch.tensor([1.0, 2.0])
    second.threshold = torch.linspace(0.1, 1.0, 10)
    before = second.threshold.clone()
    SNN2ANNTask({"student": student}, rise=0.25)(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64))
    assert torch.equal(second.threshold, before + 0.25 * rises)
    assert torch.equal(first.threshold, torch.tensor([1.0, 2.0]))


def test_thresholds_are_drawn_for_each_neuron():
    options = Options(method="snn2ann", data="digits", arch="lenet5", threshold=2.0, steps=STEPS, seed=3)
    task, again, other = (
        METHODS["snn2ann"].build(replace(options, seed=seed).resolve(), BARS, torch.device("cpu")) for seed in (3, 3, 4)
    )
    thresholds = [site.neuron.threshold for site in sites(task.networks["student"]).values()]
    assert [tuple(v.shape) for v in thresholds] == [(6, 28, 28), (16, 10, 10), (120, 1, 1), (84, 1, 1)]
    drawn = torch.cat([v.flatten() for v in thresholds])
    assert 0 < drawn.min() < 0.01 and 1.99 < drawn.max() <= 2 and drawn.mean() == pytest.approx(1, abs=0.03)
    assert task.rise == 0.02 and task.gate == "resu" and task.training
    assert_same_state(task.state_dict(), again.state_dict())
    assert not torch.equal(thresholds[0], sites(other.networks["student"])["spikes.0"].neuron.threshold)
    # the weights begin as in the other methods
    proxy = METHODS["proxy"].build(replace(options, method="proxy").resolve(), BARS, torch.device("cpu"))
    for name, parameter in proxy.networks["student"].named_parameters():
        assert torch.equal(parameter, task.networks["student"].get_parameter(name)), name


# --- runs ---


@pytest.fixture(params=["proxy", "snn2ann"])
def spiking_config(request, config) -> Options:
    return replace(config, method=request.param, steps=2, threshold=0.5, lr=0.01)


def test_stopped_and_continued_is_as_uninterrupted(spiking_config, data, tmp_path):
    """After the third of eight steps; also the thresholds."""
    assert_continued_alike(spiking_config, data, tmp_path, after=3)
    theirs = torch.load(tmp_path / "whole" / "student.pt", weights_only=True)
    if spiking_config.method == "snn2ann":
        assert theirs["spikes.0.neuron.threshold"].shape == (6, 28, 28)


def test_a_run_is_tested_as_it_was_trained(spiking_config, data, tmp_path, monkeypatch, capsys):
    tasks = keep_tasks(monkeypatch)
    train(spiking_config, data, tmp_path / "run")
    network = RunFolder.load(tmp_path / "run").network("student")
    assert_same_state(dict(network.state_dict()), dict(tasks[0].networks["student"].state_dict()))
    accuracy = float(rows_of(tmp_path / "run" / "log.csv")[-1]["student_test_accuracy"])
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert f"{100 * accuracy:.2f}" in capsys.readouterr().out


def test_thresholds_rise_while_training(config, data, tmp_path, monkeypatch):
    """Low thresholds: many neurons spike whose mean current is negative."""
    tasks = keep_tasks(monkeypatch)
    options = replace(config, method="snn2ann", steps=4, threshold=0.125, epochs=1, gate="stsu")
    train(options, data, tmp_path / "run")
    start = METHODS["snn2ann"].build(options.resolve(), data, torch.device("cpu"))
    rises = [
        (ours.neuron.threshold - theirs.neuron.threshold) / tasks[0].rise
        for ours, theirs in zip(*(sites(task.networks["student"]).values() for task in (tasks[0], start)), strict=True)
    ]
    assert tasks[0].gate == "stsu" and not rises[0].any()  # a constant current is negative at each step or at none
    assert any(rise.any() for rise in rises)
    for rise in rises:
        torch.testing.assert_close(rise, rise.round(), rtol=0, atol=1e-3)
        assert rise.min() >= 0 and rise.max() <= 8


@pytest.mark.parametrize("method", ["proxy", "dsr", "pkkd"])
def test_the_gate_is_refused_where_it_has_no_effect(capsys, method):
    message = error_of(capsys, "--method", method, "--gate", "stsu")
    assert f"gate: expected --method snn2ann with it, got --method {method}, where it has no effect" in message


def test_the_papers_settings_apply_to_other_data():
    config = Options(method="snn2ann", data="digits", arch="lenet5", epochs=3).resolve()
    assert (config.optimizer, config.lr, config.weight_decay, config.batch_size) == ("adam", 1e-3, 5e-4, 512)
    assert (config.spiking.steps, config.spiking.threshold, config.spiking.gate, config.epochs) == (4, 1.0, "resu", 3)
    neuron = SNN2ANNTask.network(config, "student", 1, 10).get_submodule("spikes.2.neuron")
    assert neuron.reset_to == "zero" and not neuron.scaled
    paper = Options(recipe="snn2ann-cifar100-vgg_small", method="snn2ann").resolve()
    assert (paper.data, paper.epochs, paper.arch) == ("cifar100", 200, "vgg_small")
