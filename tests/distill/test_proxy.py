"""Proxy learning: spikes forward, the CNN's gradient backward."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from adderops.distill import Options
from adderops.distill.methods import ProxyTask
from adderops.models import create_model
from adderops.spiking import IntegrateAndFire, spiking

STEPS = 3


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def network(**neuron) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A CNN in training mode, and the spiking network of a copy of it."""
    torch.manual_seed(0)
    cnn = create_model("lenet5", "cnn", 1, 10)
    return cnn, spiking(copy.deepcopy(cnn), STEPS, partial(IntegrateAndFire, 1.0, scaled=True, **neuron))


@pytest.mark.parametrize("neuron", [{}, {"reset": "zero"}, {"gradient": "rate"}], ids=str)
def test_gradient_is_the_cnns_at_the_error_of_the_spikes(neuron):
    """To the bit: the error is that of the spiking logits, its way back that of the CNN; none goes through spikes."""
    images, labels = batch()
    cnn, student = network(**neuron)
    spikes = copy.deepcopy(student)(images).detach().requires_grad_()
    [error] = torch.autograd.grad(F.cross_entropy(spikes, labels), spikes)
    logits = cnn(images)
    expected = torch.autograd.grad(logits, list(cnn.parameters()), error)

    losses = ProxyTask({"student": student})(images, labels)
    losses.total.backward()
    assert torch.equal(losses.logits["student"], spikes) and not torch.equal(spikes, logits)
    assert losses.total.item() == losses.terms["student_ce"].item() == F.cross_entropy(spikes, labels).item()
    for (name, _), gradient in zip(cnn.named_parameters(), expected, strict=True):
        assert torch.equal(student.get_parameter(name).grad, gradient) and gradient.any(), name


def test_statistics_of_batchnorm_are_those_of_the_spikes():
    images, labels = batch()
    _, student = network()
    other = copy.deepcopy(student)
    ProxyTask({"student": student})(images, labels)
    other(images)
    for name, buffer in other.named_buffers():
        assert torch.equal(student.get_buffer(name), buffer), name
    assert student.get_buffer("bn4.num_batches_tracked") == 1


def test_the_class_weights_and_shares_of_labels_are_in_the_loss():
    images, labels = batch()
    task = ProxyTask({"student": network()[1]})
    task.label_loss.label_smoothing = 0.5
    losses = task(images, labels)
    assert losses.total.item() == F.cross_entropy(losses.logits["student"], labels, label_smoothing=0.5).item()


def test_the_papers_settings_apply_to_other_data():
    config = Options(method="proxy", data="digits", arch="lenet5", epochs=3).resolve()
    assert (config.optimizer, config.lr, config.momentum, config.beta2, config.batch_size) == (
        "adam",
        1e-4,
        0.8,
        0.99,
        100,
    )
    assert (config.spiking.steps, config.spiking.threshold, config.epochs) == (15, 2.0, 3)
    neuron = ProxyTask.network(config, "student", 1, 10).get_submodule("spikes.2.neuron")
    assert neuron.threshold == 2 and neuron.scaled and neuron.gradient is None
    paper = replace(Options(), recipe="proxy-fashion-mnist-lenet5", method="proxy").resolve()
    assert (paper.data, paper.epochs, paper.augment, paper.weight_decay) == ("fashion-mnist", 100, "crop", 1e-6)
