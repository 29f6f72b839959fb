"""Desire backpropagation: the batched rule is that of one image and one step at a time; a run learns and resumes."""

import math
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from adderops.distill import METHODS, Interrupted, Options, main, train
from adderops.distill.data import load_data
from adderops.distill.methods.spiking.desire import DesireNetwork, DesireTask, desired_changes, updates
from adderops.distill.methods.spiking.task import Spiking
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.weights import layer_weights
from adderops.models import ARCHITECTURES, MLP, register_model
from distill.runs import assert_same_state, error_of, rows_of

STEPS, DECAY = 8, 0.75


def dyadic_task() -> DesireTask:
    """A network all of whose sums are exact in float32: weights are multiples of 1/32, half of the neurons dropped."""
    torch.manual_seed(2)
    network = DesireNetwork(
        MLP(1, 4, hidden=(12, 9), dropout=(0.5, 0.5)), Spiking(steps=STEPS, threshold=1.0, decay=DECAY)
    )
    with torch.no_grad():
        for layer, (low, high) in zip(network.layers, ((-4, 6), (-12, 20), (-28, 20)), strict=True):
            layer.weight.copy_(torch.randint(low, high, layer.weight.shape) / 32)
        network.fc.weight[3] = 1
    return DesireTask({"student": network})


