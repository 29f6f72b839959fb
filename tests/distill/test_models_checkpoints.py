"""Checkpoints as trainers write them, and weights of one kind of layer loaded into the other."""

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.distill import main
from adderops.distill.networks import load_weights
from adderops.distill.runs.folder import RunFolder
from adderops.models import lenet5, load_reference_checkpoint, mark_adder_weights, unwrap_state_dict

PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.", "model.", "net."]
HOLDERS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "epoch": 3},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "twice": lambda state: {"model": {"state_dict": state}},
}


def same(a, b):
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("prefix", [*PREFIXES, "model._orig_mod."])
def test_checkpoints_of_trainers_load(prefix, holder, tmp_path):
    saved, network, of_run = lenet5(), lenet5(), lenet5()
    content = HOLDERS[holder]({prefix + name: value for name, value in saved.state_dict().items()})
    load_reference_checkpoint(network, content)
    assert same(network, saved)
    torch.save(content, tmp_path / "weights.pt")
    load_weights(of_run, tmp_path / "weights.pt")
    assert same(of_run, saved)


@pytest.mark.slow
def test_names_within_the_model_are_compiled_or_its_own():
    inner = nn.Sequential(AdderConv2d(3, 4, 3), nn.BatchNorm2d(4))
    own = nn.ModuleDict({"module": inner, "model": nn.Linear(2, 2)})
    compiled = nn.ModuleDict({"module": torch.compile(inner), "model": own["model"]})
    assert any("_orig_mod" in name for name in compiled.state_dict())
    assert unwrap_state_dict(compiled.state_dict(), own).keys() == own.state_dict().keys()
    only = nn.ModuleDict({"module": inner})  # all its own names start with module.
    for state in (only.state_dict(), {f"module.{name}": v for name, v in only.state_dict().items()}):
        load_reference_checkpoint(only, state)


def test_wrappers_themselves():
    network = lenet5()
    average = torch.optim.swa_utils.AveragedModel(network)
    load_reference_checkpoint(lenet5(), average.state_dict())
    load_reference_checkpoint(lenet5(), torch.compile(network).state_dict())
    layer = AdderConv2d(3, 4, 3)
    load_reference_checkpoint(
        AdderConv2d(3, 4, 3), {"module.weight": layer.weight, "module._extra_state": torch.ones(())}
    )


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": 3}, {1: torch.zeros(1)}, [torch.zeros(1)]], ids=str)
def test_what_holds_no_weights_is_refused(content):
    with pytest.raises((ValueError, RuntimeError), match="state_dict"):
        load_reference_checkpoint(lenet5(), content)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_weights_of_the_other_kind_are_refused_by_name(prefix, tmp_path):
    for made, other in (("adder", "cnn"), ("cnn", "adder")):
        network = lenet5(made)
        before = {name: value.clone() for name, value in network.state_dict().items()}
        state = {prefix + name: value for name, value in lenet5(other).state_dict().items()}
        with pytest.raises(RuntimeError, match="conv2.weight: expected the weight of a"):
            load_reference_checkpoint(network, state)
        torch.save(state, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="weights.pt: expected a state_dict of this network: .*conv2.weight"):
            load_weights(network, tmp_path / "weights.pt")
        for name in ("conv2.weight", "conv3.weight", "conv4.weight"):
            assert torch.equal(network.state_dict()[name], before[name])


def unmarked(state):
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def test_adder_weights_of_before_there_were_marks(tmp_path):
    old = unmarked(lenet5().state_dict())
    with pytest.raises(RuntimeError, match="without the mark.*adderops.models.mark_adder_weights"):
        lenet5().load_state_dict(old)
    network = lenet5()
    network.load_state_dict(mark_adder_weights(old, network))
    assert same(network, network) and torch.equal(network.conv2.weight, old["conv2.weight"])
    # in the folder of a run the name says what they are
    torch.save(old, tmp_path / "student.pt")
    with pytest.raises(ValueError, match="mark_adder_weights"):
        load_weights(lenet5(), tmp_path / "student.pt")
    (tmp_path / "config.json").touch()
    load_weights(network := lenet5(), tmp_path / "student.pt")
    assert torch.equal(network.conv2.weight, old["conv2.weight"])
    torch.save(unmarked(lenet5("cnn").state_dict()), tmp_path / "teacher.pt")
    with pytest.raises(ValueError, match="mark_adder_weights"):
        load_weights(lenet5(), tmp_path / "teacher.pt")


def test_run_folders_of_before_there_were_marks(options, tmp_path, capsys):
    run = tmp_path / "run"
    assert main([*options, "--method", "plain", "--ema", "0.9", "--output", str(run)]) == 0
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for part in ("task", "average"):
        assert len(unmarked(state[part])) == len(state[part]) - 3
        state[part] = unmarked(state[part])
    torch.save(state, run / "checkpoint.pt")
    student = torch.load(run / "student.pt", weights_only=True)
    torch.save(unmarked(student), run / "student.pt")
    assert main(["--resume", str(run)]) == 0
    torch.save(unmarked(student), run / "student.pt")
    network = RunFolder.load(run).network("student")
    assert all(torch.equal(value, student[name]) for name, value in network.state_dict().items())
