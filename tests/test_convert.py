"""`adderops.convert` on the models that people have."""

import pytest
import torch
from torch import nn

from adderops import AdderConv2d, AdderLinear, convert


def kinds(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}


def small_net(classifier=None):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Sequential(nn.Conv2d(8, 8, (3, 1), stride=(1, 2), padding=(1, 0), bias=False), nn.BatchNorm2d(8)),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4, padding_mode="reflect"),
        classifier or nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5),
    )


def test_first_convolution_and_classifier_stay(capsys):
    model = small_net()
    first, last = model[0], model[3]
    assert convert(model) is model
    assert kinds(model) == {"0": nn.Conv2d, "1.0": AdderConv2d, "2": AdderConv2d, "3": nn.Conv2d}
    assert (model[0], model[3]) == (first, last)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    assert capsys.readouterr().out.splitlines() == [
        "convert: kept     0: first convolution",
        f"convert: replaced 1.0: {model[1][0]}",
        f"convert: replaced 2: {model[2]}",
        "convert: kept     3: classifier",
        "convert: 2 of 4 convolutions replaced",
    ]


def test_last_convolution_before_a_linear_classifier_is_replaced():
    model = convert(small_net(nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(2), nn.Linear(60, 7))), verbose=False)
    assert kinds(model)["3.0"] is AdderConv2d
    model = convert(small_net(nn.Sequential(nn.Conv2d(8, 4, 1), nn.Flatten(2), AdderLinear(60, 7))), verbose=False)
    assert kinds(model)["3.0"] is AdderConv2d


def test_geometry_is_kept():
    model, converted = small_net(), convert(small_net(), verbose=False)
    for name in ("1.0", "2"):
        conv, adder = model.get_submodule(name), converted.get_submodule(name)
        for attribute in (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        ):
            assert getattr(adder, attribute) == getattr(conv, attribute), attribute
        assert (adder.bias is None) == (conv.bias is None)
        assert adder.eta == 0.2
    x = torch.randn(2, 3, 12, 12)
    assert converted(x).shape == model(x).shape


@pytest.mark.parametrize("eta", [None, 0.5])
def test_eta_is_handed_on(eta):
    assert convert(small_net(), eta=eta, verbose=False)[2].eta == eta


def test_filter_decides(capsys):
    asked = []

    def filter(name, module):
        asked.append((name, type(module)))
        return name in ("0", "3")

    model = convert(small_net(), filter=filter)
    assert asked == [(name, nn.Conv2d) for name in ("0", "1.0", "2", "3")]
    assert kinds(model) == {"0": AdderConv2d, "1.0": nn.Conv2d, "2": nn.Conv2d, "3": AdderConv2d}
    assert "convert: kept     2: filter" in capsys.readouterr().out


def test_verbose_false_prints_nothing(capsys):
    convert(small_net(), verbose=False)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_a_convolution():
    conv = nn.Conv2d(3, 4, 3)
    assert convert(conv, verbose=False) is conv
    adder = convert(conv, filter=lambda name, module: True, verbose=False)
    assert isinstance(adder, AdderConv2d)
    assert adder.weight.shape == conv.weight.shape


def test_a_shared_convolution_becomes_one_layer(capsys):
    shared = nn.Conv2d(4, 4, 3)
    block = nn.Sequential(shared)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleDict({"a": shared, "b": shared}), block, block, nn.Linear(4, 4))
    convert(model)
    layers = [model[1]["a"], model[1]["b"], model[2][0], model[3][0]]
    assert type(layers[0]) is AdderConv2d
    assert all(layer is layers[0] for layer in layers)
    assert capsys.readouterr().out.endswith("convert: 1 of 2 convolutions replaced\n")


def test_device_dtype_format_and_mode_are_kept():
    model = small_net().to(memory_format=torch.channels_last).double()
    model.eval()
    model[2].train()
    convert(model, verbose=False)
    assert (model[1][0].training, model[2].training) == (False, True)
    for layer in (model[1][0], model[2]):
        assert layer.weight.dtype == torch.float64
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    with torch.device("meta"):
        model = small_net()
    assert convert(model, verbose=False)[2].weight.device.type == "meta"


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Renamed(nn.Conv2d):
    """Adds nothing to the computation, so it is a convolution like another."""


def unconvertible():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    return {
        "Standardized has a forward of its own": Standardized(4, 4, 3),
        "parametrized": parametrized,
        "has hooks": hooked,
        "not yet initialised: run the model once first": nn.LazyConv2d(4, 3),
    }


@pytest.mark.parametrize("reason", unconvertible())
@pytest.mark.parametrize("filter", [None, lambda name, module: True], ids=["default", "filter"])
def test_what_cannot_be_replaced_is_left_and_reported(reason, filter, capsys):
    layer = unconvertible()[reason]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Conv2d(4, 4, 3), nn.Linear(4, 4))
    convert(model, filter=filter)
    assert model[1] is layer
    assert isinstance(model[2], AdderConv2d)
    assert f"convert: kept     1: {reason}" in capsys.readouterr().out


def test_plain_subclasses_are_replaced_and_others_are_not_touched():
    others = [nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3), AdderConv2d(4, 4, 3), nn.Linear(4, 4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Renamed(4, 4, 3), *others)
    convert(model, verbose=False)
    assert type(model[1]) is AdderConv2d
    assert list(model[2:]) == others


def test_a_model_without_convolutions(capsys):
    model = nn.Sequential(nn.Linear(3, 3))
    assert convert(model) is model
    assert capsys.readouterr().out == "convert: 0 of 0 convolutions replaced\n"