def gained_by_one_image(weights, levels, label, kept) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The rule for one image in float64, neuron by neuron and step by step; returns gains and desired changes."""
    sizes = [len(levels), *map(len, weights)]
    scale = [2.0, 2.0, 2.0]  # half of the neurons are dropped
    u = [[0.0] * size for size in sizes]
    spikes = [
        [[0] * size for size in sizes] for _ in range(STEPS + 1)
    ]  # by the step in which the next layer reads them
    traces = [[0.0] * size for size in sizes]
    pairs = [torch.zeros(w.shape, dtype=torch.double) for w in weights]
    for t in range(STEPS):
        for j, level in enumerate(levels):
            u[0][j] += level
            fired = u[0][j] >= 255 and bool(kept[0][j])
            u[0][j] -= 255 * fired
            spikes[t][0][j] = int(fired)
        for layer, weight in enumerate(weights):
            before = torch.tensor(spikes[t][layer], dtype=torch.double)
            traces[layer] = (DECAY * torch.tensor(traces[layer], dtype=torch.double) + before).tolist()
            current = weight @ before * scale[layer]
            for i in range(sizes[layer + 1]):
                u[layer + 1][i] = DECAY * u[layer + 1][i] + float(current[i])
                fired = u[layer + 1][i] >= 1 and bool(kept[layer + 1][i])
                u[layer + 1][i] -= fired
                spikes[t + 1][layer + 1][i] = int(fired)
                if fired:
                    pairs[layer][i] += torch.tensor(traces[layer], dtype=torch.double)

    rates = [[sum(step[layer][i] for step in spikes) / (STEPS - 4) for i in range(n)] for layer, n in enumerate(sizes)]
    changes: list[list[int]] = [[] for _ in weights]
    desires = [int(i == label) for i in range(sizes[-1])]
    errors = [1 - rate if i == label else rate for i, rate in enumerate(rates[-1])]
    changes[-1] = [(2 * d - 1) * (e > 0.3) for d, e in zip(desires, errors, strict=True)]
    for layer in reversed(range(1, len(weights))):
        errors = [abs(d - rate) for d, rate in zip(desires, rates[layer + 1], strict=True)]
        z = [
            sum(float(weights[layer][i, j]) * changes[layer][i] * errors[i] for i in range(sizes[layer + 1]))
            for j in range(sizes[layer])
        ]
        desires = [int(value > 0) for value in z]
        changes[layer - 1] = [
            int(math.copysign(1, value)) if abs(value) >= 0.05 and kept[layer][j] else 0 for j, value in enumerate(z)
        ]
    changes = [torch.tensor(change, dtype=torch.double) for change in changes]
    return [pair * change[:, None] for pair, change in zip(pairs, changes, strict=True)], changes


def test_a_batch_gains_what_its_images_gain_one_at_a_time_and_step_by_step():
    task = dyadic_task()
    network = task.networks["student"]
    levels = torch.randint(-150, 256, (8, 1, 32, 32)).clamp(min=0).float()
    labels = torch.tensor([0, 1, 2, 3, 3, 2, 3, 3])
    masks = []
    trains = network.trains
    network.trains = lambda images: (made := trains(images), masks.append(made[1]))[0]
    losses = task(levels, labels)
    losses.total.backward()

    weights = [layer.weight.detach().double() for layer in network.layers]
    pixels = MLP.pixels(levels)
    of_images = [
        gained_by_one_image(weights, pixels[n].tolist(), int(labels[n]), [mask[n] for mask in masks[0]])
        for n in range(len(labels))
    ]
    for i, layer in enumerate(network.layers):
        gained = torch.stack([gains[i] for gains, _ in of_images]).sum(0)
        assert torch.equal(layer.weight.grad.double(), -gained / len(labels))
        changes = torch.stack([changes[i] for _, changes in of_images])
        assert set(changes.flatten().tolist()) == {-1.0, 0.0, 1.0} and gained.any()
    wanted = torch.stack([changes[-1] for _, changes in of_images])
    assert not wanted.any(1).all() and wanted.any(1).any(), "images that want no change are among them"
    assert losses.terms["student_wanted"] == wanted.abs().mean().float()
    assert all(0 < mask.mean() < 1 for mask in masks[0][:-1]) and masks[0][-1].all()


def test_desired_changes_of_a_case_worked_by_hand():
    """T = 8, so rates are n / 4; three neurons above two above two; the label is the first output."""
    counts = ([0, 0], [4, 1], [3, 3, 0], [1, 3])  # of the pixels and of each layer
    trains = [(torch.arange(8).view(8, 1, 1) < torch.tensor(count)).float() for count in counts]
    kept = [torch.ones_like(train[0]) for train in trains]
    weights = [
        torch.zeros(2, 2),  # of the first layer; nothing goes below it
        torch.tensor([[1.0, -0.5], [0.5, 0.5], [0.25, -1.0]]),
        torch.tensor([[0.5, -0.125, 0.5], [0.25, 0.25, 0.5625]]),
    ]
    # outputs: e = 1 - 1/4 and 3/4, both above 0.3: c = 1, -1
    # above the second: z = 0.75 * (0.5 - 0.25), 0.75 * (-0.125 - 0.25), 0.75 * (0.5 - 0.5625) = 0.19, -0.28, -0.047
    # below it: d = 1, 0, 0, e = 1/4, 3/4, 0: z = 1/4 - 3/8, -1/8 - 3/8 = -0.125, -0.5
    changes = desired_changes(trains, kept, weights, torch.tensor([0]), 8)
    assert [change.tolist() for change in changes] == [[[-1, -1]], [[1, -1, 0]], [[1, -1]]]
    kept[2][0, 1] = 0  # then z of the first layer is 1/4, -1/8
    changes = desired_changes(trains, kept, weights, torch.tensor([0]), 8)
    assert [change.tolist() for change in changes] == [[[1, -1]], [[1, 0, 0]], [[1, -1]]]
    # with rates 1/4 of the other output and 3/4 of the label, no error exceeds 0.3
    trains[-1] = trains[-1].flip(2)
    assert not any(change.any() for change in desired_changes(trains, kept, weights, torch.tensor([0]), 8))


def test_updates_only_add_and_subtract_traces():
    """With decay 1 traces are numbers of spikes, and the sum is made in integers by += and -= alone."""
    generator = torch.Generator().manual_seed(1)
    trains = [torch.randint(2, (6 - i, 5, n), generator=generator).float() for i, n in enumerate((7, 4))]
    change = torch.randint(-1, 2, (5, 4), generator=generator).float()
    want = [[0] * 7 for _ in range(4)]
    for n in range(5):
        for i in range(4):
            for j in range(7):
                trace = 0
                for t in range(5):
                    trace += int(trains[0][t, n, j])
                    if trains[1][t, n, i] and change[n, i] > 0:
                        want[i][j] += trace
                    elif trains[1][t, n, i] and change[n, i] < 0:
                        want[i][j] -= trace
    [gained] = updates(trains, [change], decay=1.0)
    assert gained.tolist() == want


def test_pixels_fire_by_their_grey_level_whatever_the_normalization():
    """A pixel p fires floor(T p / 255) times: no grey level is lost in (p - mean) / std."""
    config = Options(method="desire").resolve()
    images = SimpleNamespace(mean=torch.full((1, 1, 1, 1), 60.3), std=torch.full((1, 1, 1, 1), 77.7))
    data = SimpleNamespace(in_channels=1, num_classes=10, train=images)
    network = DesireTask.build(config, data, torch.device("cpu")).networks["student"].eval()
    levels = torch.full((1, 1, 32, 32), 255.0)  # the frame of two pixels is not read
    levels[..., 2:-2, 2:-2] = (torch.arange(784.0) % 256).view(28, 28)
    spikes = network.trains((levels - images.mean) / images.std)[0][0]
    assert torch.equal(spikes.sum(0)[0], (20 * (torch.arange(784) % 256) // 255).float())
    assert network.state_dict()["mean"].item() == pytest.approx(60.3)


# --- in the trainer ---


@pytest.fixture
def small():
    """An MLP small enough for tests."""

    @register_model("small-mlp", image_size=32)
    def small_mlp(kind: str = "cnn", in_channels: int = 1, num_classes: int = 10) -> MLP:
        return MLP(in_channels, num_classes, hidden=(300, 100), dropout=(0.05, 0.1))

    yield "small-mlp"
    del ARCHITECTURES["small-mlp"]


@pytest.mark.slow
def test_it_learns_digits(small, tmp_path, one_thread):
    settings = {"epochs": 8, "batch_size": 50, "lr": 2.5e-3, "steps": 10, "schedule": "cosine"}
    options = Options(method="desire", data="digits", arch=small, threads=1, **settings)
    summary = train(options, load_data("digits"), tmp_path)
    assert summary["student_test_accuracy"] > 0.8
    rows = [{name: float(value) for name, value in row.items()} for row in rows_of(tmp_path / "log.csv")]
    assert rows[-1]["student_wanted"] < 0.5 * rows[0]["student_wanted"]
    assert rows[-1]["student_loss"] < rows[0]["student_loss"]


def test_stopped_within_an_epoch_and_continued_is_as_uninterrupted_and_eval_reads_it(
    small, folder_of_bars, tmp_path, one_thread, capsys
):
    options = Options(
        method="desire", data=str(folder_of_bars), arch=small, epochs=2, batch_size=16, lr=0.02, steps=8, threads=1
    )
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    data = load_data(options.data)
    train(options, data, whole)
    steps = []
    hook = register_optimizer_step_post_hook(
        lambda *_: steps.append(1) or (len(steps) == 11 and signal.raise_signal(signal.SIGTERM))
    )
    try:
        with pytest.raises(Interrupted):
            train(options, data, stopped)
    finally:
        hook.remove()
    train(options, data, stopped)
    for name in ("checkpoint.pt", "student.pt"):
        assert_same_state(*(torch.load(run / name, weights_only=True) for run in (stopped, whole)), name)

    capsys.readouterr()
    assert main(["eval", str(whole)]) == 0
    accuracy = float(rows_of(whole / "log.csv")[-1]["student_test_accuracy"])
    assert f"{100 * accuracy:.2f}" in capsys.readouterr().out
    network = RunFolder.load(whole).network("student")
    assert network.mean == data.train.mean.flatten() and network.std == data.train.std.flatten()
    assert list(layer_weights(network)) == ["classifier"]  # what `report` draws: there is no convolution


@pytest.mark.slow
def test_report_of_a_network_without_convolutions_and_without_an_adder_twin(folder_of_bars, tmp_path, one_thread):
    options = Options(method="desire", data=str(folder_of_bars), epochs=1, steps=8, threads=1)
    train(options, load_data(options.data), tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    operations = page[page.index("Operations per image") :]
    assert "<td>CNN</td>" in operations and "<td>adder network</td>" not in operations


def test_what_does_not_fit_is_refused(capsys, tmp_path):
    desire = ["--method", "desire", "--output", tmp_path / "run"]
    assert "arch: expected mlp for the method desire, got lenet5" in error_of(capsys, *desire, "--arch", "lenet5")
    assert "mixup: expected none for the method desire, got 0.2" in error_of(capsys, *desire, "--mixup", 0.2)
    assert "steps: expected at least 5 for the method desire, got 4" in error_of(capsys, *desire, "--steps", 4)
    message = error_of(capsys, "--method", "plain", "--arch", "mlp", "--output", tmp_path / "run")
    assert "kind: expected 'cnn' for mlp, which has no BatchNorm, got 'adder'" in message


def test_the_recipe_of_the_paper_and_the_network_that_goes_with_the_method():
    config = Options(recipe="desire-fashion-mnist-mlp").resolve()
    assert (config.method, config.arch, config.epochs, config.momentum) == ("desire", "mlp", 600, 0.0)
    assert config.lr / config.batch_size == pytest.approx(1e-5)
    assert Options(method="desire", data="digits").resolve().arch == METHODS["desire"].arch == "mlp"
    network = DesireTask.network(config, "student", 1, 10)
    assert [tuple(layer.weight.shape) for layer in network.layers] == [(1000, 784), (100, 1000), (10, 100)]
    assert network.dropped == (0.05, 0.4, 0.4, 0.0)
