"""A network registered from outside works wherever the built-in ones do, with no file of adderops edited."""

import pytest
import torch
import torch.nn.functional as F
from distill.runs import write_bars
from torch import nn

from adderops import AdderConv2d, reestimate_batchnorm
from adderops import convert as convert_to_adder
from adderops.distill import Config, main
from adderops.models import (
    ARCHITECTURES,
    create_model,
    input_size,
    layer_of_kind,
    lenet5,
    matched_layers,
    register_model,
)
from adderops.quant import calibrate, convert


class Toy(nn.Module):
    """What a user would write: four layers, two of which follow `kind`."""

    def __init__(self, kind: str, in_channels: int, num_classes: int) -> None:
        super().__init__()
        layer = layer_of_kind(kind)
        self.conv1 = nn.Conv2d(in_channels, 4, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = layer(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.conv3 = layer(8, 8, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def toy(kind: str = "adder", in_channels: int = 3, num_classes: int = 10) -> Toy:
    return Toy(kind, in_channels, num_classes)


@pytest.fixture(autouse=True)
def registered():
    known = dict(ARCHITECTURES)
    assert register_model(image_size=24)(toy) is toy
    yield
    ARCHITECTURES.clear()
    ARCHITECTURES.update(known)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def test_built_by_name():
    assert input_size("toy") == 24
    for kind, layer in (("adder", AdderConv2d), ("cnn", nn.Conv2d)):
        network = create_model("toy", kind, in_channels=1, num_classes=5)
        assert type(network.conv2) is type(network.conv3) is layer
        assert list(matched_layers(network)) == ["conv2", "conv3"]
        assert network(torch.zeros(2, 1, 24, 24)).shape == (2, 5)
    with pytest.raises(ValueError, match="expected one of 'lenet5', .*'toy', .*'timm/NAME', got 'toi'"):
        create_model("toi")


def test_converted_and_quantized(images):
    """Its CNN through `adderops.convert`, then int8."""
    torch.manual_seed(0)
    network = convert_to_adder(create_model("toy", "cnn", in_channels=1), verbose=False)
    assert type(network.conv2) is type(network.conv3) is AdderConv2d
    reestimate_batchnorm(network, [images])
    calibrated = calibrate(network.eval(), [images])
    integer = convert(calibrated, images)
    assert integer.conv2.weight.dtype == integer.conv3.weight.dtype == torch.uint8
    assert torch.allclose(integer(images), calibrated(images), atol=1e-3)


def test_trained_and_tested_by_the_command_line(tmp_path, capsys):
    folder, images = tmp_path / "run", tmp_path / "bars"
    images.mkdir()
    write_bars(images)
    options = ["--data", str(images), "--method", "pkkd", "--epochs", "2", "--batch-size", "16"]
    assert main(["--arch", "toy", *options, "--threads", "1", "--output", str(folder)]) == 0
    assert Config.load(folder / "config.json").arch == "toy"
    capsys.readouterr()
    assert main(["eval", str(folder)]) == 0
    assert "student" in capsys.readouterr().out
    assert main(["quantize", str(folder)]) == 0


def test_a_name_is_taken_once():
    def other(kind: str, in_channels: int, num_classes: int) -> nn.Module:
        return nn.Flatten()

    with pytest.raises(ValueError, match="name: expected a new one, got 'toy' of nn.test_register_model.toy"):
        register_model("toy", image_size=8)(other)
    register_model(image_size=28)(toy)  # its module is run again
    assert input_size("toy") == 28
    register_model("toy-8", image_size=8)(other)
    assert isinstance(create_model("toy-8"), nn.Flatten)


@pytest.mark.parametrize("name", ["", "timm/toy", "a b"])
def test_malformed_names_are_refused(name):
    with pytest.raises(ValueError, match="register_model: name: expected letters"):
        register_model(name, image_size=8)(toy)


def test_an_image_has_a_size():
    with pytest.raises(ValueError, match="register_model: image_size: expected at least 1, got 0"):
        register_model(image_size=0)


def test_built_in_networks_stay_what_they_are():
    assert ARCHITECTURES["lenet5"].build is lenet5
    assert ARCHITECTURES["lenet5"].image_size == 32
