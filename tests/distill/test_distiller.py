"""Distillation from Python: networks and data of others, own optimizer and schedule, callbacks, bitwise resume."""

import copy
import pickle
from functools import partial

import pytest
import torch
from slow import slow_except
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from adderops import AdderConv2d
from adderops.distill import Distiller
from adderops.distill.methods.matching import layer_pairs, pair_channels
from adderops.models import create_model, lenet5
from distill.runs import TIMING, assert_same_state, interrupted, rows_of

CLASSES = 4


class Bars(Dataset):
    """Images of a bright bar at one of four heights, shifted by torch's random numbers, as a user writes it."""

    def __init__(self, count: int = 48, channels: int = 1, side: int = 32) -> None:
        self.count, self.channels, self.side = count, channels, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, label = torch.randn(self.channels, self.side, self.side) * 0.3, i % CLASSES
        image[:, label * self.side // CLASSES :][:, : self.side // CLASSES] += 1
        return image, label


def bars(count: int = 48, batch_size: int = 16, channels: int = 1, **options) -> DataLoader:
    return DataLoader(Bars(count, channels), batch_size, shuffle=True, **options)


def small_student() -> nn.Module:
    """Two adder layers of 8 and 12 channels."""
    torch.manual_seed(1)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
        *(AdderConv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
        *(AdderConv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * 12, CLASSES)),
    )


def small_teacher() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Dropout2d(0.2)),
        *(nn.AdaptiveAvgPool2d((4, 1)), nn.Flatten(), nn.Linear(4 * 16, CLASSES)),
    )


def fitted(epochs: int = 2, loader: DataLoader | None = None, fit: dict | None = None, **options) -> tuple:
    """A distiller of the small networks and its history."""
    distiller = Distiller(small_teacher(), small_student(), **options)
    return distiller, distiller.fit(bars() if loader is None else loader, epochs, quiet=True, **(fit or {}))


def weights(distiller: Distiller) -> dict[str, torch.Tensor]:
    return dict(distiller.task.state_dict())


@pytest.fixture(autouse=True)
def _one_thread(set_threads):
    set_threads(1)


# --- networks of other architectures ---


@pytest.mark.slow
def test_own_data_and_networks_are_learned():
    distiller, history = fitted(epochs=8, loader=bars(96), fit={"test": bars(32)})
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert history[-1]["student_test_accuracy"] > 0.9 and history[-1]["teacher_test_accuracy"] > 0.9
    assert distiller.evaluate(bars(32))["student_test_accuracy"] > 0.9
    assert not distiller.task.networks["student"].training


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["torchvision/resnet18", "timm/mobilenetv3_small_050"])
def test_foreign_teachers_of_another_architecture(teacher):
    pytest.importorskip(teacher.partition("/")[0])
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8)), 4)
    student = create_model("resnet20")
    before = copy.deepcopy(student.state_dict())
    distiller = Distiller(create_model(teacher, "cnn"), student, frozen=True)
    [row] = distiller.fit(loader, epochs=1, quiet=True)
    assert 0 < row["l_mid"] < 4 and row["imitation"] > 0
    moved = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert {f"layer{i}.0.conv1.weight" for i in (1, 2, 3)} <= set(moved)


def test_layers_go_by_relative_depth_by_mapping_or_by_name():
    student, teacher = create_model("resnet20"), create_model("resnet32", "cnn")
    pairs = layer_pairs(student, teacher)
    assert len(pairs) == 20 and list(pairs.items())[0] == ("layer1.0.conv1", "layer1.0.conv1")
    assert list(pairs.values()) == sorted(pairs.values(), key=list(dict(teacher.named_modules())).index)
    assert list(pairs.items())[-1] == ("layer3.2.conv2", "layer3.4.conv2")
    assert list(layer_pairs(student, create_model("resnet20", "cnn")).items()) == [(n, n) for n in pairs]
    assert layer_pairs(student, teacher, {"layer1.0.conv1": "layer2.0.conv1"}) == {"layer1.0.conv1": "layer2.0.conv1"}
    assert layer_pairs(student, teacher, ["layer2.1.conv2"]) == {"layer2.1.conv2": "layer2.1.conv2"}
    assert pair_channels(student, teacher, {"layer1.0.conv1": "layer2.0.conv1"}) == [(16, 32)]


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"3": "conv9"}, r"layers: expected convolutions of the teacher, got 'conv9' \(no such layer\)"),
        (["4"], r"layers: expected convolutions of the student, got '4' \(BatchNorm2d\)"),
        ([], "layers: expected at least one pair, got none; features='none' matches no layers"),
    ],
)
def test_layers_that_are_none_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        Distiller(small_teacher(), small_student(), layers=layers)


