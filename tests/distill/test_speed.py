"""How far training is from its speed limit: worked paths, the definition on real runs, resume, and the closed form."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from adderops.distill import Distiller, train
from adderops.distill.runs.figures import draw_speed
from adderops.distill.speed import COLUMNS, Trajectory, linear_speed_limit
from adderops.models import lenet5
from distill.runs import assert_same_state, rows_of


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


class Walker(nn.Module):
    """Parameters that go where they are told, one for each parameter group."""

    def __init__(self, *starts: list[float], rates: tuple[float, ...] = (0.5,)) -> None:
        super().__init__()
        self.at = nn.ParameterList(torch.tensor(start) for start in starts)
        groups = [{"params": [p], "lr": rate} for p, rate in zip(self.at, rates, strict=True)]
        self.optimizer = torch.optim.SGD(groups, lr=1.0)
        self.trajectory = Trajectory({"student": self}, self.optimizer)

    def go(self, *steps: list[float]) -> "Walker":
        """Moves the parameters by these steps, whatever the learning rates."""
        with self.trajectory.step(), torch.no_grad():
            for parameter, step in zip(self.at, steps, strict=True):
                parameter += torch.tensor(step)
        return self

    def rate(self, *rates: float) -> "Walker":
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        return self

    def numbers(self) -> list[float | None]:
        columns = self.trajectory.columns()
        assert list(columns) == [f"student_{column}" for column in COLUMNS]
        return list(columns.values())


# --- by hand ---


def test_a_straight_line_at_constant_speed_is_at_the_limit():
    """A velocity of (6, 8) per time, in steps of several learning rates."""
    walker = Walker([1.0, -2.0]).go([3.0, 4.0])
    walker.rate(0.25).go([1.5, 2.0]).rate(2.0).go([12.0, 16.0]).rate(0.0).go([0.0, 0.0])
    assert walker.numbers() == [1, 1, 1]


def test_a_zigzag_is_curved():
    """Two steps of 5 lead 6 away; time 1, action 2 * 25 / 0.5."""
    walker = Walker([0.0, 0.0]).go([3.0, 4.0]).go([3.0, -4.0])
    assert walker.numbers() == [100 / 36, 100 / 36, 1]


def test_a_change_of_speed_is_uneven():
    """Steps of 1 and 3 take the same time: 1 in all, action (1 + 9) / 0.5, distance 4; then a rest of a time of 1."""
    walker = Walker([8.0]).go([1.0]).go([3.0])
    assert walker.numbers() == [1.25, 1, 1.25]
    assert walker.rate(1.0).go([0.0]).numbers() == [2.5, 1, 2.5]


def test_without_distance_there_is_no_number():
    walker = Walker([1.0])
    assert walker.numbers() == [None] * 3
    assert walker.go([1.0]).go([-1.0]).numbers() == [None] * 3


def test_each_parameter_group_has_its_own_time():
    """Each goes straight at its own constant speed, one after the other; then the first one back and forth again."""
    walker = Walker([0.0], [0.0], rates=(0.5, 0.0)).go([1.0], [0.0]).rate(0.0, 0.25).go([0.0], [3.0])
    assert walker.numbers() == [1, 1, 1]
    walker.rate(0.5, 0.0).go([-1.0], [0.0]).go([1.0], [0.0])
    assert walker.numbers() == [(1.5 * 6 + 9) / 10, (9 + 9) / 10, 1]


def test_what_happens_between_the_steps_is_no_part_of_the_path():
    walker = Walker([0.0]).go([1.0])
    with torch.no_grad():
        walker.at[0].fill_(100.0)
    assert walker.go([1.0]).numbers() == [1, 1, 1]


# --- real runs ---


def definition(weights: list[Tensor], rates: list[float]) -> list[float]:
    """The ratio and its factors of a path of weights in float64, (steps + 1), by their definition."""
    steps = [(b - a).norm().item() for a, b in zip(weights, weights[1:], strict=False)]
    straight = (weights[-1] - weights[0]).norm().item() ** 2
    slow = sum(rates) * sum(step**2 / rate for step, rate in zip(steps, rates, strict=True))
    return [slow / straight, sum(steps) ** 2 / straight, slow / sum(steps) ** 2]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_columns_are_by_the_definition(frozen):
    """A convolutional teacher and an adder student, AdamW with decay, clipped gradients, a rate for each step."""
    torch.manual_seed(0)
    batches = [(torch.randn(4, 1, 32, 32), torch.arange(4)) for _ in range(3)]
    teacher, student = lenet5("cnn", num_classes=4), lenet5("adder", num_classes=4)
    networks = {"student": student} if frozen else {"student": student, "teacher": teacher}
    paths: dict[str, list[Tensor]] = {role: [] for role in networks}
    rates = [0.01 / (1 + step) for step in range(6)]

    def record(progress=None) -> None:
        for role, path in paths.items():
            path.append(nn.utils.parameters_to_vector(networks[role].parameters()).detach().double())

    record()
    distiller = Distiller(
        teacher,
        student,
        frozen=frozen,
        optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5),
        schedule=partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        schedule_per_step=True,
        clip=1.0,
        reestimate_batchnorm=0,
    )
    rows = distiller.fit(batches, epochs=2, on_step=record, quiet=True)
    for done, row in zip((3, 6), rows, strict=True):
        assert {name for name in row if name.endswith(COLUMNS)} == {f"{r}_{c}" for r in networks for c in COLUMNS}
        for role, path in paths.items():
            ours = [row[f"{role}_{column}"] for column in COLUMNS]
            assert ours == pytest.approx(definition(path[: done + 1], rates[:done]), rel=1e-5)
            assert min(ours) >= 1 and ours[0] == pytest.approx(ours[1] * ours[2], rel=1e-5)


def test_every_network_in_training_is_in_the_log_and_on_the_board(config, data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(replace(config, epochs=1, tensorboard=True), data, tmp_path)
    [row] = rows_of(tmp_path / "log.csv")
    names = {f"{role}_{column}" for role in ("teacher", "student") for column in COLUMNS}
    assert names <= row.keys() and all(float(row[name]) >= 1 for name in names)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert all(events.Scalars(name)[0].value == pytest.approx(float(row[name])) for name in names)


def test_the_figure_is_that_of_the_log(runs):
    run = runs["pkkd"]
    for axes, column in zip(draw_speed(run).axes, COLUMNS, strict=True):
        drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
        assert drawn == {role: run.curve(f"{role}_{column}") for role in ("student", "teacher")}


# --- checkpoints ---


def test_a_checkpoint_continues_with_the_same_bits():
    whole, begun, resumed = Walker([0.1, 0.7]), Walker([0.1, 0.7]), Walker([0.1, 0.7])
    for walker in (whole, begun):
        walker.go([0.3, -0.1]).rate(0.3)
    resumed.load_state_dict(begun.state_dict())
    resumed.trajectory.load_state_dict(begun.trajectory.state_dict())
    resumed.rate(0.3)
    for walker in (whole, resumed):
        walker.go([0.11, 0.13])
    assert_same_state(whole.trajectory.state_dict(), resumed.trajectory.state_dict(), "trajectory")
    with pytest.raises(ValueError, match="trajectory: expected the shapes of these weights, got others"):
        Walker([0.1]).trajectory.load_state_dict(whole.trajectory.state_dict())


def test_a_checkpoint_of_an_older_version_begins_a_trajectory(config, data, tmp_path):
    """Its rows have no columns: they stay empty, and the trajectory has the second epoch only."""
    config = replace(config, method="plain", lr=0.01)
    train(replace(config, epochs=1), data, tmp_path / "one")
    state = torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True)
    del state["trajectory"]
    state["config"]["epochs"] = 2
    state["log"] = [{n: v for n, v in row.items() if not n.endswith(COLUMNS)} for row in state["log"]]
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    train(config, data, tmp_path / "run")
    first, second = rows_of(tmp_path / "run" / "log.csv")
    names = [f"student_{column}" for column in COLUMNS]
    assert [first[name] for name in names] == [""] * 3 and float(second["student_speed_ratio"]) >= 1
    time = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["trajectory"]["sums"][0]
    assert time.tolist() == pytest.approx([8 * float(second["lr"])], rel=1e-6)


# --- the closed form ---


def descend(inputs: Tensor, targets: Tensor, time: float, steps: int) -> float:
    """T / T_SL of gradient descent on a linear model, from 0."""
    model = nn.Linear(inputs.size(1), 1, bias=False, dtype=inputs.dtype)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=time / steps)
    trajectory = Trajectory({"student": model}, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(inputs)[:, 0] - targets).square().sum() / 2).backward()
        with trajectory.step():
            optimizer.step()
    ratio = trajectory.columns()["student_speed_ratio"]
    assert ratio is not None
    return ratio


@pytest.mark.parametrize("images, features", [(5, 8), (8, 5)])
def test_the_closed_form_is_that_of_gradient_descent(images, features):
    """To four digits, for steps that go to 0; with more images than features the kernel has eigenvalues of 0."""
    generator = torch.Generator().manual_seed(images)
    inputs = torch.randn(images, features, generator=generator, dtype=torch.float64)
    inputs /= torch.linalg.matrix_norm(inputs, 2)
    targets = torch.randn(images, generator=generator, dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eigh(inputs @ inputs.T)
    time = 8.0
    expected = time / linear_speed_limit(eigenvalues, -vectors.T @ targets, time)
    # the error of steps of finite size is linear in it
    found = 2 * descend(inputs, targets, time, 500) - descend(inputs, targets, time, 250)
    assert expected > 1.25 and found == pytest.approx(expected, rel=5e-5)


def test_the_limit_of_one_mode():
    x = 3.0
    limit = linear_speed_limit(torch.tensor([1.5]), torch.tensor([0.25]), time=2.0)
    assert 2.0 / limit == pytest.approx(x / 2 / math.tanh(x / 2), rel=1e-12)


@pytest.mark.parametrize(
    "eigenvalues, residuals, time, expected",
    [
        ([1.0], [1.0, 2.0], 1.0, r"of one shape \(modes\), got \(1,\) and \(2,\)"),
        ([[1.0]], [[1.0]], 1.0, r"of one shape \(modes\), got \(1, 1\) and \(1, 1\)"),
        ([1.0], [1.0], 0.0, r"time > 0 .*, got 0.0, \[1.0\] and \[1.0\]"),
        ([0.0, 1.0], [1.0, 0.0], 1.0, r"an eigenvalue > 0 with a residual, got 1.0, \[0.0, 1.0\] and \[1.0, 0.0\]"),
    ],
)
def test_what_the_closed_form_refuses(eigenvalues, residuals, time, expected):
    with pytest.raises(ValueError, match=f"^linear_speed_limit: expected .*{expected}$"):
        linear_speed_limit(torch.tensor(eigenvalues), torch.tensor(residuals), time)
