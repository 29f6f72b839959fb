"""Joint A-SNN: the loss terms by hand, what is detached, and factors that two networks share."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adderops.distill.methods import JointTask
from adderops.distill.methods.spiking.joint import Factors, Rectangle, feature_gap
from adderops.distill.runs.folder import RunFolder
from adderops.models import lenet5
from adderops.spiking import IntegrateAndFire, sites, spiking
from distill.runs import assert_continued_alike, build_task, keep_tasks


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 1, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3, 3, 1])


@pytest.fixture
def task(config) -> JointTask:
    return build_task(replace(config, method="joint"))


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True, allow_unused=True)


def test_rectangle_is_one_wide_and_one_high():
    u = torch.tensor([-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75], requires_grad=True)
    spikes = Rectangle.apply(u)
    spikes.sum().backward()
    assert spikes.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert u.grad.tolist() == [0, 0, 1, 1, 1, 0, 0]


def test_factors_are_the_singular_vectors_of_each_tap_of_a_weight():
    """A reshape to (KH, KW, C_out, C_in) would keep the size, and mix taps with channels."""
    weight = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    factors = Factors(weight)
    s = factors.right_inverse(weight)
    assert factors.u.shape == (2, 5, 4, 3) and s.shape == (2, 5, 3) and factors.v.shape == (2, 5, 3, 3)
    for h in range(2):
        for w in range(5):
            tap = factors.u[h, w] @ torch.diag(s[h, w]) @ factors.v[h, w]
            torch.testing.assert_close(tap, weight[:, :, h, w], rtol=0, atol=1e-14)
            torch.testing.assert_close(s[h, w], torch.linalg.svdvals(weight[:, :, h, w]), rtol=0, atol=1e-14)
    torch.testing.assert_close(factors(s), weight, rtol=0, atol=1e-14)
    with torch.autocast("cpu", torch.bfloat16):  # or a network read back would have other weights
        assert factors.float()(s.float()).dtype == torch.float32


def test_networks_begin_with_the_weights_of_the_spiking_one_and_share_u_and_v(config, task):
    alone = build_task(replace(config, method="dsr")).networks["student"]  # the same seed
    for name in ("conv1", "conv2", "conv3", "conv4"):
        teacher, student = (network.get_submodule(name) for network in task.networks.values())
        [ours], [theirs] = teacher.parametrizations.weight, student.parametrizations.weight
        assert ours is theirs and ours.u is theirs.u and ours.v is theirs.v
        assert teacher.parametrizations.weight.original is not student.parametrizations.weight.original
        assert torch.equal(teacher.weight, student.weight)
        torch.testing.assert_close(student.weight, alone.get_submodule(name).weight, rtol=0, atol=1e-6)
    teacher, student = task.networks.values()
    assert not hasattr(student.fc, "parametrizations")
    for name in ("bn1", "fc"):
        assert teacher.get_submodule(name).weight is not student.get_submodule(name).weight
    shared = {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}
    assert len(shared) == 8
    assert len([p for p in task.parameters() if id(p) in shared]) == 8  # an optimizer has them once


def test_s_belongs_to_one_network_and_u_to_both(task):
    teacher, student = (network.conv2 for network in task.networks.values())
    before = student.weight.detach().clone()
    with torch.no_grad():
        teacher.parametrizations.weight.original.mul_(2)
    assert torch.equal(student.weight, before) and torch.equal(teacher.weight, 2 * before)
    with torch.no_grad():
        teacher.parametrizations.weight[0].u.neg_()
    assert torch.equal(student.weight, -before) and torch.equal(teacher.weight, -2 * before)


def test_loss_is_the_formula(task, batch):
    images, labels = batch
    losses = task(*batch)
    teacher, student = task.networks["teacher"], task.networks["student"]
    x, features = images, {"teacher": [], "student": []}
    for i in range(1, 5):  # the CNN written out
        x = F.relu(teacher.get_submodule(f"bn{i}")(teacher.get_submodule(f"conv{i}")(x)))
        x = F.max_pool2d(x, 2) if i < 3 else x
        features["teacher"].append(x.mean((2, 3)))
    z = teacher.fc(x.flatten(1))
    spikes = []
    for site in sites(student).values():
        site.register_forward_hook(lambda site, inputs, output: spikes.append(output))
    z_student = student(images)
    for i, y in enumerate(spikes):
        y = F.max_pool2d(y, 2) if i < 2 else y
        features["student"].append(sum(y.view(4, 6, *y.shape[1:])).mean((2, 3)) / 4)
    exits = {role: [side(f) for side, f in zip(task.exits[role], fs[:3], strict=True)] for role, fs in features.items()}

    def divergence(logits):
        p, q = (z / 3).softmax(1), (logits / 3).softmax(1)
        return 9 * (p * (p / q).log()).sum() / 6

    sides = exits["teacher"] + exits["student"]
    assert len(sides) == 6
    expected = {
        "teacher_ce": F.cross_entropy(z, labels),
        "student_ce": F.cross_entropy(z_student, labels),
        "exits_ce": sum(F.cross_entropy(logits, labels) for logits in sides),
        "imitation": sum(map(divergence, [*sides, z_student])),
        "features": sum(
            (s - a).square().sum() / 6 for s, a in zip(features["student"], features["teacher"], strict=True)
        ),
    }
    assert losses.terms.keys() == expected.keys()
    for name, value in expected.items():
        assert losses.terms[name].item() == pytest.approx(value.item(), rel=1e-5), name
    total = 0.9 * sum(expected[name] for name in ("teacher_ce", "student_ce", "exits_ce"))
    total = total + 0.1 * expected["imitation"] + 1e-3 * expected["features"]
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)


def test_channels_count_where_one_of_the_two_is_positive():
    student = torch.tensor([[1.0, -1.0, 0.0, -2.0], [0.0, 0.0, 0.5, 2.0]])
    teacher = torch.tensor([[-1.0, 2.0, 0.0, -4.0], [0.0, -8.0, 0.0, 0.0]])
    assert feature_gap(student, teacher).item() == (4 + 9 + 0.25 + 4) / 2


def test_what_teaches_gets_no_gradient_by_it(task, batch):
    """The CNN's own s, BatchNorm and classifier: the classifier learns by labels alone, the rest also by side exits."""
    teacher = task.networks["teacher"]
    losses = task(*batch)
    own = [p for name, p in teacher.named_parameters() if ".0." not in name]
    assert all(g is None for g in gradients(losses.terms["features"], own))
    by_imitation = dict(
        zip(dict(teacher.named_parameters()), gradients(losses.terms["imitation"], teacher.parameters()), strict=True)
    )
    beyond_exits = [name for name in by_imitation if name.startswith(("conv4", "bn4", "fc")) and ".0." not in name]
    assert len(beyond_exits) == 5 and all(by_imitation[name] is None for name in beyond_exits)
    assert by_imitation["bn1.weight"].abs().sum() > 0
    [by_total] = gradients(losses.total, [teacher.fc.weight])
    [by_label] = gradients(losses.terms["teacher_ce"], [teacher.fc.weight])
    torch.testing.assert_close(by_total, 0.9 * by_label, rtol=1e-6, atol=1e-8)


