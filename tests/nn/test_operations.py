"""Operation counts agree with those by hand, layer by layer; energies follow from the table."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from adderops import AdderConv2d, AdderLinear
from adderops.functional import adder_conv2d_int8
from adderops.models import create_model
from adderops.operations import LayerOperations, Operations, count_operations, energy


def count(layer: nn.Module, *shape: int) -> tuple[int, int]:
    operations = count_operations(layer, shape)
    return operations.multiplications, operations.additions


@pytest.mark.parametrize(
    "arguments, shape, terms",
    [
        # C_out * OH * OW * C_in/groups * KH * KW
        (dict(in_channels=3, out_channels=8, kernel_size=3), (1, 3, 10, 7), 8 * 8 * 5 * 3 * 9),
        (dict(in_channels=3, out_channels=8, kernel_size=3, padding=1, bias=True), (1, 3, 10, 7), 8 * 10 * 7 * 3 * 9),
        (dict(in_channels=4, out_channels=6, kernel_size=(3, 1), stride=2, groups=2), (1, 4, 9, 9), 6 * 4 * 5 * 2 * 3),
        (dict(in_channels=5, out_channels=5, kernel_size=3, dilation=2, groups=5), (1, 5, 9, 9), 5 * 5 * 5 * 1 * 9),
        (dict(in_channels=2, out_channels=3, kernel_size=5, padding="same"), (1, 2, 6, 6), 3 * 6 * 6 * 2 * 25),
    ],
)
def test_convolutions(arguments, shape, terms):
    assert count(nn.Conv2d(**arguments), *shape) == (terms, terms)
    assert count(AdderConv2d(**arguments), *shape) == (0, 2 * terms)


def test_linear_layers():
    """In any number of places: a row of a sequence counts as often as it is used."""
    for shape, places in (((1, 6), 1), ((1, 4, 6), 4), ((1, 2, 5, 6), 10)):
        for bias in (False, True):
            assert count(nn.Linear(6, 7, bias=bias), *shape) == (places * 42, places * 42)
            assert count(AdderLinear(6, 7, bias=bias), *shape) == (0, places * 84)


def resnet20_terms() -> dict[str, int]:
    terms = {"conv1": 16 * 32 * 32 * 3 * 9}
    channels_in = 16
    for stage, channels, size in ((1, 16, 32), (2, 32, 16), (3, 64, 8)):
        for block in range(3):
            name = f"layer{stage}.{block}"
            terms[f"{name}.conv1"] = channels * size * size * channels_in * 9
            terms[f"{name}.conv2"] = channels * size * size * channels * 9
            if channels_in != channels:
                terms[f"{name}.downsample.0"] = channels * size * size * channels_in
            channels_in = channels
    return terms | {"fc": 64 * 10}


def test_resnet20():
    """AdderNet's table has 41.17 M and 81.89 M for it; see the module's docstring."""
    terms = resnet20_terms()
    ordinary = ("conv1", "fc")
    cnn, adder = (
        count_operations(create_model("resnet20", kind, in_channels=3, num_classes=10), (1, 3, 32, 32))
        for kind in ("cnn", "adder")
    )
    assert cnn.layers == tuple(LayerOperations(name, "Conv2d", n, n) for name, n in terms.items())
    assert adder.layers == tuple(
        LayerOperations(name, "Conv2d", n, n) if name in ordinary else LayerOperations(name, "AdderConv2d", 0, 2 * n)
        for name, n in terms.items()
    )
    assert (cnn.multiplications, cnn.additions) == (40_813_184, 40_813_184)
    assert (adder.multiplications, adder.additions) == (443_008, 81_183_360)
    # ResNet-32 has twelve more layers of the size of layer1.0.conv1: 69.12 M, as in the table
    assert round((cnn.multiplications + 12 * terms["layer1.0.conv1"]) / 1e6, 2) == 69.12


def test_lenet5():
    terms = {
        "conv1": 6 * 28 * 28 * 25,
        "conv2": 16 * 10 * 10 * 6 * 25,
        "conv3": 120 * 16 * 25,
        "conv4": 84 * 120,
        "fc": 10 * 84,
    }
    operations = count_operations(create_model("lenet5", "adder", in_channels=1, num_classes=10), (1, 1, 32, 32))
    assert {layer.name: layer.additions // (1 + (layer.layer == "AdderConv2d")) for layer in operations.layers} == terms
    assert operations.multiplications == terms["conv1"] + terms["fc"]


class Shared(nn.Module):
    """One layer in two places, a layer never called, and products outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Sequential(self.a, AdderLinear(6, 6), nn.ReLU())
        self.unused = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.b(self.a(x))
        return x @ x.transpose(-1, -2)


def test_shared_layers_and_products_outside_of_layers():
    operations = count_operations(Shared(), (1, 4, 6))
    (shared, adder, elsewhere) = operations.layers
    assert shared.name in ("a", "b.0") and shared[1:] == ("Linear", 2 * 144, 2 * 144)
    assert adder == LayerOperations("b.1", "AdderLinear", 0, 2 * 144)
    assert elsewhere == LayerOperations("elsewhere", "", 4 * 6 * 4, 4 * 6 * 4)
    assert (operations.multiplications, operations.additions) == (288 + 96, 288 + 288 + 96)


