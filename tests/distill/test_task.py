"""The losses of a task are the sums of their parts, and gradients flow only where they should."""

import math

import pytest
import torch
from torch import Tensor, nn

from adderops.distill import Distillation, FeatureMatch, PKKDTask, SingleTask
from adderops.distill.methods.pkkd import imitation_loss
from adderops.models import IntermediateOutputs, lenet5


@pytest.fixture(autouse=True)
def _float64(set_threads):
    set_threads(1)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 3, 3])


def small_task(**options) -> PKKDTask:
    networks = (lenet5(kind, num_classes=5) for kind in ("cnn", "adder"))
    return PKKDTask(*networks, Distillation(**options))


def softmax_written_out(logits: list[float], temperature: float = 1.0) -> list[float]:
    weights = [math.exp(v / temperature) for v in logits]
    return [w / sum(weights) for w in weights]


def cross_entropy_written_out(logits: Tensor, target: list[list[float]], temperature: float = 1.0) -> float:
    rows = [softmax_written_out(row, temperature) for row in logits.tolist()]
    terms = [p * math.log(q) for t, r in zip(target, rows, strict=True) for p, q in zip(t, r, strict=True)]
    return -sum(terms) / len(rows)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_imitation_loss_is_the_divergence_from_the_teachers_softmax(temperature):
    student, teacher = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    target = [softmax_written_out(row, temperature) for row in teacher.tolist()]
    loss = imitation_loss(student.requires_grad_(), teacher, temperature)
    entropy = cross_entropy_written_out(teacher, target, temperature)
    # logits enter in float32: 2^-24 of numbers near 1
    assert loss.item() == pytest.approx(
        temperature**2 * (cross_entropy_written_out(student, target, temperature) - entropy), abs=1e-5
    )
    loss.backward()
    assert teacher.grad is None and student.grad is not None


def test_imitation_loss_of_the_teacher_itself_is_zero_and_its_gradient_that_of_the_cross_entropy():
    logits = 3 * torch.randn(64, 10, dtype=torch.float32)
    assert abs(imitation_loss(logits, logits, 4.0).item()) < 1e-5
    student = torch.randn(64, 10, dtype=torch.float32, requires_grad=True)
    [ours] = torch.autograd.grad(imitation_loss(student, logits, 4.0), student)
    literal = 16 * nn.functional.cross_entropy(student / 4, (logits / 4).softmax(1))
    assert torch.equal(ours, torch.autograd.grad(literal, student)[0])


@pytest.mark.parametrize("features", ["kernel+1x1", "none"])
@pytest.mark.parametrize("temperature", [None, 1.0, 2.0])
@pytest.mark.parametrize("alpha, beta", [(1.0, 0.1), (0.3, 2.0), (0.0, 0.0)])
def test_student_loss_is_the_formula(batch, features, temperature, alpha, beta):
    images, labels = batch
    imitation = {"logits": False} if temperature is None else {"temperature": temperature}
    losses = small_task(features=features, alpha=alpha, beta=beta, **imitation)(images, labels)
    terms = {name: term.item() for name, term in losses.terms.items()}
    one_hot = torch.eye(5)[labels].tolist()
    student, teacher = losses.logits["student"], losses.logits["teacher"]
    assert terms["student_ce"] == pytest.approx(cross_entropy_written_out(student, one_hot), rel=1e-6)
    assert terms["teacher_ce"] == pytest.approx(cross_entropy_written_out(teacher, one_hot), rel=1e-6)
    assert ("imitation" in terms, "l_mid" in terms) == (temperature is not None, features != "none")
    imitation, l_mid = terms.get("imitation", 0.0), terms.get("l_mid", 0.0)
    assert terms["student_loss"] == pytest.approx(alpha * terms["student_ce"] + imitation + beta * l_mid, rel=1e-6)
    assert losses.total.item() == pytest.approx(terms["student_loss"] + terms["teacher_ce"], rel=1e-6)


def test_l_mid_compares_the_layers_of_the_two_networks(batch):
    task = small_task()
    outputs = []
    for network in task.networks.values():
        collected = IntermediateOutputs(network)
        network(batch[0])
        outputs.append([output.detach() for output in collected.take()])
        collected.remove()
    expected, _ = FeatureMatch([16, 120, 84]).double()(outputs[1], outputs[0])
    losses = task(*batch)
    assert losses.terms["l_mid"].item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(losses.outputs, outputs[1], strict=True):
        assert torch.equal(ours, theirs)


