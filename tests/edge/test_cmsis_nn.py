"""The modelled cost of CMSIS-NN against what was counted, 2026-11-29: cycles from exact instruction counts."""

import pytest
from torch import nn

from adderops.edge.cmsis_nn import cnn_cost, convolution_cycles
from adderops.models import create_model

# C_in, C_out, kernel, stride, height and width of the output: cycles a multiply-accumulate
COUNTED = {
    (16, 16, 3, 1, (32, 32)): 2.73,
    (16, 32, 3, 2, (16, 16)): 2.42,
    (32, 32, 3, 1, (16, 16)): 2.14,
    (32, 64, 3, 2, (8, 8)): 2.03,
    (64, 64, 3, 1, (8, 8)): 1.91,
    (16, 32, 1, 2, (16, 16)): 5.17,
    (32, 64, 1, 2, (8, 8)): 3.99,
    (64, 64, 1, 1, (12, 12)): 2.42,
    (128, 128, 1, 1, (6, 6)): 2.16,
    (64, 64, 1, 1, (25, 5)): 2.44,
    (3, 16, 3, 1, (32, 32)): 6.1,
}


@pytest.mark.parametrize("shape, counted", COUNTED.items(), ids=str)
def test_dense_layers(shape, counted):
    channels, filters, kernel, stride, (height, width) = shape
    terms = channels * kernel**2
    cycles = convolution_cycles(terms, filters, height * width, window=kernel > 1, strided=stride > 1)
    assert cycles / (terms * filters * height * width) == pytest.approx(counted, rel=0.015)
    # the same from the layer itself
    layer = nn.Sequential(
        nn.Conv2d(channels, filters, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(filters)
    )
    cost = cnn_cost(layer, (channels, height * stride, width * stride))
    assert cost.cycles == round(cycles)
    assert cost.weights == terms * filters + 12 * filters
    assert cost.scratch == (4 * terms if kernel > 1 else 0)


@pytest.mark.parametrize("pixels, counted", (((12, 12), 9.41), ((25, 5), 9.36)))
def test_depthwise_layers(pixels, counted):
    cost = cnn_cost(nn.Conv2d(64, 64, 3, padding=1, groups=64), (64, *pixels))
    assert cost.cycles / (9 * 64 * pixels[0] * pixels[1]) == pytest.approx(counted, rel=0.005)


def test_a_whole_network():
    """ResNet-8 of MLPerf Tiny, 12.5 M multiply-accumulates: 34.1 to 35.9 M cycles were counted."""
    cost = cnn_cost(create_model("resnet8", "cnn", 3, 10), (3, 32, 32))
    assert 34.1e6 <= cost.cycles <= 35.9e6
    assert cost.scratch == 4 * 576


def test_what_is_no_layer_of_cmsis_nn():
    with pytest.raises(ValueError, match="model: expected convolutions of two dimensions, got weights"):
        cnn_cost(nn.ConvTranspose2d(4, 4, 2), (4, 8, 8))