def test_every_parameter_is_trained(task, batch):
    task(*batch).total.backward()
    assert sum(name.startswith("exits.") for name, _ in task.named_parameters()) == 12
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_networks_with_different_convolutions_are_refused():
    neuron = partial(IntegrateAndFire, gradient=Rectangle.apply)
    student = spiking(lenet5("cnn", in_channels=3), 2, neuron)
    with pytest.raises(ValueError, match="networks: expected two or more convolutions, the same in each, got teacher"):
        JointTask({"teacher": lenet5("cnn"), "student": student})
    one = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected two or more convolutions"):
        JointTask({"teacher": one, "student": spiking(copy.deepcopy(one), 2, neuron)})


@pytest.mark.slow
def test_a_run_is_continued_and_read_back(config, data, tmp_path, monkeypatch):
    """Stopped within an epoch: the same bits. Networks read back have ordinary weights, the products of the factors."""
    tasks = keep_tasks(monkeypatch)
    assert_continued_alike(replace(config, method="joint", ema=0.5), data, tmp_path)
    run = RunFolder.load(tmp_path / "stopped")
    assert run.networks == ["student", "student_ema", "teacher"]
    x = torch.randn(4, 1, 32, 32)
    for role in ("student", "teacher"):
        network, trained = run.network(role), tasks[-1].networks[role].eval()
        assert isinstance(network.get_submodule("conv2").weight, nn.Parameter)
        assert torch.equal(network.get_submodule("conv2").weight, trained.get_submodule("conv2").weight)
        assert torch.equal(network(x), trained(x))
    assert not torch.equal(run.network("student_ema").conv2.weight, run.network("student").conv2.weight)
