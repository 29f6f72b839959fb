"""The trainer: separate networks, what reaches the optimizer, the files of a run, clear errors."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from adderops import AdderConv2d
from adderops.distill import RECIPES, Distillation, Options, main, train
from adderops.distill.checkpoint import load_checkpoint
from adderops.distill.command_line import open_run, training_parser
from adderops.distill.schedule import cosine
from adderops.models import create_model, lenet5
from distill.runs import assert_same_state, build_task, keep_tasks, rows_of

CPU = torch.device("cpu")


def task_of(config: Options, **changes):
    return build_task(replace(config, **changes))


# --- the method ---


def test_teacher_of_pkkd_is_the_cnn_trained_alone(config, data, tmp_path):
    """End to end: neither distillation nor the shared optimizer changes a bit of the teacher."""
    for method in ("pkkd", "cnn"):
        train(replace(config, method=method, beta=3.0), data, tmp_path / method)
    ours, alone = (torch.load(tmp_path / m / "teacher.pt", weights_only=True) for m in ("pkkd", "cnn"))
    assert_same_state(dict(ours), dict(alone), "teacher")


def test_frozen_teacher_is_the_one_given_and_stays(config, data, tmp_path):
    train(replace(config, method="cnn"), data, tmp_path / "cnn")
    given = tmp_path / "cnn" / "teacher.pt"
    summary = train(replace(config, teacher="frozen", teacher_checkpoint=str(given)), data, tmp_path / "pkkd")
    ours, theirs = (torch.load(p, weights_only=True) for p in (tmp_path / "pkkd" / "teacher.pt", given))
    assert_same_state(dict(ours), dict(theirs))
    accuracies = [json.loads((tmp_path / "cnn" / "summary.json").read_text())["teacher_test_accuracy"]]
    assert summary["teacher_test_accuracy"] == accuracies[0]
    progressive = train(config, data, tmp_path / "progressive")
    assert progressive["student_train_accuracy"] != summary["student_train_accuracy"]


def test_teacher_none_is_plain(config):
    assert replace(config, teacher="none").resolve().method == "plain"


def test_students_of_pkkd_and_plain_start_alike(config):
    tasks = {method: task_of(config, method=method) for method in ("pkkd", "plain", "cnn")}
    student = tasks["pkkd"].networks["student"].state_dict()
    assert_same_state(dict(student), dict(tasks["plain"].networks["student"].state_dict()))
    teacher = tasks["pkkd"].networks["teacher"].state_dict()
    assert_same_state(dict(teacher), dict(tasks["cnn"].networks["teacher"].state_dict()))
    assert not torch.equal(student["conv1.weight"], teacher["conv1.weight"])
    assert not torch.equal(
        student["conv1.weight"], task_of(config, seed=1).networks["student"].state_dict()["conv1.weight"]
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"features": "none"}, None),
        ({"features": "1x1"}, (False, True)),
        ({"features": "kernel"}, (True, False)),
        ({}, (True, True)),
    ],
)
def test_options_reach_the_match(config, options, expected):
    match = task_of(config, **options).match
    if expected is None:
        assert match is None
        return
    linear = match.linears[0]
    assert (match.kernel, linear.w_a.requires_grad) == expected and linear.w_c.requires_grad == expected[1]


def test_options_reach_the_task(config):
    task = task_of(config, alpha=0.3, beta=0.7, temperature=4.0, logits=False, eta=0.5)
    assert task.distillation == Distillation(alpha=0.3, beta=0.7, temperature=4.0, logits=False)
    assert {m.eta for m in task.modules() if isinstance(m, AdderConv2d)} == {0.5}


def test_adder_gradients_are_scaled_to_rms_eta_just_before_each_step(config, data, tmp_path, monkeypatch):
    """Also under gradient accumulation: the gradient of the whole batch is scaled, once."""
    tasks, before, after = keep_tasks(monkeypatch), [], []

    def gradient_rms() -> list[float]:
        layers = [m for m in tasks[0].modules() if isinstance(m, AdderConv2d)]
        weights = [layer.weight for layer in layers] + [tasks[0].networks["student"].conv1.weight]
        return [w.grad.square().mean().sqrt().item() for w in weights]

    def record_before(optimizer, *_) -> None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in tasks[0].parameters()}
        before.append(gradient_rms())

    hooks = [
        register_optimizer_step_pre_hook(record_before),
        register_optimizer_step_post_hook(lambda *_: after.append(gradient_rms())),
    ]
    try:
        _global_optimizer_pre_hooks.move_to_end(hooks[0].id, last=False)  # before that of adderops
        train(replace(config, accumulate=2), data, tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(before) == len(after) == 2 * 8
    for raw, scaled in zip(before, after, strict=True):
        # the norm of some 50,000 squares summed in float32 at worst one by one
        assert scaled[:-1] == pytest.approx([0.2] * 3, rel=1e-3)
        assert all(r != pytest.approx(0.2, rel=1e-2) for r in raw[:-1]), "the layers scaled them in their backward pass"
        assert raw[-1] == scaled[-1] != pytest.approx(0.2, rel=1e-2)


def test_recipe_reaches_the_optimizer(config, data, tmp_path):
    train(config, data, tmp_path)
    [group] = load_checkpoint(tmp_path / "checkpoint.pt")["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)
    assert group["lr"] == pytest.approx(0.05)
    assert [cosine(e, 4) for e in range(5)] == pytest.approx(
        [1.0, 0.5 * (1 + 0.5**0.5), 0.5, 0.5 * (1 - 0.5**0.5), 0.0]
    )


def test_it_learns_and_the_saved_student_is_the_one_that_was_tested(config, data, tmp_path):
    summary = train(replace(config, epochs=8), data, tmp_path)
    student = lenet5("adder", num_classes=4).eval()
    student.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    [(images, labels)] = data.test.batches([torch.arange(len(data.test))])
    with torch.no_grad():
        accuracy = (student(images).argmax(1) == labels).double().mean().item()
    assert summary["student_test_accuracy"] == pytest.approx(accuracy)
    assert accuracy > 0.8 and summary["teacher_test_accuracy"] > 0.8  # four equal classes: chance is 0.25


# --- recipes ---


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ("few-digits-lenet5", "digits", "lenet5", 100, 50, 0.1, 5e-4, True)),
        ({"data": "digits"}, ("digits-lenet5", "digits", "lenet5", 20, 64, 0.1, 5e-4, True)),
        (
            {"data": "fashion-mnist"},
            ("fashion-mnist-lenet5", "fashion-mnist", "lenet5", 50, 256, 0.1, 5e-4, True),
        ),
        (
            {"recipe": "cifar10-resnet20"},
            ("cifar10-resnet20", "cifar10", "resnet20", 400, 256, 0.1, 5e-4, False),
        ),
        (
            {"data": "cifar100", "arch": "vgg_small", "epochs": 3},
            ("cifar100-vgg_small", "cifar100", "vgg_small", 3, 256, 0.1, 5e-4, False),
        ),
        (
            {"recipe": "imagenet-resnet50", "batch_size": 64},
            ("imagenet-resnet50", "imagenet", "resnet50", 150, 64, 0.1, 1e-4, False),
        ),
        (
            {"recipe": "cifar10-resnet20", "arch": "resnet32"},
            ("cifar10-resnet20", "cifar10", "resnet32", 400, 256, 0.1, 5e-4, False),
        ),
    ],
)
def test_a_recipe_fills_in_what_is_not_given(given, expected):
    names = ("recipe", "data", "arch", "epochs", "batch_size", "lr", "weight_decay", "nesterov")
    config = Options(**given).resolve()
    assert tuple(getattr(config, name) for name in names) == expected
    assert config.changed() == config


def test_a_method_brings_its_settings_to_other_data_and_time():
    names = ("method", "data", "arch", "epochs", "batch_size", "lr", "steps")
    for given, expected in (
        ({"recipe": "dsr-cifar10-resnet20"}, ("dsr", "cifar10", "resnet20", 200, 128, 0.1, 20)),
        (
            {"method": "dsr", "data": "fashion-mnist", "arch": "lenet5"},
            ("dsr", "fashion-mnist", "lenet5", 50, 128, 0.1, 20),
        ),
        ({"method": "dsr", "recipe": "digits-lenet5", "steps": 4}, ("dsr", "digits", "lenet5", 20, 128, 0.1, 4)),
        ({"method": "cnn", "recipe": "digits-lenet5"}, ("cnn", "digits", "lenet5", 20, 64, 0.1, None)),
    ):
        config = Options(**given).resolve()
        assert tuple(config.flat()[name] for name in names) == expected
        assert config.changed() == config


def test_recipes_name_networks_that_exist_and_their_sources():
    for name, recipe in RECIPES.items():
        assert name == recipe.name and name.endswith(f"{recipe.data}-{recipe.arch}") and recipe.source
        with torch.device("meta"):
            create_model(recipe.arch, "cnn")


def test_a_set_without_a_recipe_takes_one_of_its_network(folder_of_bars):
    config = Options(data=str(folder_of_bars), arch="resnet20").resolve()
    assert config.data == str(folder_of_bars) and config.weight_decay == 5e-4


# --- the files of a run ---


def test_run_folder(options, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*options, "--method", "pkkd", "--alpha", "0.5", "--output", str(run)]) == 0
    files = "config.json data.json log.csv layers.csv checkpoint.pt summary.json student.pt student_best.pt teacher.pt"
    assert {p.name for p in run.iterdir()} == {".lock", *files.split()}
    written = json.loads((run / "config.json").read_text())
    assert written["alpha"] == 0.5 and written["nesterov"] is True and written["epochs"] == 2

    rows = rows_of(run / "log.csv")
    assert len(rows) == 2
    for epoch, row in enumerate(rows):
        assert int(row["epoch"]) == epoch + 1
        values = {name: float(value) for name, value in row.items()}
        assert all(map(math.isfinite, values.values()))
        assert values["lr"] == pytest.approx(0.1 * (1 + math.cos(math.pi * epoch / 2)) / 2)
        # means over the epoch keep the equation of the loss; log values have six digits
        loss = 0.5 * values["student_ce"] + values["imitation"] + 0.1 * values["l_mid"]
        assert values["student_loss"] == pytest.approx(loss, rel=1e-5)
        assert {f"{r}_{s}_accuracy" for r in ("teacher", "student") for s in ("train", "test")} <= values.keys()
        assert values["images_per_second"] == pytest.approx(128 / values["seconds"], rel=1e-4)
    layers = rows_of(run / "layers.csv")
    assert [(row["epoch"], row["layer"]) for row in layers] == [
        (epoch, layer) for epoch in "12" for layer in ("conv2", "conv3", "conv4")
    ]
    for epoch, row in zip("12", rows, strict=True):
        of_epoch = [layer for layer in layers if layer["epoch"] == epoch]
        assert float(row["gradient_ratio_max"]) == max(float(layer["gradient_ratio"]) for layer in of_epoch)
        assert float(row["var_yc_min"]) == min(float(layer["var_yc"]) for layer in of_epoch)
        assert all(float(layer[name]) > 0 for layer in of_epoch for name in ("l_mid", "width_a", "width_c"))

    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_images"] == 128 and summary["test_images"] == 40 and summary["method"] == "pkkd"
    assert summary["student_test_accuracy"] == float(rows[-1]["student_test_accuracy"])
    assert "--alpha 0.5" in summary["command"] and "--epochs 2" in summary["command"]
    printed = capsys.readouterr().out
    assert "adder, by PKKD" in printed and str(run) in printed


def test_command_of_the_summary_starts_the_same_run(config):
    changes = {"lr": 0.07, "seed": 5, "logits": False, "amp": "bfloat16", "features": "1x1", "rifle": 3, "ema": 0.99}
    config = replace(config, **changes).resolve()
    words = config.command().split()
    assert words[:3] == ["python", "-m", "adderops.distill"]
    assert open_run(training_parser(), vars(training_parser().parse_args(words[3:])))[0] == config


def test_validation_images_are_tested_in_place_of_the_test_images(options, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["--method", "plain", "--validation", "32", "--train-images", "64", "--output", str(run)]
    assert main([*options, *arguments]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["train_images"], summary["test_images"], summary["test_is_validation"]) == (64, 32, True)
    assert "accuracy on 32 validation images" in capsys.readouterr().out


# --- errors ---


def fails(capsys, arguments: list[str], *expected: str) -> None:
    assert main(arguments) == 2
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
        (["--batch-size", "4000"], "batch_size: expected at most the 100 images, got 4000"),
        (["--lr", "nan"], "lr: expected a finite number of at least 0, got nan"),
        (["--beta", "-1"], "beta: expected a finite number of at least 0, got -1.0"),
        (["--seed", "-3"], "seed: expected a finite number of at least 0 and at most 4294967295, got -3"),
        (["--ema", "1.5"], "ema: expected a finite number of at least 0 and at most 1, got 1.5"),
        (["--accumulate", "40"], "accumulate: expected at least 2 images in each part of a batch of 50"),
        (["--teacher", "frozen"], "teacher_checkpoint: expected a file for the frozen teacher, got none"),
        (["--alpha", "0", "--no-logits"], "alpha: expected a positive number without logits, got 0"),
        (["--arch", "vgg"], "arch: expected one of 'lenet5', "),
        (["--augment", "rotate"], "augment: expected one of none, crop, crop-flip"),
        (["--initial", "nothing.pt", "--method", "plain"], "nothing.pt: no state_dict"),
    ],
)
def test_values_out_of_range(arguments, message, tmp_path, capsys):
    fails(capsys, [*arguments, "--output", str(tmp_path / "run")], message)


def test_choices_are_named():
    with pytest.raises(ValueError, match="features: expected one of none, 1x1, kernel, kernel\\+1x1, got 'kernels'"):
        Options(features="kernels")


@pytest.mark.parametrize("content", [b"no tensors", "wrong network", "not a state_dict"])
def test_a_teacher_that_does_not_fit_is_refused(options, tmp_path, capsys, content):
    path = tmp_path / "teacher.pt"
    if content == "wrong network":
        torch.save(create_model("resnet20", "cnn").state_dict(), path)
    elif content == "not a state_dict":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(content)
    arguments = ["--method", "pkkd", "--teacher", "frozen", "--teacher-checkpoint", str(path)]
    expected = "a whole state_dict, got a damaged file" if isinstance(content, bytes) else "a state_dict"
    fails(capsys, [*options, *arguments, "--output", str(tmp_path / "r")], f"{path}: expected {expected}")


def test_another_configuration_is_not_continued(config, data, tmp_path):
    train(config, data, tmp_path)
    with pytest.raises(ValueError, match=r"lr 0\.1 -> 0\.2"):
        train(replace(config, lr=0.2), data, tmp_path)
    train(replace(config, workers=1), data, tmp_path)  # where it is computed does not matter


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name in [*(f.name for f in fields(Options)), "output", "resume"]:
        assert f"--{name.replace('_', '-')}" in text
    assert all(f.metadata["help"] for f in fields(Options))