def test_widths_that_differ_need_1x1_maps():
    with pytest.raises(
        ValueError, match="features: expected 1x1 convolutions for layers of 8 and 16 channels, got none"
    ):
        Distiller(small_teacher(), small_student(), features="kernel")


def test_l_mid_of_different_sizes_trains_student_and_maps_alone():
    distiller = Distiller(small_teacher(), small_student(), alpha=0.0, temperature=1.0)
    task = distiller.task
    images, labels = next(iter(bars()))
    losses = task(images, labels)
    losses.terms["l_mid"].backward()
    assert all(p.grad is None for p in task.networks["teacher"].parameters())
    assert task.networks["student"][6].weight.grad.abs().sum() > 0
    trained = {name: p for name, p in task.match.named_parameters() if p.requires_grad}
    assert {tuple(p.shape) for p in trained.values()} == {(1, 8, 8), (1, 8, 16), (1, 12, 12), (1, 12, 16)}
    assert all(p.grad.abs().sum() > 0 for p in trained.values())


def test_logits_of_other_classes_are_refused():
    distiller = Distiller(lenet5("cnn", num_classes=7), lenet5("adder", num_classes=CLASSES))
    with pytest.raises(
        ValueError, match=r"teacher: expected logits of shape \(16, 4\) as the student's, got \(16, 7\)"
    ):
        distiller.fit(bars(), 1, quiet=True)


def test_a_fitted_student_is_free_of_hooks():
    """It can be pickled and copied: the hooks of the training are gone."""
    distiller, _ = fitted(epochs=1)
    student = distiller.task.networks["student"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())
    again = pickle.loads(pickle.dumps(student))
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(again(images), student(images))
    distiller.fit(bars(), 1, quiet=True)  # and it can be trained on


# --- optimizer and schedule ---


def test_own_optimizer_and_schedule_as_objects():
    teacher, student = small_teacher(), small_student()
    optimizer = torch.optim.AdamW([*teacher.parameters(), *student.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    distiller = Distiller(teacher, student, optimizer=optimizer, schedule=schedule)
    before = copy.deepcopy(distiller.task.match.state_dict())
    history = distiller.fit(bars(), 3, quiet=True)
    assert [row["lr"] for row in history] == pytest.approx([2e-3, 1e-3, 5e-4])
    assert distiller.optimizer is optimizer
    after = distiller.task.match.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in before.items()), "the 1x1 maps were not trained"


def test_own_optimizer_and_schedule_as_factories_per_step():
    rates = []
    make = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=6)
    fitted(
        optimizer=partial(torch.optim.SGD, lr=0.1),
        schedule=make,
        schedule_per_step=True,
        fit={"on_step": lambda p: rates.append(p.optimizer.param_groups[0]["lr"])},
    )
    expected = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, written_out = make(expected), []
    for _ in range(6):
        expected.step()
        schedule.step()
        written_out.append(expected.param_groups[0]["lr"])
    assert rates == pytest.approx(written_out)


def test_a_schedule_by_the_test_loss():
    make = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.99)
    _, history = fitted(epochs=4, schedule=make, fit={"test": bars(16)})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule, expected = make(optimizer), []
    for row in history:
        expected.append(optimizer.param_groups[0]["lr"])
        schedule.step(row["student_test_loss"])
    assert [row["lr"] for row in history] == pytest.approx(expected)
    assert len(set(expected)) > 1