def test_teacher_gets_the_gradient_of_its_labels_and_nothing_else(batch):
    task = small_task(alpha=3.0, beta=5.0)
    teacher = task.networks["teacher"]
    losses = task(*batch)
    parameters = list(teacher.parameters())
    assert all(
        g is None
        for g in torch.autograd.grad(losses.terms["student_loss"], parameters, retain_graph=True, allow_unused=True)
    )
    losses.total.backward()
    alone = SingleTask(lenet5("cnn", num_classes=5), "teacher")
    alone.networks["teacher"].load_state_dict(teacher.state_dict())
    alone(*batch).total.backward()
    for (name, p), q in zip(teacher.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_every_other_parameter_is_trained_by_the_student_loss(batch):
    task = small_task()
    task(*batch).total.backward()
    others = [(n, p) for n, p in task.named_parameters() if not n.startswith("networks.teacher.")]
    assert any(n.startswith("match.") for n, _ in others)
    for name, parameter in others:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_frozen_teacher_is_as_in_testing_and_stays(batch):
    task = small_task(teacher="frozen")
    teacher = task.networks["teacher"]
    for norm in (m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean += 0.1
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    assert task.train().training and task.networks["student"].training and not teacher.training
    losses = task(*batch)
    losses.total.backward()
    assert losses.total.item() == losses.terms["student_loss"].item()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with torch.no_grad():
        assert torch.equal(losses.logits["teacher"], teacher.eval()(batch[0]))
    assert all(p.grad is not None for p in task.networks["student"].parameters())


def test_deployed_student_has_no_extra_parameters(batch):
    task = small_task()
    task(*batch)
    deployed = task.networks["student"].state_dict()
    assert deployed.keys() == lenet5("adder").state_dict().keys()
    lenet5("adder", num_classes=5).load_state_dict(deployed)


def test_testing_a_network_keeps_no_outputs(batch):
    task = small_task()
    task(*batch)
    network = task.networks["student"]
    for _ in range(2):
        network(batch[0])
    with pytest.raises(RuntimeError, match="was not run"):
        task._outputs["student"].take()


def test_diagnosis_measures_without_touching(batch):
    task = small_task(beta=0.7)
    losses = task(*batch)
    diagnosis = task.diagnose(losses)
    assert all(p.grad is None for p in task.parameters())
    losses.total.backward()  # the graph is still there

    # the same forward again (BatchNorm uses the batch), gradients of each loss by backward on retained outputs
    norms = []
    for term in ("l_mid", "rest"):
        again = task(*batch)
        for y in again.outputs:
            y.retain_grad()
        rest = again.terms["student_ce"] + again.terms["imitation"]
        (again.terms["l_mid"] if term == "l_mid" else rest).backward()
        norms.append([y.grad.norm().item() for y in again.outputs])
    expected = [0.7 * mid / rest for mid, rest in zip(*norms, strict=True)]
    assert diagnosis["gradient_ratio"].tolist() == pytest.approx(expected, rel=1e-6)
    assert diagnosis["width_a"].tolist() == pytest.approx([y.abs().mean().item() for y in losses.outputs])
    assert diagnosis.keys() == {"gradient_ratio", "l_mid", "var_yc", "width_a", "width_c"}
    assert small_task(features="none").diagnose(losses) == {}


@pytest.mark.parametrize("features", ["kernel+1x1", "kernel", "1x1"])
def test_a_step_mixes_no_devices(features):
    """On the meta device, which refuses a tensor left on the CPU as a GPU does; L_mid takes the path of a GPU."""
    with torch.device("meta"):
        networks = (lenet5(kind, num_classes=5) for kind in ("cnn", "adder"))
        task = PKKDTask(*networks, Distillation(features=features)).float()
        images, labels = torch.empty(4, 1, 32, 32, dtype=torch.float32), torch.empty(4, dtype=torch.int64)
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], 0.1, momentum=0.9)
    losses = task(images, labels)
    assert {name: value.device.type for name, value in task.diagnose(losses).items()} == dict.fromkeys(
        ("l_mid", "var_yc", "width_a", "width_c", "gradient_ratio"), "meta"
    )
    losses.total.backward()
    optimizer.step()
    assert losses.total.is_meta and all(p.grad.is_meta for p in task.parameters() if p.requires_grad)
