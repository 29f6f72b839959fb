"""The trainer: kill -9 and resume, atomic files, one log row an epoch, separation of the networks, clear errors."""

import csv
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx_bytes
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adderops import AdderConv2d
from adderops.distill import Config, Dataset, load_dataset, train, trainer
from adderops.distill.__main__ import _open_run, _parser, main
from adderops.distill.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from adderops.distill.data import IDX_FILES
from adderops.distill.trainer import build_task, learning_rate
from adderops.models import lenet5

TIMING = {"seconds", "images_per_second"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 28x28 images of a bright bar at one of four heights: the label."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (count, 28, 28), generator=generator)
    labels = torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[7 * label : 7 * label + 5] += 150
    return images, labels


@pytest.fixture(scope="session")
def folder_of_bars(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bars")
    for array, name in zip((*bars(128, seed=1), *bars(40, seed=2)), IDX_FILES, strict=True):
        (folder / name).write_bytes(idx_bytes(array))
    return folder


@pytest.fixture
def options(folder_of_bars) -> list[str]:
    return f"--data {folder_of_bars} --epochs 2 --batch-size 16 --threads 1".split()


@pytest.fixture
def dataset(folder_of_bars) -> Dataset:
    return load_dataset(str(folder_of_bars))


@pytest.fixture
def config(folder_of_bars) -> Config:
    return Config(data=str(folder_of_bars), method="pkkd", epochs=2, batch_size=16, threads=1)


def rows_of(log: Path) -> list[dict[str, str]]:
    with open(log) as file:
        return list(csv.DictReader(file))


def assert_same_state(a: object, b: object, where: str = "checkpoint") -> None:
    """Same structure, same bits."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMING:
            assert_same_state(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# --- kill and resume ---


def test_resume_after_kill_9_ends_with_the_same_bits(options, tmp_path):
    epochs = 6
    options = [*options, "--method", "pkkd", "--epochs", str(epochs)]
    command = [sys.executable, "-m", "adderops.distill"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen([*command, *options, "--output", str(killed)], stdout=subprocess.DEVNULL)
    log = killed / "log.csv"
    while process.poll() is None and not (log.exists() and len(rows_of(log)) >= 2):
        time.sleep(0.005)
    time.sleep(0.03)  # into the next epoch
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    at_kill = rows_of(log)
    assert 2 <= len(at_kill) < epochs
    # whatever the moment of the kill, a part-written file and a log without its last row must not disturb
    (killed / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")

    subprocess.run([*command, "--resume", str(killed)], stdout=subprocess.DEVNULL, check=True)
    assert main([*options, "--output", str(whole)]) == 0

    for name in ("checkpoint.pt", "student.pt", "teacher.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (killed, whole))
        assert_same_state(ours, theirs, name)
    resumed, uninterrupted = rows_of(killed / "log.csv"), rows_of(whole / "log.csv")
    assert [row["epoch"] for row in resumed] == [str(e) for e in range(1, epochs + 1)]
    assert resumed[: len(at_kill)] == at_kill
    assert [{k: v for k, v in row.items() if k not in TIMING} for row in resumed] == [
        {k: v for k, v in row.items() if k not in TIMING} for row in uninterrupted
    ]


@pytest.mark.parametrize("writer", ["save_checkpoint", "write_csv"])
@pytest.mark.parametrize("method, epoch", [("pkkd", 1), ("pkkd", 2), ("plain", 2), ("cnn", 2)])
def test_interrupted_before_either_file_of_an_epoch(config, dataset, tmp_path, monkeypatch, writer, method, epoch):
    """Before the checkpoint, or between it and the log: the continued run has each row once, and the same bits."""
    config = Config(**{**vars(config), "method": method, "epochs": 3})
    train(config, dataset, tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(path, content):
        rows = content if writer == "write_csv" else content["log"]
        if len(rows) == epoch:
            raise Stop
        return write(path, content)

    write = getattr(trainer, writer)
    monkeypatch.setattr(trainer, writer, stop)
    with pytest.raises(Stop):
        train(config, dataset, tmp_path / "stopped")
    monkeypatch.undo()
    train(config, dataset, tmp_path / "stopped")
    assert [row["epoch"] for row in rows_of(tmp_path / "stopped" / "log.csv")] == ["1", "2", "3"]
    ours, theirs = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("stopped", "whole"))
    assert_same_state(ours, theirs)


def test_checkpoint_restores_the_random_states(tmp_path):
    save_checkpoint(tmp_path / "c.pt", {"x": 1})
    before = random.random(), np.random.rand(), torch.rand(2).tolist()
    assert load_checkpoint(tmp_path / "c.pt")["x"] == 1
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == before


def test_a_write_killed_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    size = 20_000_000
    program = f"""
from pathlib import Path
from adderops.distill.checkpoint import write_atomically
path, i = Path({str(tmp_path / "file")!r}), 0
while True:
    write_atomically(path, bytes([i % 256]) * {size})
    i += 1
"""
    path = tmp_path / "file"
    for delay in (0.01, 0.08):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", program])
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == size and content == content[:1] * size


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_resume_of_a_finished_run_changes_nothing(config, dataset, tmp_path):
    summary = train(config, dataset, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".pt"}
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    assert train(config, dataset, tmp_path) == summary
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".pt"} == before
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint


# --- the method ---


def test_teacher_of_pkkd_is_the_cnn_trained_alone(config, dataset, tmp_path):
    """End to end: neither distillation nor the shared optimizer leaves a trace in the teacher, bit for bit."""
    for method in ("pkkd", "cnn"):
        train(Config(**{**vars(config), "method": method, "beta": 3.0}), dataset, tmp_path / method)
    ours, alone = (torch.load(tmp_path / m / "teacher.pt", weights_only=True) for m in ("pkkd", "cnn"))
    assert_same_state(dict(ours), dict(alone), "teacher")


def test_students_of_pkkd_and_plain_start_alike(config, dataset):
    tasks = {m: build_task(Config(**{**vars(config), "method": m}), dataset) for m in ("pkkd", "plain", "cnn")}
    student = tasks["pkkd"].networks["student"].state_dict()
    assert_same_state(dict(student), dict(tasks["plain"].networks["student"].state_dict()))
    teacher = tasks["pkkd"].networks["teacher"].state_dict()
    assert_same_state(dict(teacher), dict(tasks["cnn"].networks["teacher"].state_dict()))
    assert not torch.equal(student["conv1.weight"], teacher["conv1.weight"])
    other = build_task(Config(**{**vars(config), "seed": 1}), dataset).networks["student"].state_dict()
    assert not torch.equal(student["conv1.weight"], other["conv1.weight"])


def test_adder_gradients_are_scaled_to_rms_eta_just_before_each_step(config, dataset, tmp_path, monkeypatch):
    tasks, before, after = [], [], []
    monkeypatch.setattr(trainer, "build_task", lambda *a: tasks.append(build_task(*a)) or tasks[-1])

    def gradient_rms() -> list[float]:
        layers = [m for m in tasks[0].modules() if isinstance(m, AdderConv2d)]
        weights = [layer.weight for layer in layers] + [tasks[0].networks["student"].conv1.weight]
        return [w.grad.square().mean().sqrt().item() for w in weights]

    def record_before(optimizer, *_) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in tasks[0].parameters()}
        before.append(gradient_rms())  # hooks of all optimizers come before an optimizer's own

    hooks = [
        register_optimizer_step_pre_hook(record_before),
        register_optimizer_step_post_hook(lambda *_: after.append(gradient_rms())),
    ]
    try:
        train(config, dataset, tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(before) == len(after) == 2 * 8
    for raw, scaled in zip(before, after, strict=True):
        # the norm of some 50,000 squares summed in float32 at worst one by one
        assert scaled[:-1] == pytest.approx([0.2] * 3, rel=1e-3)
        assert all(r != pytest.approx(0.2, rel=1e-2) for r in raw[:-1]), "the layers scaled them in their backward pass"
        assert raw[-1] == scaled[-1] != pytest.approx(0.2, rel=1e-2)


def test_recipe_reaches_the_optimizer(config, dataset, tmp_path):
    for arch, nesterov in (("lenet5", True), ("resnet20", False)):
        assert Config(arch=arch).resolve().nesterov is nesterov
    assert Config().resolve().batch_size == 64 and Config(data="fashion-mnist").resolve().epochs == 50
    train(config, dataset, tmp_path)
    [group] = load_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)
    assert group["lr"] == learning_rate(config, epoch=1) == pytest.approx(0.05)
    assert [learning_rate(Config(lr=0.4, epochs=4), e) for e in range(5)] == pytest.approx(
        [0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0.2 * (1 - 0.5**0.5), 0.0]
    )


def test_it_learns_and_the_saved_student_is_the_one_that_was_tested(config, dataset, tmp_path):
    summary = train(Config(**{**vars(config), "epochs": 8}), dataset, tmp_path)
    student = lenet5("adder", num_classes=4).eval()
    student.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    with torch.no_grad():
        predicted = student(dataset.normalize(dataset.test_images)).argmax(1)
    accuracy = (predicted == dataset.test_labels).double().mean().item()
    assert summary["student_test_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.8 and summary["teacher_test_accuracy"] > 0.8  # four equal classes: chance is 0.25


# --- what a run leaves behind ---


def test_run_folder(options, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*options, "--method", "pkkd", "--alpha", "0.5", "--output", str(run)]) == 0
    assert {p.name for p in run.iterdir()} == {
        *("config.json", "log.csv", "checkpoint.pt", "summary.json", "student.pt", "teacher.pt")
    }
    written = json.loads((run / "config.json").read_text())
    assert written["alpha"] == 0.5 and written["nesterov"] is True and None not in written.values()

    rows = rows_of(run / "log.csv")
    assert len(rows) == 2
    for epoch, row in enumerate(rows):
        assert int(row["epoch"]) == epoch + 1
        values = {name: float(value) for name, value in row.items()}
        assert all(map(math.isfinite, values.values()))
        assert values["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * epoch / 2)) / 2)
        # means over the epoch keep the equation of the loss; log values have six digits
        assert values["student_loss"] == pytest.approx(0.1 * values["l_mid"] + values["l_blend"], rel=1e-5)
        assert {f"{r}_{s}_accuracy" for r in ("teacher", "student") for s in ("train", "test")} <= values.keys()
        assert {"mid_gradient_ratio_max", "var_yc_min", "width_a_min", "width_a_max", "width_c_min"} <= values.keys()
        assert values["images_per_second"] == pytest.approx(128 / values["seconds"], rel=1e-4)

    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_images"] == 128 and summary["test_images"] == 40 and summary["method"] == "pkkd"
    assert summary["student_test_accuracy"] == float(rows[-1]["student_test_accuracy"])
    assert "--alpha 0.5" in summary["command"] and "--epochs 2" in summary["command"]
    printed = capsys.readouterr().out
    assert "student: adder network, by PKKD" in printed and str(run) in printed


def test_command_of_the_summary_starts_the_same_run(config):
    config = Config(**{**vars(config), "lr": 0.07, "seed": 5}).resolve()
    words = config.command().split()
    assert words[:3] == ["python", "-m", "adderops.distill"]
    assert _open_run(_parser(), vars(_parser().parse_args(words[3:])))[0] == config


def test_default_method_compares_and_continues(options, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"

    def interrupted(config, *args):
        if config.method == "plain":
            raise KeyboardInterrupt
        return train(config, *args)

    monkeypatch.setattr("adderops.distill.__main__.train", interrupted)
    assert main([*options, "--output", str(run)]) == 130
    assert f"continue with --resume {run}" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["--resume", str(run)]) == 0
    table = capsys.readouterr().out
    summaries = json.loads((run / "summary.json").read_text())
    assert [summary["method"] for summary in summaries] == ["pkkd", "plain"]
    accuracies = [summaries[0]["teacher_test_accuracy"], *(s["student_test_accuracy"] for s in summaries)]
    lines = [line for line in table.splitlines() if "+-" in line]
    assert [line.split(":")[0] for line in lines] == ["teacher", "student", "plain"]
    assert [float(line.split()[-4]) for line in lines] == pytest.approx([100 * a for a in accuracies], abs=0.005)


# --- errors ---


def fails(capsys, arguments: list[str], *expected: str) -> None:
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("adderops.distill: error: ") and "Traceback" not in message
    for text in expected:
        assert text in message


def test_existing_output_and_wrong_resume(options, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    fails(capsys, [*options, "--output", str(tmp_path / "run")], "exists; continue it with --resume")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    fails(capsys, ["--resume", str(tmp_path / "run")], "expected a run folder", "without a config.json")
    (tmp_path / "run" / "config.json").write_text('{"epoch": 3}')
    fails(capsys, ["--resume", str(tmp_path / "run")], "config.json: expected a configuration", "epoch")
    with pytest.raises(SystemExit):
        main(["--resume", str(tmp_path / "run"), "--lr", "0.2", "--batch-size", "8"])
    assert "drop --batch-size, --lr" in capsys.readouterr().err


def test_missing_data_leaves_no_run_folder(tmp_path, capsys):
    run = tmp_path / "run"
    fails(capsys, ["--data", str(tmp_path / "none"), "--output", str(run)], "no folder", "fashion-mnist")
    assert not run.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--epochs", "0"], "epochs: expected a finite number of at least 1, got 0"),
        (["--batch-size", "1"], "batch_size: expected a finite number of at least 2, got 1"),
        (["--batch-size", "4000"], "batch_size: expected at most the 1297 images, got 4000"),
        (["--lr", "nan"], "lr: expected a finite number of at least 0, got nan"),
        (["--beta", "-1"], "beta: expected a finite number of at least 0, got -1.0"),
        (["--seed", "-3"], "seed: expected a finite number of at least 0 and at most 4294967295, got -3"),
    ],
)
def test_values_out_of_range(arguments, message, tmp_path, capsys):
    fails(capsys, [*arguments, "--output", str(tmp_path / "run")], message)
    with pytest.raises(ValueError, match="arch: expected one of lenet5, resnet20, got 'vgg'"):
        Config(arch="vgg")


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "missing"])
def test_damaged_checkpoint(options, tmp_path, capsys, damage):
    run = tmp_path / "run"
    assert main([*options, "--method", "plain", "--output", str(run)]) == 0
    checkpoint = run / "checkpoint.pt"
    content = bytearray(checkpoint.read_bytes())
    expected = "expected a whole checkpoint, got a damaged one"
    if damage == "cut":
        checkpoint.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        checkpoint.write_bytes(content)
    elif damage == "foreign":
        torch.save({"model": torch.zeros(3)}, checkpoint)
        expected = "expected a checkpoint of format 1"
    else:
        checkpoint.unlink()
        expected = "no checkpoint"
    fails(capsys, ["--resume", str(run)], str(checkpoint), expected)


def test_another_configuration_is_not_continued(config, dataset, tmp_path):
    train(config, dataset, tmp_path)
    with pytest.raises(ValueError, match=r"lr 0\.1 -> 0\.2"):
        train(Config(**{**vars(config), "lr": 0.2}), dataset, tmp_path)


@pytest.mark.parametrize("where", ["step", "last step"])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(options, tmp_path, capsys, monkeypatch, where):
    """Weights become infinite in epoch 3: in its first step, or in its last, which only the test images can show."""
    options = [*options, "--method", "pkkd", "--epochs", "4"]
    assert main([*options, "--output", str(tmp_path / "sound")]) == 0
    run = tmp_path / "run"
    steps = []

    def explode(optimizer, args, kwargs):
        steps.append(1)
        if len(steps) == 2 * 8 + (1 if where == "step" else 8):
            next(iter(optimizer.param_groups[0]["params"])).data.fill_(float("inf"))

    handle = register_optimizer_step_post_hook(explode)
    try:
        fails(
            capsys,
            [*options, "--output", str(run)],
            "epoch 3: loss is not finite: ",
            f"the checkpoint of epoch 2 in {run} is intact",
        )
    finally:
        handle.remove()
    assert len(steps) == 2 * 8 + (1 if where == "step" else 8), "it went on with weights that are lost"
    assert [row["epoch"] for row in rows_of(run / "log.csv")] == ["1", "2"]
    assert main(["--resume", str(run)]) == 0
    ours, theirs = (torch.load(f / "student.pt", weights_only=True) for f in (run, tmp_path / "sound"))
    assert_same_state(dict(ours), dict(theirs), "student")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    flags = "data arch method epochs batch-size lr weight-decay nesterov alpha beta seed threads output resume"
    for flag in flags.split():
        assert f"--{flag}" in text
    assert text.count("(default:") == 13  # all but --resume