def test_an_optimizer_of_other_parameters_is_refused():
    student = small_student()
    with pytest.raises(ValueError, match="optimizer: expected one with parameters of the teacher, or frozen=True"):
        Distiller(small_teacher(), student, optimizer=torch.optim.SGD(student.parameters(), 0.1))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    Distiller(small_teacher(), student, optimizer=optimizer, frozen=True)
    other = torch.optim.SGD(student.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(other, 1)
    with pytest.raises(ValueError, match="schedule: expected one of the optimizer given"):
        Distiller(small_teacher(), student, optimizer=optimizer, schedule=schedule, frozen=True)


@pytest.mark.slow
def test_adder_weights_take_steps_of_their_own_size_under_float16_clipping_and_accumulation():
    """A step of plain SGD with lr 1 changes the weights by a root mean square of eta, or the scaler skips it."""
    student = small_student()
    weights, steps = [[student[i].weight.detach().clone() for i in (3, 6)]], []

    def measure(progress):
        weights.append([student[i].weight.detach().clone() for i in (3, 6)])
        steps.append([(a - b).square().mean().sqrt().item() for a, b in zip(weights[-1], weights[-2], strict=True)])

    distiller = Distiller(
        small_teacher(),
        student,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        amp="float16",
        clip=1e-3,
        accumulate=2,
    )
    distiller.fit(bars(16 * 12), 1, quiet=True, on_step=measure)
    taken = [step for step in steps if step != [0.0, 0.0]]
    assert len(taken) >= 3 and all(step == pytest.approx([0.2, 0.2], rel=1e-3) for step in taken)


# --- callbacks, history ---


def test_callbacks_are_told_where_training_stands():
    steps, epochs = [], []
    _, history = fitted(fit={"on_step": steps.append, "on_epoch": epochs.append, "test": bars(16)})
    assert [(p.epoch, p.step, p.images) for p in steps] == [(e, s, 16) for e in (1, 2) for s in (1, 2, 3)]
    assert [p.row for p in epochs] == history
    assert set(steps[0].networks) == {"teacher", "student"}
    for row, of_epoch in zip(history, (steps[:3], steps[3:]), strict=True):
        for name in ("student_ce", "imitation", "student_train_accuracy"):
            assert sum(p.losses[name] for p in of_epoch) / 3 == pytest.approx(row[name], rel=1e-4)


def test_a_callback_stops_the_training():
    _, history = fitted(epochs=9, fit={"on_epoch": lambda p: p.epoch == 2 and p.stop()})
    assert len(history) == 2
    seen = []
    fitted(epochs=9, fit={"on_step": lambda p: (seen.append(p.step), p.step == 2 and p.stop())})
    assert seen == [1, 2]


def test_test_every_and_patience():
    _, history = fitted(epochs=5, fit={"test": bars(16), "test_every": 2})
    assert [row["student_test_accuracy"] is not None for row in history] == [False, True, False, True, True]
    # constant images cannot be told apart: the first test is never beaten
    same = DataLoader(TensorDataset(torch.zeros(16, 1, 32, 32), torch.arange(16) % 4), 8)
    _, history = fitted(epochs=9, loader=same, fit={"test": same, "patience": 3})
    assert len(history) == 4
    with pytest.raises(ValueError, match="patience: expected images to test on"):
        fitted(fit={"patience": 1})


# --- nothing is lost ---


@pytest.mark.parametrize("after", slow_except([3], [2, 3, 4]))
@pytest.mark.parametrize("workers", slow_except([0], [0, 1]))
def test_interrupted_and_continued_is_as_uninterrupted(tmp_path, after, workers):
    """Random data, random order, dropout, mixup, a moving average: within an epoch and between two."""
    if workers and after != 4:
        pytest.skip("workers take seconds: one moment is tried")
    options = {"mix": v2.MixUp(num_classes=CLASSES), "ema": 0.9, "accumulate": 2}
    loader = bars(num_workers=workers)
    fit = {"test": bars(16)}
    whole, history = fitted(loader=loader, fit=fit | {"folder": tmp_path / "whole"}, **options)
    without, _ = fitted(loader=loader, fit=fit, **options)
    assert_same_state(weights(without), weights(whole))
    with interrupted(after):
        fitted(loader=loader, fit=fit | {"folder": tmp_path / "stopped"}, **options)
    torch.manual_seed(99)  # the caller's random numbers have no part in it
    continued, rows = fitted(loader=loader, fit=fit | {"folder": tmp_path / "stopped"}, **options)
    assert_same_state(weights(continued), weights(whole))
    assert_same_state(dict(continued.average.state_dict()), dict(whole.average.state_dict()))
    assert [{k: v for k, v in r.items() if k not in TIMING} for r in rows] == [
        {k: v for k, v in r.items() if k not in TIMING} for r in history
    ]
    names = {"checkpoint.pt", "log.csv", "layers.csv", "student.pt", "student_ema.pt", "teacher.pt"}
    assert names <= {p.name for p in (tmp_path / "stopped").iterdir()}
    assert len(rows_of(tmp_path / "stopped" / "log.csv")) == 2
    saved = torch.load(tmp_path / "stopped" / "student.pt", weights_only=True)
    assert_same_state(dict(saved), dict(continued.task.networks["student"].state_dict()))


def test_the_folder_of_another_training_is_refused(tmp_path):
    fitted(epochs=1, fit={"folder": tmp_path})
    with pytest.raises(
        ValueError, match="expected the configuration of the run in this folder, got another: alpha 1.0 -> 2"
    ):
        fitted(epochs=1, fit={"folder": tmp_path}, alpha=2.0)
    other = Distiller(small_teacher(), lenet5("adder", num_classes=CLASSES))
    with pytest.raises(ValueError, match="checkpoint.pt: expected a checkpoint of this run"):
        other.fit(bars(), 1, folder=tmp_path, quiet=True)


def test_the_callers_random_numbers_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    student, teacher = small_student(), small_teacher()
    torch.manual_seed(5)
    Distiller(teacher, student).fit(bars(), 1, quiet=True)
    assert torch.equal(torch.rand(3), expected)


# --- batches ---


@pytest.mark.parametrize("count, batch_size, accumulate", [(17, 16, 1), (35, 16, 2), (33, 32, 4)])
def test_a_last_batch_too_small_for_its_parts_joins_the_one_before(count, batch_size, accumulate):
    seen = []
    options = {"accumulate": accumulate, "fit": {"on_step": lambda p: seen.append(p.images)}}
    _, [row] = fitted(epochs=1, loader=bars(count, batch_size), **options)
    assert sum(seen) == count and min(seen) >= 2 * accumulate
    assert row["student_loss"] > 0


def test_what_is_no_loader_is_refused():
    with pytest.raises(ValueError, match="loader: expected batches, got a Dataset: put it into a DataLoader"):
        fitted(loader=Bars())
    with pytest.raises(ValueError, match="loader: expected one that can be iterated again"):
        fitted(loader=iter([1]))
    with pytest.raises(ValueError, match=r"loader: expected batches \(images, labels\)"):
        fitted(loader=[torch.zeros(4, 1, 32, 32)])
    with pytest.raises(ValueError, match="loader: expected more than 0 batches per epoch, got 0"):
        fitted(loader=[])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0.0}, "Distiller: temperature: expected a finite number of at least 0.001"),
        ({"amp": "half"}, "Distiller: amp: expected one of bfloat16, float16, got 'half'"),
        ({"beta": float("nan")}, "Distiller: beta: expected a finite number"),
        ({"features": "all"}, "Distiller: features: expected one of none"),
    ],
)
def test_arguments_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(small_teacher(), small_student(), **options)


@pytest.mark.slow
def test_class_weights_and_their_number():
    with pytest.raises(ValueError, match="class_weights: expected one for each of 4 classes, got 3"):
        fitted(class_weights=torch.ones(3))
    plain, _ = fitted(epochs=1)
    ones, _ = fitted(epochs=1, class_weights=torch.ones(CLASSES))
    other, _ = fitted(epochs=1, class_weights=torch.tensor([1.0, 1.0, 1.0, 9.0]))
    last = "networks.student.11.weight"
    torch.testing.assert_close(weights(ones)[last], weights(plain)[last], rtol=1e-3, atol=1e-3)
    assert (weights(other)[last] - weights(plain)[last]).abs().max() > 0.01
