"""experiments/edge_costs.py: memory of a CNN by hand, and one row per network and engine."""

from pathlib import Path

import pytest
from torch import nn

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import edge_costs

    return edge_costs


class Shortcut(nn.Module):
    """One convolution, its sum with a 1x1 convolution of its own input, and a second convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.shortcut = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.norm(self.first(x)).relu()
        return self.last(y + self.shortcut(x))


def test_activations_of_a_cnn_by_hand(costs):
    # image 2, first 4, shortcut 4 channels of 36 pixels at once; later 4 + 4 and 4 + 1
    assert costs.activation_bytes(Shortcut(), (2, 6, 6)) == 10 * 36
    # 4 channels of 36 pixels and 4 of 9 after pooling; the image and the 4 channels need more: 6 * 36
    pooled = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    assert costs.activation_bytes(pooled, (2, 6, 6)) == 6 * 36
    assert costs.activation_bytes(pooled[1:3], (4, 6, 6)) == 4 * 36 + 4 * 9


def test_activations_of_the_networks(costs):
    from adderops.models import create_model

    # three maps of 16 x 32 x 32 in the first block; two of 64 x 16 x 16
    assert costs.activation_bytes(create_model("resnet8", "cnn", 1)) == 3 * 16 * 1024
    assert costs.activation_bytes(create_model("ds_cnn", "cnn", 1)) == 2 * 64 * 256


def test_layers_that_are_swapped(costs):
    from adderops.models import create_model

    layers = sorted(layer.name for layer in costs.adder_layers(create_model("resnet8_x0_5", "cnn", 1)))
    first, second = ["8-8.3x3@32"] * 2, ["8-16.3x3s2@32", "16-16.3x3@16", "8-16.1x1s2@32"]
    assert layers == sorted([*first, *second, "16-32.3x3s2@16", "32-32.3x3@8", "16-32.1x1s2@16"])
    pointwise = [layer.name for layer in costs.adder_layers(create_model("ds_cnn", "cnn", 1))]
    assert pointwise == ["64-64.1x1@16"] * 4


@pytest.mark.slow
def test_rows_of_a_network(costs):
    """The order of the three engines; the convolution needs twice the flash for the weights that are swapped."""
    from harness.cortex_m import Unavailable, toolchain

    try:
        toolchain()
    except Unavailable as reason:
        pytest.skip(str(reason))
    pytest.importorskip("unicorn")
    adder, cmsis, conv = costs.costs_of("ds_cnn_x0_5")
    assert [row["kind"] for row in (adder, cmsis, conv)] == ["adder", "cnn", "cnn"]
    assert all(list(row) == costs.COLUMNS and row["parameters"] == 6442 for row in (adder, cmsis, conv))
    assert adder["cycles"] < conv["cycles"] < cmsis["cycles"]
    assert conv["flash"] - adder["flash"] == pytest.approx(4 * 32 * 32, rel=0.2)  # int16 in place of bytes
    assert adder["arena"] < cmsis["arena"]
