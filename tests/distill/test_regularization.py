"""Regularization, schedule and tests: each option has its effect, and a run with it resumes with the same bits."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adderops.distill import LabelLoss, PKKDTask, SingleTask, main, train, trainer
from adderops.distill.build import build_mix, build_optimizer
from adderops.distill.checkpoint import load_checkpoint, save_checkpoint
from adderops.distill.config import DROPPED
from adderops.distill.evaluate import correct
from adderops.distill.runs.folder import RunFolder
from adderops.distill.schedule import make_schedule
from adderops.models import create_model
from distill.runs import TIMING, assert_same_state, interrupted, keep_tasks, rows_of

CPU = torch.device("cpu")


def load(path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1, "class_weights": "balanced"},
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                {"mixup": 0.4, "cutmix": 1.0, "accumulate": 2, "ema": 0.9},
                {"warmup_epochs": 1, "test_every": 2, "rifle": 2},
                {"warmup_epochs": 1, "lr_per_step": True, "rifle": 2},
                {"amp": "float16", "clip": 1.0},
                {"validation": 16, "patience": 5},
                {"reestimate_batchnorm": 40, "method": "plain"},
                {"optimizer": "adamw", "schedule": "one-cycle", "lr_per_step": True, "beta2": 0.99},
                {"optimizer": "adam", "schedule": "exponential", "method": "dsr", "steps": 3, "ema": 0.9},
            )
        ),
    ],
    ids=lambda options: "-".join(options),
)
def test_a_run_with_it_continues_as_uninterrupted(config, tmp_path, options):
    from adderops.distill.build import load_data_of

    config = replace(config, epochs=3, **options)
    data = load_data_of(config.resolve())
    train(config, data, tmp_path / "whole")
    with interrupted(after=11):
        train(config, data, tmp_path / "stopped")
    assert load(tmp_path / "stopped" / "checkpoint.pt")["step"] != 0
    train(config, data, tmp_path / "stopped")
    files = {p.name for p in (tmp_path / "whole").glob("*.pt")}
    assert {"checkpoint.pt", "student.pt", "student_best.pt"} <= files
    for name in files:
        assert_same_state(load(tmp_path / "stopped" / name), load(tmp_path / "whole" / name), name)
    logs = [rows_of(tmp_path / folder / "log.csv") for folder in ("stopped", "whole")]
    assert [[{k: v for k, v in row.items() if k not in TIMING} for row in rows] for rows in logs][0] == [
        {k: v for k, v in row.items() if k not in TIMING} for row in logs[1]
    ]


# --- the labels ---


def test_label_loss_is_the_formula():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    weights, smoothing = torch.tensor([1.0, 2.0, 5.0]), 0.3
    shares = (1 - smoothing) * torch.eye(3)[labels] + smoothing / 3
    expected = -(weights * shares * logits.log_softmax(1)).sum() / 6
    for target in (labels, torch.eye(3)[labels]):
        torch.testing.assert_close(LabelLoss(smoothing, weights)(logits, target), expected)
    assert torch.equal(LabelLoss()(logits, labels), torch.nn.functional.cross_entropy(logits, labels))
    parts = [LabelLoss(smoothing, weights)(logits[i : i + 3], labels[i : i + 3]) for i in (0, 3)]
    torch.testing.assert_close(sum(parts) / 2, expected), "parts of a batch add up"


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_smoothing_and_weights_reach_both_networks(config, data, role):
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8) % 4
    config = config.resolve()
    plain = PKKDTask.build(config, data, CPU)(images, labels)
    for changes in ({"label_smoothing": 0.2}, {"class_weights": "1,2,3,4"}):
        changed = replace(config, **changes)
        losses = PKKDTask.build(changed, data, CPU)(images, labels)
        logits = losses.logits[role]
        assert torch.equal(logits, plain.logits[role])
        expected = LabelLoss.build(changed, data)(logits, labels)
        assert losses.terms[f"{role}_ce"].item() == expected.item() != plain.terms[f"{role}_ce"].item()


def test_balanced_weights_are_the_inverse_of_the_numbers_of_images(config, data):
    held = data.train.labels
    uneven = replace(data, train=type(data.train)(data.train.source, data.train.indices[held < 2], *_statistics(data)))
    weights = LabelLoss.build(replace(config, class_weights="balanced").resolve(), uneven).class_weights
    counts = uneven.train.labels.bincount(minlength=4)
    assert weights[:2].tolist() == pytest.approx([len(uneven.train) / (4 * n) for n in counts[:2].tolist()])
    with pytest.raises(ValueError, match="class_weights: expected 4, one for each class, got 2"):
        LabelLoss.build(replace(config, class_weights="1,2").resolve(), data)


def _statistics(data):
    return data.train.mean, data.train.std


@pytest.mark.slow
def test_mixed_labels_in_loss_and_accuracy(config, data, tmp_path):
    torch.manual_seed(0)
    images, labels = torch.rand(16, 1, 32, 32), torch.arange(16) % 4
    for options, pixelwise in (({"mixup": 1.0}, True), ({"cutmix": 1.0}, False)):
        mixed, shares = build_mix(replace(config, **options), 4)(images, labels)
        assert shares.shape == (16, 4) and torch.allclose(shares.sum(1), torch.ones(16))
        own = (mixed == images).flatten(1).float().mean(1)
        assert (own.max() < 0.01) if pixelwise else torch.allclose(own, shares.gather(1, labels[:, None])[:, 0])
    both = build_mix(replace(config, mixup=1.0, cutmix=1.0), 4)
    kinds = {bool((both(images, labels)[0] == images).flatten(1).float().mean() > 0.01) for _ in range(20)}
    assert kinds == {True, False}, "one of the two by chance"
    assert build_mix(config, 4) is None
    assert correct(torch.eye(2), torch.tensor([[0.7, 0.3], [0.0, 1.0]])).item() == pytest.approx(1.7)
    summaries = [train(replace(config, mixup=alpha), data, tmp_path / str(alpha)) for alpha in (0.0, 1.0)]
    assert summaries[1]["student_train_accuracy"] not in (0.0, summaries[0]["student_train_accuracy"])


# --- schedule, tests, best ---


def test_warm_up_rises_to_the_learning_rate_and_the_cosine_follows(config, data, tmp_path):
    train(replace(config, epochs=6, warmup_epochs=2, method="cnn"), data, tmp_path)
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "log.csv")]
    assert rates == pytest.approx([0.1 / 3, 0.2 / 3, 0.1, 0.05 * (1 + 0.5**0.5), 0.05, 0.05 * (1 - 0.5**0.5)], rel=1e-5)


def test_learning_rate_of_each_step(config, data, tmp_path):
    """The cosine over all steps; the log has the rate after the last step of an epoch, that of the run is 0."""
    rates = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        train(replace(config, epochs=3, lr_per_step=True, method="cnn"), data, tmp_path)
    finally:
        hook.remove()
    assert len(rates) > 3
    expected = [0.05 * (1 + math.cos(math.pi * step / len(rates))) for step in range(len(rates) + 1)]
    assert rates == pytest.approx(expected[:-1])
    logged = [float(row["lr"]) for row in rows_of(tmp_path / "log.csv")]
    assert logged == pytest.approx(expected[len(rates) // 3 :: len(rates) // 3], abs=1e-8)


@pytest.mark.parametrize("epochs", [4, 11])
def test_one_cycle_is_that_of_torch(epochs):
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5) for _ in range(2))
    schedules = (
        make_schedule(ours, epochs, steps_per_epoch=3, kind="one-cycle"),
        OneCycleLR(theirs, max_lr=0.5, total_steps=3 * epochs, cycle_momentum=False),
    )
    for _ in range(3 * epochs - 1):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("per_step", [False, True])
def test_the_exponential_rate_falls_by_the_epoch(config, data, tmp_path, per_step):
    train(replace(config, epochs=3, method="cnn", schedule="exponential", lr_per_step=per_step), data, tmp_path)
    rates = [float(row["lr"]) for row in rows_of(tmp_path / "log.csv")]
    assert rates == pytest.approx([0.1 * math.exp(-0.04 * (epoch + per_step)) for epoch in range(3)], rel=1e-5)


def test_optimizers_and_their_options(config):
    task = SingleTask(torch.nn.Linear(2, 2), "student")
    values = {"lr": 0.25, "momentum": 0.75, "beta2": 0.5, "weight_decay": 0.125, "method": "cnn"}
    built = {
        name: build_optimizer(replace(config, optimizer=name, **values).resolve(), task)
        for name in ("sgd", "adam", "adamw")
    }
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    for name, optimizer in built.items():
        group = optimizer.param_groups[0]
        assert type(optimizer) is kinds[name] and (group["lr"], group["weight_decay"]) == (0.25, 0.125)
        assert group["momentum"] == 0.75 if name == "sgd" else group["betas"] == (0.75, 0.5)
    assert not replace(config, momentum=0).resolve().nesterov  # which needs momentum


@pytest.mark.slow
def test_tests_are_as_seldom_as_asked(options, tmp_path, capsys):
    """The epochs between have empty cells; compare, report and eval take the run."""
    run = tmp_path / "run"
    arguments = ["--method", "plain", "--epochs", "5", "--test-every", "2", "--output", str(run)]
    assert main([*options, *arguments]) == 0
    cells = [row["student_test_accuracy"] for row in rows_of(run / "log.csv")]
    assert [bool(cell) for cell in cells] == [False, True, False, True, True]
    [row] = RunFolder.load(run).results()
    assert row["test_accuracy"] == float(cells[4])
    assert row["best_test_accuracy"] == max(float(cell) for cell in cells if cell) and row["best_epoch"] in (2, 4, 5)
    for command in ("eval", "compare", "report"):
        assert main([command, str(run)]) == 0, capsys.readouterr().err


def test_patience_ends_the_run_and_the_best_is_saved(config, tmp_path, capsys):
    """At a learning rate of 0 nothing is ever better than the first test."""
    from adderops.distill.build import load_data_of

    config = replace(config, method="plain", epochs=9, lr=0.0, weight_decay=0.0, validation=16, patience=2)
    data = load_data_of(config.resolve())
    summary = train(config, data, tmp_path)
    assert summary["epochs_done"] == 3 and summary["student_best_epoch"] == 1
    assert train(config, data, tmp_path) == summary, "a finished run continues"
    assert len(rows_of(tmp_path / "log.csv")) == 3


def test_best_network_is_that_of_its_best_epoch(config, data, tmp_path, capsys):
    config = replace(config, method="plain", epochs=5)
    kept = {}
    save = trainer.save_checkpoint

    def keep(path, content):
        networks = {k.removeprefix("networks.student."): v.clone() for k, v in content["task"].items()}
        kept[content["epoch"]] = {k: v for k, v in networks.items() if not k.startswith("match")}
        save(path, content)

    trainer.save_checkpoint = keep
    try:
        summary = train(config, data, tmp_path)
    finally:
        trainer.save_checkpoint = save
    accuracies = [float(row["student_test_accuracy"]) for row in rows_of(tmp_path / "log.csv")]
    best = accuracies.index(max(accuracies)) + 1
    assert summary["student_best_epoch"] == best
    assert_same_state(dict(load(tmp_path / "student_best.pt")), kept[best])
    assert main(["eval", str(tmp_path), "--weights", "student_best"]) == 0
    assert f"{100 * max(accuracies):.2f} %" in capsys.readouterr().out
    output = tmp_path / "best.pt"
    arguments = [
        "export",
        str(tmp_path),
        "--weights",
        "student_best",
        "--format",
        "state_dict",
        "--output",
        str(output),
    ]
    assert main(arguments) == 0
    assert_same_state(dict(load(output)), dict(load(tmp_path / "student_best.pt")))
    assert main(["eval", str(tmp_path), "--weights", "teacher_best"]) == 2
    assert "weights: expected student or student_best" in capsys.readouterr().err


# --- BatchNorm ---


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pkkd", "cnn"])
def test_reestimated_statistics_are_those_of_the_images_and_change_no_weight(config, data, tmp_path, method):
    from adderops import reestimate_batchnorm
    from adderops.distill.data import calibration_batches

    config = replace(config, method=method, ema=0.9)
    for count in (0, 25):
        train(replace(config, reestimate_batchnorm=count), data, tmp_path / str(count))
    for name in [p.name for p in (tmp_path / "0").glob("*.pt") if p.stem in ("student", "student_ema", "teacher")]:
        lagging, ours = (load(tmp_path / count / name) for count in ("0", "25"))
        kind = "cnn" if name.startswith("teacher") else "adder"
        network = create_model("lenet5", kind, 1, 4).eval()
        network.load_state_dict(lagging)
        expected = reestimate_batchnorm(network, calibration_batches(data.train, 4 * 25)).state_dict()
        assert_same_state(dict(ours), dict(expected), name)
        assert not torch.equal(ours["bn1.running_mean"], lagging["bn1.running_mean"])


def test_a_frozen_teacher_keeps_its_statistics(config, data, tmp_path):
    train(replace(config, method="cnn", reestimate_batchnorm=0), data, tmp_path / "cnn")
    given = tmp_path / "cnn" / "teacher.pt"
    train(replace(config, teacher="frozen", teacher_checkpoint=str(given)), data, tmp_path / "pkkd")
    assert_same_state(dict(load(tmp_path / "pkkd" / "teacher.pt")), dict(load(given)))


@pytest.mark.slow
def test_test_accuracy_follows_the_training_accuracy_from_the_start(tmp_path, set_threads):
    """Digits after two epochs: 16 % with running averages, 95 % with 512 images; training accuracy 91 %."""
    set_threads(1)
    arguments = "--data digits --method plain --epochs 2 --threads 1 --no-nesterov".split()
    found = {}
    for count in ("0", "512"):
        assert main([*arguments, "--reestimate-batchnorm", count, "--output", str(tmp_path / count)]) == 0
        found[count] = [float(row["student_test_accuracy"]) for row in rows_of(tmp_path / count / "log.csv")]
        trained = float(rows_of(tmp_path / count / "log.csv")[0]["student_train_accuracy"])
    assert found["0"][0] < 0.2 and found["512"][0] > trained


# --- float16 ---


@pytest.mark.slow
def test_float16_scales_the_loss_and_adder_layers_keep_their_rate(config, data, tmp_path, monkeypatch):
    tasks, rms = keep_tasks(monkeypatch), []
    dtypes = set()
    conv = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: _record(dtypes, conv(self, x)))
    before = {}

    def keep(optimizer, *_):
        before["w"] = tasks[-1].networks["student"].conv3.weight.detach().clone()

    def measure(optimizer, *_):
        group = optimizer.param_groups[0]
        step = (tasks[-1].networks["student"].conv3.weight - before["w"]) / group["lr"]
        rms.append(step.square().mean().sqrt().item())

    hooks = [register_optimizer_step_pre_hook(keep), register_optimizer_step_post_hook(measure)]
    try:
        summary = train(replace(config, amp="float16", epochs=3, nesterov=False, weight_decay=0.0), data, tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert dtypes == {torch.float16}
    assert rms[0] == pytest.approx(0.2, rel=1e-3)  # later steps carry momentum
    assert summary["student_train_accuracy"] > 0.3  # four classes, 24 steps
    assert load(tmp_path / "checkpoint.pt")["scaler"]["scale"] > 1


def _record(dtypes: set, output: torch.Tensor) -> torch.Tensor:
    dtypes.add(output.dtype)
    return output


# --- teachers of other architectures ---


@pytest.mark.slow
def test_a_teacher_of_another_architecture_and_its_pretrained_file(tmp_path, set_threads, capsys):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    set_threads(1)
    name = "resnet10t"
    torch.manual_seed(0)
    pretrained = timm.create_model(name, in_chans=1, num_classes=10)
    safetensors.save_file(pretrained.state_dict(), tmp_path / "model.safetensors")
    torch.save(pretrained.state_dict(), tmp_path / "model.pth")
    for file in ("model.safetensors", "model.pth"):
        run = tmp_path / file.replace(".", "-")
        arguments = (
            f"--method pkkd --teacher frozen --teacher-arch timm/{name} --train-images 20 --batch-size 10 --epochs 1"
        )
        arguments = [*arguments.split(), "--threads", "1", "--teacher-checkpoint", str(tmp_path / file)]
        assert main([*arguments, "--output", str(run)]) == 0, capsys.readouterr().err
        assert_same_state(dict(load(run / "teacher.pt")), dict(pretrained.state_dict()))
    assert main(["eval", str(run)]) == 0
    (tmp_path / "damaged.safetensors").write_bytes(b"1234567890")
    arguments[-1] = str(tmp_path / "damaged.safetensors")
    assert main([*arguments, "--output", str(tmp_path / "r")]) == 2
    assert "damaged.safetensors: expected a whole state_dict" in capsys.readouterr().err


# --- older runs ---


@pytest.mark.slow
def test_a_run_of_an_older_version_is_continued(config, data, tmp_path):
    """Its configuration and its checkpoint have other entries, and `amp` is true or false."""
    config = replace(config, amp="bfloat16", reestimate_batchnorm=512, epochs=3)
    train(config, data, tmp_path / "whole")
    with interrupted(after=11):
        train(config, data, tmp_path / "old")
    path = tmp_path / "old" / "checkpoint.pt"
    state = load_checkpoint(path)
    new = (
        "test_every patience label_smoothing mixup cutmix class_weights warmup_epochs lr_per_step reestimate_batchnorm "
        "teacher_arch"
    )
    old_config = {k: v for k, v in config.resolve().flat().items() if k not in new.split()} | {"amp": True} | DROPPED
    for group in state["optimizer"]["param_groups"]:
        del group["initial_lr"]
    del state["sums"]["images"]
    state = {k: v for k, v in state.items() if k not in ("format", "schedule", "best")} | {"config": old_config}
    save_checkpoint(path, state)
    (tmp_path / "old" / "config.json").write_text(json.dumps(old_config))
    assert main(["--resume", str(tmp_path / "old")]) == 0
    for name in ("student.pt", "teacher.pt"):
        assert_same_state(dict(load(tmp_path / "old" / name)), dict(load(tmp_path / "whole" / name)), name)
