"""The losses of PKKD against the formulas written out in float64, and which gradients flow where."""

import math

import pytest
import torch
from torch import Tensor, nn

from adderops.distill import PKKDTask, SingleTask
from adderops.distill.losses import adder_branch, conv_branch, imitation_loss, kernel_width, mid_loss
from adderops.models import lenet5

BATCHNORM_EPS = 1e-5


def branch_written_out(
    output: Tensor, weight: Tensor, sign: float, factor: float, width: float | None = None
) -> Tensor:
    """BN(W exp(sign * output / (factor * mean|output|))), one channel at a time; width overrides the mean."""
    if width is None:
        width = factor * sum(abs(v) for v in output.flatten().tolist()) / output.numel()
    kernel = torch.tensor([math.exp(min(10.0, max(-10.0, sign * v / width))) for v in output.flatten().tolist()])
    kernel = kernel.reshape(output.shape)
    normalized = []
    for row in weight.flatten(1):
        mixed = sum(w * kernel[:, k] for k, w in enumerate(row))
        mean = mixed.sum() / mixed.numel()
        variance = ((mixed - mean) ** 2).sum() / mixed.numel()
        normalized.append((mixed - mean) / (variance + BATCHNORM_EPS) ** 0.5)
    return torch.stack(normalized, dim=1)


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def adder_like(*shape: int) -> Tensor:
    """Outputs as an adder layer has them: minus a few hundred."""
    return -(torch.rand(*shape) * 300 + 100)


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("make, sign, factor", [(adder_branch, 1.0, 1.0), (conv_branch, -1.0, 3.0)])
def test_branch_is_the_formula(make, sign, factor, identity):
    output = adder_like(3, 4, 2, 5) if sign > 0 else torch.randn(3, 4, 2, 5) * 2
    branch = make(4)
    if not identity:
        nn.init.normal_(branch.linear.weight)
    weight = torch.eye(4) if identity else branch.linear.weight.detach().flatten(1)
    # some ten operations of float64 on numbers near 1
    torch.testing.assert_close(branch(output), branch_written_out(output, weight, sign, factor), rtol=1e-12, atol=1e-12)


def test_clamp_is_part_of_the_formula():
    output = torch.randn(8, 2, 16, 16)
    output[0, 0, 0, 0] = -3000.0  # 2048 * 2 values near 1: an exponent of some hundreds without the clamp
    weight = torch.eye(2)
    torch.testing.assert_close(
        conv_branch(2)(output), branch_written_out(output, weight, -1.0, 3.0), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("make, sign, factor", [(adder_branch, 1.0, 1.0), (conv_branch, -1.0, 3.0)])
def test_kernel_width_gets_no_gradient(make, sign, factor):
    """The gradient is that of the formula with the width held constant: central differences."""
    output = (adder_like(2, 1, 2, 2) if sign > 0 else torch.randn(2, 1, 2, 2)).requires_grad_()
    target = torch.randn(2, 1, 2, 2)
    ((make(1)(output) - target) ** 2).sum().backward()
    width = factor * output.detach().abs().mean().item()
    step = 1e-5 * width
    for index in range(output.numel()):
        values = []
        for direction in (1, -1):
            moved = output.detach().clone()
            moved.flatten()[index] += direction * step
            values.append(((branch_written_out(moved, torch.eye(1), sign, factor, width) - target) ** 2).sum().item())
        slope = (values[0] - values[1]) / (2 * step)
        # truncation step^2 and cancellation eps/step of central differences, in units of 1/width
        assert output.grad.flatten()[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-8 / width)


def test_width_follows_each_batch():
    """Outputs ten thousand times larger give the same features: nothing is remembered from the first batch."""
    branch, output = conv_branch(3), torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(branch(output), branch(output * 1e4), rtol=1e-12, atol=1e-12)
    assert kernel_width(output * 1e4, 3.0).item() == pytest.approx(3e4 * output.abs().mean().item())


def test_shrinking_both_1x1_does_not_shrink_the_loss():
    """The trivial optimum W = 0 is closed by the BatchNorm behind it."""
    student, teacher = adder_branch(3), conv_branch(3)
    y, c = adder_like(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    before = mid_loss([student(y)], [teacher(c)]).item()
    with torch.no_grad():
        student.linear.weight *= 0.5
        teacher.linear.weight *= 0.5
    # exact but for the eps = 1e-5 of BatchNorm beside variances of 0.5^2 * 0.01 and more
    assert mid_loss([student(y)], [teacher(c)]).item() == pytest.approx(before, rel=2e-2)


@pytest.mark.parametrize("value", [0.0, 1e30, -1e30])
def test_extreme_outputs_stay_finite(value):
    for branch in (adder_branch(2), conv_branch(2)):
        output = torch.full((2, 2, 3, 3), value, requires_grad=True)
        features = branch(output)
        features.square().sum().backward()
        assert features.isfinite().all() and output.grad.isfinite().all()


def test_mid_loss_is_the_mean_over_elements_and_layers():
    shapes = [(2, 3, 4, 4), (2, 5, 1, 1)]  # a mean over all elements at once would differ
    a, c = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    per_layer = [
        sum((x - y) ** 2 for x, y in zip(u.flatten().tolist(), v.flatten().tolist(), strict=True)) / u.numel()
        for u, v in zip(a, c, strict=True)
    ]
    assert mid_loss(a, c).item() == pytest.approx(sum(per_layer) / 2, rel=1e-12)
    with pytest.raises(ValueError):
        mid_loss(a, c[:1])


def softmax_written_out(logits: list[float]) -> list[float]:
    weights = [math.exp(v) for v in logits]
    return [w / sum(weights) for w in weights]


def test_imitation_loss_is_the_cross_entropy_with_the_teachers_softmax():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5, requires_grad=True)
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = softmax_written_out(t), softmax_written_out(s)
        expected -= sum(p[k] * math.log(q[k]) for k in range(5)) / 4
    loss = imitation_loss(student.requires_grad_(), teacher)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    assert teacher.grad is None


# --- the task as a whole ---


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 1, 32, 32), torch.tensor([0, 1, 3, 3])