def test_models_of_others():
    """torchvision's own figures for its models, in 10^9 multiply-accumulates."""
    models = pytest.importorskip("torchvision").models
    for name, weights in (("mobilenet_v3_small", "IMAGENET1K_V1"), ("vit_b_16", "IMAGENET1K_V1")):
        with torch.device("meta"):
            model = models.get_model(name)
        multiplications, additions = count(model, 1, 3, 224, 224)
        assert multiplications == additions
        assert round(multiplications / 1e9, 3) == models.get_model_weights(name)[weights].meta["_ops"]


def test_per_image_and_without_a_trace():
    """Any batch and any dtype counts the same; parameters, statistics, mode, device and hooks stay as they are."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), AdderConv2d(4, 2, 1)).double()
    state, hooks = copy.deepcopy(model.state_dict()), len(nn.modules.module._global_forward_hooks)
    want = count_operations(model, (1, 3, 5, 5))
    assert want.additions == 9 * 4 * 27 + 2 * 9 * 2 * 4
    for example in ((7, 3, 5, 5), torch.Size((2, 3, 5, 5)), torch.full((4, 3, 5, 5), float("nan"), dtype=torch.double)):
        assert count_operations(model, example) == want
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert len(nn.modules.module._global_forward_hooks) == hooks
    tokens = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 3))
    assert count_operations(tokens, torch.zeros(2, 5, dtype=torch.long)).additions == 5 * 18


def test_no_operations():
    assert count_operations(nn.ReLU(), (1, 3)) == Operations(())


def test_table():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), AdderConv2d(8, 40, 3))
    assert str(count_operations(model, (1, 3, 12, 12))).splitlines() == [
        "name   layer        multiplications  additions",
        "0      Conv2d                21,600     21,600",
        "1      AdderConv2d                0    368,640",
        "total                        21,600    390,240",
    ]


@pytest.mark.parametrize(
    "precision, multiplication, addition",
    [("float32", 3.7, 0.9), ("float16", 1.1, 0.4), ("int32", 3.1, 0.1), ("int8", 0.2, 0.03)],
)
def test_energy(precision, multiplication, addition):
    """Horowitz, ISSCC 2014, figure 1.1.9, in pJ."""
    of_products = Operations((LayerOperations("conv", "Conv2d", 1000, 1000),))
    of_adders = Operations((LayerOperations("adder", "AdderConv2d", 0, 2000),))
    assert energy(of_products, precision) == pytest.approx(1000 * (multiplication + addition))
    assert energy(of_adders, precision) == pytest.approx(2000 * addition)
    assert energy(of_adders) == pytest.approx(1800)


def test_bad_arguments():
    for example in (7, "1", (1, 3.0), None):
        with pytest.raises(TypeError, match="count_operations: example: expected a tensor or the shape of one, got"):
            count_operations(nn.ReLU(), example)
    for example in ((), (3,), (1, 0, 3), torch.zeros(1, 0)):
        with pytest.raises(
            ValueError, match=r"count_operations: example: expected \(N, ...\) without zeros, got shape"
        ):
            count_operations(nn.ReLU(), example)
    with pytest.raises(ValueError, match="energy: precision: expected one of 'float32', .*, got 'int4'"):
        energy(Operations(()), "int4")


# --- torch.utils.flop_counter, and tools built on it ---


def flops(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 2])
def test_flop_counter_mode_counts_as_for_the_twin(groups):
    """2 per term: forward alone, with each gradient and with both; layers on vectors too."""
    x = torch.randn(2, 4, 9, 7)
    for adder, twin, data in (
        (AdderConv2d(4, 6, 3, 2, 1, 1, groups), nn.Conv2d(4, 6, 3, 2, 1, 1, groups, bias=False), x),
        (AdderLinear(7, 5), nn.Linear(7, 5, bias=False), x),
    ):
        with torch.no_grad():
            terms = adder(data).numel() * adder.weight[0].numel()
            assert flops(lambda f=adder, x=data: f(x)) == flops(lambda f=twin, x=data: f(x)) == 2 * terms
        for image, weight in ((True, False), (False, True), (True, True)):
            for layer in (adder, twin)[
                : 2 if groups == 1 else 1
            ]:  # PyTorch miscounts gradients of grouped convolutions
                leaf = data.clone().requires_grad_(image)
                layer.weight.requires_grad_(weight)
                assert flops(lambda f=layer, x=leaf: f(x).sum().backward()) == 2 * terms * (1 + image + weight)


def test_flop_counter_mode_counts_bytes():
    x, w = torch.zeros(2, 4, 6, 6, dtype=torch.uint8), torch.zeros(6, 2, 3, 3, dtype=torch.uint8)
    assert flops(lambda: adder_conv2d_int8(x, w, groups=2)) == 2 * (2 * 6 * 4 * 4) * (2 * 9)


def test_summaries_of_others():
    """torchinfo counts the weights of a layer once per pixel, Lightning by FlopCounterMode."""
    adder = nn.Sequential(AdderConv2d(3, 4, 3), nn.Flatten(), AdderLinear(64, 5))
    twin = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(64, 5, bias=False))
    torchinfo = pytest.importorskip("torchinfo", reason="pip install torchinfo")
    summaries = [torchinfo.summary(model, (2, 3, 6, 6), verbose=0) for model in (adder, twin)]
    assert summaries[0].total_mult_adds == summaries[1].total_mult_adds > 0
    lightning = pytest.importorskip("lightning.pytorch.utilities", reason="pip install lightning")
    x = torch.randn(2, 3, 6, 6)
    counts = [lightning.measure_flops(model, lambda model=model: model(x), torch.Tensor.sum) for model in (adder, twin)]
    assert counts[0] == counts[1] > 0
