"""The networks: sizes of the reference, its checkpoints, which layers are adder layers, what gets matched."""

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.models import create_model, load_reference_checkpoint, resnet20

ARCHES = ["lenet5", "resnet20"]


def reference_resnet20_state() -> dict[str, torch.Tensor]:
    """A state_dict as github.com/huawei-noah/AdderNet publishes it, written down from resnet20.py there."""
    state: dict[str, torch.Tensor] = {}

    def norm(name: str, channels: int) -> None:
        for key in ("weight", "bias", "running_mean"):
            state[f"{name}.{key}"] = torch.randn(channels)
        state[f"{name}.running_var"] = torch.rand(channels) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    state["conv1.weight"] = torch.randn(16, 3, 3, 3)
    norm("bn1", 16)
    channels_in = 16
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            name = f"layer{stage}.{block}"
            state[f"{name}.conv1.adder"] = torch.randn(channels, channels_in, 3, 3)
            norm(f"{name}.bn1", channels)
            state[f"{name}.conv2.adder"] = torch.randn(channels, channels, 3, 3)
            norm(f"{name}.bn2", channels)
            if channels_in != channels:
                state[f"{name}.downsample.0.adder"] = torch.randn(channels, channels_in, 1, 1)
                norm(f"{name}.downsample.1", channels)
            channels_in = channels
    state["fc.weight"] = torch.randn(10, 64, 1, 1)
    norm("bn2", 10)
    return {f"module.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_resnet20_has_the_size_of_the_reference(kind):
    model = resnet20(kind)
    assert len(model.state_dict()) == 132
    assert sum(p.numel() for p in model.parameters()) == 272_484
    assert sum(isinstance(m, AdderConv2d) for m in model.modules()) == (20 if kind == "adder" else 0)


def test_reference_checkpoint_loads_strictly():
    state = reference_resnet20_state()
    keys = list(state)
    model = resnet20()
    load_reference_checkpoint(model, state)
    assert list(state) == keys, "the caller's mapping was changed"
    loaded = model.state_dict()
    assert len(loaded) == len(state)
    for key, value in state.items():
        assert torch.equal(loaded[key.removeprefix("module.").replace(".adder", ".weight")], value), key


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen"])
def test_reference_checkpoint_that_does_not_fit_is_refused(change):
    state = reference_resnet20_state()
    key = "module.layer3.2.conv2.adder"
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        state["module.layer3.3.conv1.adder"] = state[key]
    else:
        state[key] = state[key][:-1]
    with pytest.raises(RuntimeError, match=r"layer3\."):
        load_reference_checkpoint(resnet20(), state)


@pytest.mark.parametrize("arch", ARCHES)
def test_first_and_classifier_are_ordinary_and_all_others_match_the_kind(arch):
    for kind, layer in (("adder", AdderConv2d), ("cnn", nn.Conv2d)):
        model = create_model(arch, kind)
        weighted = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear, AdderConv2d))]
        inner = [m for m in weighted if m not in (model.conv1, model.fc)]
        assert type(model.conv1) is nn.Conv2d
        assert type(model.fc) in (nn.Conv2d, nn.Linear)
        assert inner and all(type(m) is layer for m in inner)
        assert set(model.matched_layers()) == set(inner)


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("kind", ["adder", "cnn"])
def test_intermediates_are_the_raw_outputs_of_the_matched_layers(arch, kind):
    model = create_model(arch, kind, in_channels=1).train()
    seen: dict[nn.Module, torch.Tensor] = {}
    for layer in model.matched_layers():
        layer.register_forward_hook(lambda layer, _, output: seen.update({layer: output.clone()}))
    _, outputs = model(torch.randn(4, 1, 32, 32), intermediates=True)
    assert len(outputs) == len(model.matched_layers())
    for layer, output in zip(model.matched_layers(), outputs, strict=True):
        assert torch.equal(output, seen[layer])  # also: not overwritten in place by what follows


@pytest.mark.parametrize("arch", ARCHES)
def test_intermediates_do_not_change_the_logits(arch):
    model = create_model(arch).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), model(x, intermediates=True)[0])


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_and_classes(arch, channels):
    model = create_model(arch, "adder", in_channels=channels, num_classes=7).eval()
    assert model(torch.randn(2, channels, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("arch", ARCHES)
def test_no_graph_break_under_compile(arch):
    model = create_model(arch).eval()
    x = torch.randn(2, 3, 32, 32)
    traced = torch.compile(model, backend="eager", fullgraph=True)
    logits, outputs = traced(x, intermediates=True)
    assert torch.equal(logits, model(x))
    assert len(outputs) == len(model.matched_layers())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="arch: expected one of 'lenet5', 'resnet20', got 'alexnet'"):
        create_model("alexnet")
    with pytest.raises(ValueError, match="kind: expected one of 'adder', 'cnn', got 'shift'"):
        resnet20("shift")
    with pytest.raises(ValueError, match=r"32x32, got shape \(2, 1, 28, 28\)"):
        create_model("lenet5", in_channels=1)(torch.zeros(2, 1, 28, 28))
