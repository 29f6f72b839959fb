"""Every option declared once: its type and range, where it has an effect, how --help has it."""

import json
import re
from dataclasses import fields

import pytest
from tqdm import tqdm

from adderops.distill import Config, Options, main
from adderops.distill.options import LARGEST_FLOAT, LARGEST_INT, kind_of
from adderops.distill.runs import COMMANDS
from adderops.distill.trainer import BAR, postfix

WRONG = {bool: ["yes", 1, 0.0], int: ["3", 2.5, True], float: ["0.1", True, [1.0]], str: [5, True, ["x"]]}


@pytest.mark.parametrize("field", fields(Options), ids=lambda field: field.name)
def test_a_value_of_another_type_is_refused_wherever_it_comes_from(field, tmp_path):
    for value in [*WRONG[kind_of(field)], {}]:
        with pytest.raises(ValueError, match=f"^{field.name}: expected "):
            Options(**{field.name: value})
        if field.name == "amp" and isinstance(value, bool):
            continue  # as older runs have it
        (tmp_path / "config.json").write_text(json.dumps({field.name: value}))
        with pytest.raises(ValueError, match=f"config.json: .*{field.name}: expected "):
            Config.load(tmp_path / "config.json")


@pytest.mark.parametrize("field", [f for f in fields(Options) if kind_of(f) in (int, float)], ids=lambda f: f.name)
def test_every_number_has_a_range(field):
    assert "least" in field.metadata
    most = field.metadata.get("most", LARGEST_INT if kind_of(field) is int else LARGEST_FLOAT)
    beyond = [10**30] if kind_of(field) is int else [1e308, float("inf"), float("nan")]
    for value in [*beyond, field.metadata["least"] - 1, 2 * most]:
        with pytest.raises(ValueError, match=f"^{field.name}: expected a finite number of at least "):
            Options(**{field.name: value})


@pytest.mark.parametrize(
    "content",
    ["[1]", "3", '"text"', "{", '{"lr": 1e999}', '{"lr": 1%s}' % ("0" * 400), '{"colour": 1}', "[" * 100000, "\xff"],
)
def test_a_file_that_is_no_configuration(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match="config.json: expected a configuration as this program writes it"):
        Config.load(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--lr 1e308", "lr: expected a finite number of at least 0 and at most 3.4e+38, got 1e+308"),
        ("--weight-decay 1e308", "weight_decay: expected a finite number"),
        ("--threads 100000", "threads: expected a finite number of at least 1 and at most 1024"),
        ("--epochs 20 --warmup-epochs 20", "warmup_epochs: expected fewer than the 20 epochs, got 20"),
        ("--patience 3", "patience: expected validation images"),
        ("--class-weights heavy", "class_weights: expected balanced, or numbers from 0 to 1e6 with commas between"),
        ("--class-weights 1,2 --method plain", "class_weights: expected 10, one for each class, got 2"),
        ("--mixup 1e-9", "mixup: expected 0 or at least 0.001"),
        ("--reestimate-batchnorm 1", "reestimate_batchnorm: expected 0 or at least 2 images, got 1"),
        (
            "--method plain --teacher-checkpoint nope.pt",
            "teacher_checkpoint: expected --method pkkd or compare beside it",
        ),
        (
            "--method cnn --beta 1",
            "beta: expected --method pkkd or compare beside it, got --method cnn: it has no effect",
        ),
        (
            "--method pkkd --no-logits --temperature 2",
            "temperature: expected --logits true beside it, got --logits false",
        ),
        ("--features none --beta 1", "beta: expected --features 1x1 or kernel or kernel+1x1 beside it"),
        ("--teacher none --alpha 2", "alpha: expected --teacher progressive or frozen beside it, got --teacher none"),
        ("--method plain --teacher-arch resnet20", "teacher_arch: expected --method pkkd or compare beside it"),
    ],
)
def test_options_that_mean_nothing_are_refused_by_name(arguments, message, tmp_path, capsys):
    assert main([*arguments.split(), "--output", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("adderops.distill: error: ") and message in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--epoch", "3"], *([command, "--hel"] for command in COMMANDS)])
def test_an_abbreviated_option_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_has_every_option_under_a_heading(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    headings = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    groups = list(dict.fromkeys(f.metadata["group"] for f in fields(Options)))
    assert [h for h in headings if h in groups] == groups and "run folder" in headings
    for field in fields(Options):
        section = text[text.index(f"\n{field.metadata['group']}:") :]
        section = section[: section.index("\n\n")] if "\n\n" in section else section
        assert f"--{field.name.replace('_', '-')}" in section


def test_amp_alone_is_bfloat16():
    from adderops.distill.command_line import training_parser

    given = [vars(training_parser().parse_args(a.split())) for a in ("--amp", "--amp float16", "--lr 1")]
    assert [g.get("amp") for g in given] == ["bfloat16", "float16", None]


def test_the_bar_fits_80_columns_with_accuracies_and_loss():
    """The longest there is: a name of five letters, 400 epochs, hours to go, everything right."""
    accuracies = {"teacher": 1.0, "student": 1.0, "student_ema": 0.9912}
    for seconds, done in ((1, 5), (40000, 10_000_000)):
        line = tqdm.format_meter(
            n=done,
            total=400 * 60000,
            elapsed=seconds,
            ncols=80,
            prefix="plain 399/400",
            unit="img",
            unit_scale=True,
            bar_format=BAR,
            postfix=", " + postfix(accuracies, 0.12345),
        )
        assert len(line) <= 80, line
        assert line.endswith("teacher 100.0 ema 99.1 loss 0.123") and "img/s" in line
    del accuracies["student_ema"]
    assert postfix(accuracies, 12.5) == "teacher 100.0 student 100.0 loss 12.5"
