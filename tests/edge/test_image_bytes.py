"""From the bytes of an image to those of the first grid: `mean` and `std`, or `pixels`."""

import re

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.edge import bytes_of, export_c, program_of
from adderops.quant import Scheme, calibrate, convert


@pytest.fixture(scope="module")
def images():
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def integer(images):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), AdderConv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).eval()
    return convert(calibrate(network, [images], Scheme(ends="int8")), images)


def table(folder) -> list[list[int]]:
    """The table of 256 bytes of each channel in the C code."""
    text = (folder / "network.c").read_text()
    [numbers] = re.findall(r"uint8_t \w+\[512\] = \{([^}]*)\}", text)
    values = [int(number, 0) for number in numbers.replace("\n", " ").strip(" ,").split(",")]
    return [values[:256], values[256:]]


def test_pixels_are_taken_to_the_first_grid(integer, images, tmp_path):
    pixels = (torch.arange(256.0) - torch.tensor([[100.0], [90.0]])) / torch.tensor([[70.0], [50.0]])
    export_c(integer, images, tmp_path, pixels=pixels)
    assert table(tmp_path) == bytes_of(program_of(integer, images), pixels).tolist()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(pixels=torch.zeros(2, 255)), r"pixels: expected finite float32 \(2, 256\), got torch.float32 \(2, 255\)"),
        (dict(pixels=torch.zeros(2, 256).double()), r"pixels: expected finite float32 \(2, 256\), got torch.float64"),
        (dict(pixels=torch.full((2, 256), float("nan"))), r"pixels: expected finite float32"),
        (dict(pixels=torch.zeros(2, 256), mean=[0, 0], std=[1, 1]), "pixels: expected it instead of mean and std, got"),
    ],
)
def test_wrong_pixels(integer, images, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_c(integer, images, tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []
