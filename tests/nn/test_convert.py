"""`adderops.convert` on models as they occur in practice."""

import threading

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from adderops import AdderConv2d, AdderLinear, convert


def kinds(model):
    return {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}


def small_net(classifier=None):
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)),
        nn.Sequential(nn.Conv2d(8, 8, (3, 1), stride=(1, 2), padding=(1, 0), bias=False), nn.BatchNorm2d(8)),
        nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=4, padding_mode="reflect"),
        nn.BatchNorm2d(8),
        classifier or nn.Conv2d(8, 5, 1),
        nn.BatchNorm2d(5),
    )


def test_first_convolution_and_classifier_stay(capsys):
    model = small_net()
    first, last = model[0][0], model[4]
    assert convert(model) is model
    assert kinds(model) == {"0.0": nn.Conv2d, "1.0": AdderConv2d, "2": AdderConv2d, "4": nn.Conv2d}
    assert (model[0][0], model[4]) == (first, last)
    model(torch.randn(2, 3, 12, 12)).sum().backward()
    assert capsys.readouterr().out.splitlines() == [
        "convert: kept     0.0: first convolution",
        f"convert: replaced 1.0: {model[1][0]}",
        f"convert: replaced 2: {model[2]}",
        "convert: kept     4: classifier",
        "convert: 2 of 4 convolutions replaced",
    ]


@pytest.mark.parametrize("head", [nn.Linear, AdderLinear])
def test_last_convolution_before_a_linear_classifier_is_replaced(head):
    model = small_net(nn.Sequential(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5), nn.Flatten(2), head(60, 7)))
    assert kinds(convert(model, verbose=False))["4.0"] is AdderConv2d


# --- convolutions and the normalisation after them ---


class Net(nn.Module):
    """A stem, a part with 8 channels that `make` builds, and a classifier."""

    def __init__(self, body):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body = body
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(self.bn(self.stem(x)).relu()).mean((2, 3)))


def conv(out=8):
    return nn.Conv2d(8, out, 1)


class Gate(nn.Module):
    """Squeeze and excitation; with a BatchNorm before the sigmoid as in CBAM."""

    def __init__(self, norm):
        super().__init__()
        self.reduce, self.expand, self.norm = conv(), conv(), norm

    def forward(self, x):
        gate = self.norm(self.expand(self.reduce(x.mean((2, 3), keepdim=True)).relu()))
        return x * torch.sigmoid(gate)


class Preactivation(nn.Module):
    """The norm precedes its convolution; the last convolution is added to the shortcut without one."""

    def __init__(self, traceable=True):
        super().__init__()
        self.norm1, self.conv1, self.norm2, self.conv2 = nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8), conv()
        self.traceable = traceable

    def forward(self, x):
        if not self.traceable and x.sum() > 1e30:
            raise ValueError
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class Dense(nn.Module):
    """The concatenation of both outputs is normalized, after a pooling and a change of shape."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.mix = conv(4), conv(4), nn.LayerNorm(8), conv()

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.cat([self.a(x), self.b(x)], 1), 2)
        return self.mix(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.read_twice, self.norm = conv(), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.read_twice(x)
        return self.norm(x) + x


class RunTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.norm = conv(), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.twice(self.norm(self.twice(x)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return nn.functional.group_norm(self.conv(x), 2)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return x * torch.sigmoid(x)


class Untraceable(nn.Module):
    def __init__(self, *children):
        super().__init__()
        self.layers = nn.ModuleList(children)

    def forward(self, x):
        if x.sum() > 1e30:
            raise ValueError
        for layer in self.layers:
            x = layer(x)
        return x


BODIES = {
    "plain": (lambda: nn.Sequential(conv(), nn.BatchNorm2d(8)), {"0"}),
    "no norm": (lambda: nn.Sequential(conv(), nn.ReLU()), set()),
    "instance norm": (lambda: nn.Sequential(conv(), nn.Dropout(), nn.InstanceNorm2d(8)), {"0"}),
    "frozen norm": (lambda: nn.Sequential(conv(), FrozenBatchNorm2d(8)), set()),
    "norm of no mean": (lambda: nn.Sequential(conv(), nn.LocalResponseNorm(2)), set()),
    "gate": (lambda: Gate(nn.Identity()), set()),
    "gate with a norm": (lambda: Gate(nn.BatchNorm2d(8)), set()),
    "swish": (Swish, {"conv"}),
    "preactivation": (Preactivation, {"conv1"}),
    "dense": (Dense, {"a", "b"}),
    "two readers": (TwoReaders, set()),
    "run twice": (RunTwice, set()),
    "functional norm": (Functional, {"conv"}),
    "part untraceable": (lambda: Untraceable(conv(), nn.BatchNorm2d(8), conv(), nn.ReLU()), {"layers.0"}),
    "preactivation untraceable": (lambda: Preactivation(traceable=False), {"conv1"}),
    "blocks untraceable": (
        lambda: Untraceable(nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU()), nn.Sequential(conv(), nn.ReLU())),
        {"layers.0.0"},
    ),
    "ends of blocks": (lambda: Untraceable(nn.Sequential(conv()), nn.BatchNorm2d(8)), {"layers.0.0"}),
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("wrap", ["traced", "untraceable", "compiled", "copied in part"])
def test_what_a_normalisation_follows_is_replaced(body, wrap):
    make, expected = BODIES[body]
    model = Net(make())
    if wrap == "untraceable":
        model = Untraceable(nn.Sequential(model.stem, model.bn), model.body, model.head)
        model.layers[2].forward = lambda x: x.mean((1, 2, 3))
        prefix = "layers.1."
    elif wrap == "compiled":
        model, prefix = torch.compile(model, backend="eager"), "_orig_mod.body."
    else:
        prefix = "body."
        if wrap == "copied in part":
            model.lock = threading.Lock()  # cannot be copied
    modes = {name: module.training for name, module in model.named_modules()}
    parameters = [p for name, p in model.named_parameters()]
    convert(model, verbose=False)
    replaced = {name.removeprefix(prefix) for name, kind in kinds(model).items() if kind is AdderConv2d}
    assert replaced == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    kept = {id(p) for p in model.parameters()}
    assert sum(id(p) in kept for p in parameters) == len(parameters) - 2 * len(expected)


class TwoHeads(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.stem, self.bn, self.body, self.bn2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), conv(), nn.BatchNorm2d(8)
        self.main, self.aux = conv(4), conv(4)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(2)])

    def forward(self, x):
        x = self.bn2(self.body(self.bn(self.stem(x)).relu())).relu()
        return self.norms[0](self.main(x)), self.norms[1](self.aux(x))


@pytest.mark.parametrize("norm", [False, True])
def test_both_of_two_heads_stay(norm, capsys):
    model = convert(TwoHeads(norm))
    assert kinds(model) == {"stem": nn.Conv2d, "body": AdderConv2d, "main": nn.Conv2d, "aux": nn.Conv2d}
    assert "convert: kept     main: classifier" in capsys.readouterr().out


def test_the_reasons_are_printed(capsys):
    convert(Net(nn.Sequential(conv(), nn.BatchNorm2d(8), Gate(nn.Identity()), Preactivation())))
    lines = dict(
        line.removeprefix("convert: kept     ").split(": ", 1) for line in capsys.readouterr().out.splitlines()
    )
    assert lines["stem"] == "first convolution"
    assert lines["body.2.reduce"] == "no normalisation after it but relu"
    assert lines["body.2.expand"] == "no normalisation after it but sigmoid"
    assert lines["body.3.conv2"] == "no normalisation after it but add"


def test_a_model_that_counts_its_forwards_is_not_run():
    class Counting(Net):
        calls = 0

        def forward(self, x):
            self.calls += 1
            self.kept = x
            return super().forward(x)

    model = convert(Counting(nn.Sequential(conv(), nn.BatchNorm2d(8))), verbose=False)
    assert model.calls == 0 and not hasattr(model, "kept")


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
        return name in ("0.0", "4")

    model = convert(small_net(), filter=filter)
    assert asked == [(name, nn.Conv2d) for name in ("0.0", "1.0", "2", "4")]
    assert kinds(model) == {"0.0": AdderConv2d, "1.0": nn.Conv2d, "2": nn.Conv2d, "4": AdderConv2d}
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
    norm = nn.BatchNorm2d(4)
    block = nn.Sequential(shared, norm)
    lists = nn.ModuleDict({"a": shared, "norm": norm, "b": shared})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), lists, block, block, nn.Linear(4, 4))
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
    """Computes what its base class does, so it counts as an ordinary convolution."""


def unconvertible():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda *_: None)
    return {
        "Standardized has a custom forward": Standardized(4, 4, 3),
        "parametrized": parametrized,
        "has hooks": hooked,
        "not yet initialised: run the model once first": nn.LazyConv2d(4, 3),
    }


@pytest.mark.parametrize("reason", unconvertible())
@pytest.mark.parametrize("filter", [None, lambda name, module: True], ids=["default", "filter"])
def test_what_cannot_be_replaced_is_left_and_reported(reason, filter, capsys):
    layer = unconvertible()[reason]
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, norms[0], nn.Conv2d(4, 4, 3), norms[1], nn.Linear(4, 4))
    convert(model, filter=filter)
    assert model[1] is layer
    assert isinstance(model[3], AdderConv2d)
    assert f"convert: kept     1: {reason}" in capsys.readouterr().out


def test_plain_subclasses_are_replaced_and_others_are_not_touched():
    others = [nn.ConvTranspose2d(4, 4, 3), nn.Conv1d(4, 4, 3), AdderConv2d(4, 4, 3), nn.Linear(4, 4)]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Renamed(4, 4, 3), nn.BatchNorm2d(4), *others)
    convert(model, verbose=False)
    assert type(model[1]) is AdderConv2d
    assert list(model[3:]) == others


def test_a_model_without_convolutions(capsys):
    model = nn.Sequential(nn.Linear(3, 3))
    assert convert(model) is model
    assert capsys.readouterr().out == "convert: 0 of 0 convolutions replaced\n"
