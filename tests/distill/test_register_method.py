"""A method of the user's own: registered from outside, it works through the whole command line."""

import csv
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from adderops.distill import METHODS, Distillation, Options, Task, main, register_method, train
from distill.runs import assert_same_state

# Two adder networks, which no file of adderops knows; where it is told to, it stops itself in a step.
TOY = """
import os
import signal

from adderops.distill import Losses, Task, main, register_method

steps = 0


@register_method("twins")
class Twins(Task):
    '''Two adder networks that imitate each other\'s logits.'''

    roles = {"student": "adder", "sibling": "adder"}
    label = "adder, as a twin"

    def forward(self, images, labels):
        global steps
        steps += 1
        if steps == int(os.environ.get("STOP_IN_STEP", 0)):
            os.kill(os.getpid(), signal.SIGTERM)
        logits = {role: network(images) for role, network in self.networks.items()}
        terms = {f"{role}_ce": self.label_loss(values, labels) for role, values in logits.items()}
        terms["distance"] = (logits["student"] - logits["sibling"]).square().mean()
        return Losses(sum(terms.values()), terms, logits)
"""


@pytest.fixture
def toy(tmp_path):
    """Runs the command line in a process of its own, which has imported the user's module."""
    (tmp_path / "toy.py").write_text(TOY)

    def run(*commands: list[str], code: int = 0, **environment: str) -> str:
        program = (
            f"import sys, toy\nfor words in {commands}:\n    status = toy.main(words)\n    if status: sys.exit(status)"
        )
        command = [sys.executable, "-c", program]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])} | environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.mark.slow
def test_a_method_from_outside_goes_through_the_command_line(toy, tmp_path, options):
    """train, --resume, eval, compare, export, quantize, report."""
    train = [*options, "--method", "twins", "--seed", "3", "--output"]
    output = toy(
        [*train, "whole"],
        ["eval", "whole"],
        ["compare", "whole"],
        ["export", "whole", "--format", "state_dict", "--weights", "sibling"],
        ["quantize", "whole", "--images", "64"],
        ["report", "whole"],
    )
    table, tested, compared = (
        output.index(words) for words in ("adder, as a twin: sibling", "sibling  ", "whole  twins")
    )
    assert table < tested < compared
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with open(whole / "log.csv") as file:
        [*_, row] = csv.DictReader(file)
    assert {"distance", "sibling_ce", "student_test_accuracy", "sibling_train_accuracy"} <= row.keys()

    # stopped in the fourth step of the second epoch and continued: the same bits
    toy([*train, "parts"], code=128 + signal.SIGTERM, STOP_IN_STEP="12")
    assert not (parts / "student.pt").exists()
    assert "adder, as a twin: sibling" in toy(["--resume", "parts"])
    for name in ("student.pt", "sibling.pt", "student_best.pt", "checkpoint.pt"):
        a, b = (torch.load(folder / name, weights_only=True) for folder in (whole, parts))
        assert_same_state(dict(a), dict(b), name)

    for name in ("export/sibling.pt", "export/int8.safetensors", "report/report.html"):
        assert (whole / name).is_file(), name


@pytest.fixture
def registered():
    """Registers a method that distils, for one test."""

    @register_method("by logits alone")
    class ByLogits(METHODS["pkkd"]):
        """PKKD under another name."""

        label = "adder, by another name"

    yield ByLogits
    del METHODS["by logits alone"]


def test_a_subclass_of_pkkd_is_pkkd(registered, config, data, tmp_path):
    """It gets the options of the distillation and, with them, the same bits."""
    for method in ("pkkd", "by logits alone"):
        summary = train(replace(config, method=method, beta=0.5, epochs=1), data, tmp_path / method)
        assert summary["method"] == method
    ours, theirs = (torch.load(tmp_path / m / "student.pt", weights_only=True) for m in ("by logits alone", "pkkd"))
    assert_same_state(dict(ours), dict(theirs))


def test_help_lists_the_method(registered, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{{compare,{','.join(METHODS)}}}" in shown and "by logits alone: PKKD under another name;" in shown


def test_a_method_that_distils_has_the_options_of_it(registered):
    assert Options(method="by logits alone", beta=0.5).resolve().distillation == Distillation(beta=0.5)
    assert Options(method="plain", beta=0.5).resolve().distillation is None
    assert Options(method="by logits alone", teacher="none").resolve().method == "plain"


@pytest.mark.parametrize("name", ["pkkd", "compare"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match=f"expected a new name, got '{name}', which is taken"):
        register_method(name)(type("Other", (Task,), {"roles": {"student": "adder"}}))
    assert METHODS["pkkd"].__name__ == "PKKDTask" and "compare" not in METHODS


@pytest.mark.parametrize("roles", [{}, {"teacher": "cnn"}, {"student": "linear"}])
def test_roles_without_the_main_one_or_of_another_kind_are_refused(roles):
    with pytest.raises(ValueError, match="Other: roles: expected 'student' among them, each of cnn, adder, spiking"):
        register_method("other")(type("Other", (Task,), {"roles": roles}))
    assert "other" not in METHODS


def test_a_method_without_a_teacher_cannot_be_asked_to_drop_it(registered):
    registered.without_teacher = None
    with pytest.raises(ValueError, match="teacher: expected progressive or frozen for the method by logits alone"):
        Options(method="by logits alone", teacher="none")


def test_by_default_each_network_trains_on_the_labels():
    networks = {role: torch.nn.Linear(3, 2) for role in ("student", "sibling")}
    images, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    task = Task(networks)
    losses = task(images, labels)
    expected = {f"{r}_ce": torch.nn.functional.cross_entropy(n(images), labels) for r, n in networks.items()}
    assert losses.terms == expected and losses.total == sum(expected.values())
    assert task.diagnose(losses) == {}