def small_task(alpha: float = 1.0, beta: float = 0.1) -> PKKDTask:
    return PKKDTask(lenet5("cnn", num_classes=5), lenet5("adder", num_classes=5), alpha, beta)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.1), (0.3, 2.0), (0.0, 0.0)])
def test_task_losses_are_the_formula(batch, alpha, beta):
    images, labels = batch
    task = small_task(alpha, beta)
    for branch in [*task.student_branches, *task.teacher_branches]:
        nn.init.normal_(branch.linear.weight)
    losses = task(images, labels)
    terms = {name: term.item() for name, term in losses.terms.items()}

    layers = []
    for i, (y, c) in enumerate(zip(losses.outputs["student"], losses.outputs["teacher"], strict=True)):
        y_a = branch_written_out(y.detach(), task.student_branches[i].linear.weight.detach(), 1.0, 1.0)
        y_c = branch_written_out(c, task.teacher_branches[i].linear.weight.detach(), -1.0, 3.0)
        layers.append(((y_a - y_c) ** 2).mean().item())
    l_mid = sum(layers) / len(layers)

    def cross_entropy(logits: Tensor, target: list[list[float]]) -> float:
        rows = [softmax_written_out(row) for row in logits.tolist()]
        return -sum(p * math.log(q) for t, r in zip(target, rows, strict=True) for p, q in zip(t, r, strict=True)) / 4

    one_hot = torch.eye(5)[labels].tolist()
    student, teacher = losses.logits["student"], losses.logits["teacher"]
    student_ce = cross_entropy(student, one_hot)
    l_blend = alpha * student_ce + cross_entropy(student, [softmax_written_out(row) for row in teacher.tolist()])
    expected = {
        "l_mid": l_mid,
        "l_blend": l_blend,
        "student_ce": student_ce,
        "student_loss": beta * l_mid + l_blend,
        "teacher_ce": cross_entropy(teacher, one_hot),
    }
    assert terms == pytest.approx(expected, rel=1e-9)
    assert losses.total.item() == pytest.approx(expected["student_loss"] + expected["teacher_ce"], rel=1e-9)


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
    assert any(n.startswith("teacher_branches") for n, _ in others)
    for name, parameter in others:
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_deployed_student_has_no_extra_parameters(batch):
    task = small_task()
    task(*batch)
    deployed = task.networks["student"].state_dict()
    assert deployed.keys() == lenet5("adder").state_dict().keys()
    lenet5("adder", num_classes=5).load_state_dict(deployed)


def test_side_branches_start_at_the_identity():
    for branch in [*small_task().student_branches, *small_task().teacher_branches]:
        weight = branch.linear.weight
        assert torch.equal(weight.flatten(1), torch.eye(len(weight)))
        assert not branch.norm.affine and not list(branch.norm.parameters())


def test_diagnosis_measures_without_touching(batch):
    task = small_task(beta=0.7)
    losses = task(*batch)
    diagnosis = task.diagnose(losses)
    assert all(p.grad is None for p in task.parameters())
    losses.total.backward()  # the graph is still there

    # the same forward again (BatchNorm uses the batch), gradients of each loss by backward on retained outputs
    norms = []
    for term in ("l_mid", "l_blend"):
        again = task(*batch)
        for y in again.outputs["student"]:
            y.retain_grad()
        again.terms[term].backward()
        norms.append([y.grad.norm().item() for y in again.outputs["student"]])
    assert diagnosis["mid_gradient_ratio_max"] == pytest.approx(max(0.7 * m / b for m, b in zip(*norms, strict=True)))

    widths_a = [y.abs().mean().item() for y in losses.outputs["student"]]
    widths_c = [3 * c.abs().mean().item() for c in losses.outputs["teacher"]]
    assert diagnosis["width_a_min"] == pytest.approx(min(widths_a))
    assert diagnosis["width_a_max"] == pytest.approx(max(widths_a))
    assert diagnosis["width_c_min"] == pytest.approx(min(widths_c))
    assert diagnosis["width_c_max"] == pytest.approx(max(widths_c))
    kernels = [(-c / w).exp() for c, w in zip(losses.outputs["teacher"], widths_c, strict=True)]
    variances = [sum(k[:, ch].var().item() for ch in range(k.size(1))) / k.size(1) for k in kernels]
    assert diagnosis["var_yc_min"] == pytest.approx(min(variances))


def test_networks_that_do_not_match_are_refused():
    class Other(nn.Module):
        def matched_layers(self):
            return [nn.Conv2d(1, 16, 5)]

    with pytest.raises(ValueError, match=r"expected matched layers of \[16, 120, 84\] channels, got \[16\]"):
        PKKDTask(Other(), lenet5("adder"))
