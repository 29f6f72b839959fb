"""The table of a run's report on what CNN and adder network need on a microcontroller."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from adderops import AdderConv2d
from adderops.distill.runs import microcontroller, report
from adderops.edge import cmsis_nn, export_c, program_of
from adderops.models import create_model
from adderops.quant import Scheme, calibrate, convert, reestimate_batchnorm

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_numbers_are_those_of_the_files(tmp_path):
    """Whatever the weights: of the C code that another network of the same architecture becomes."""
    cnn, adder = microcontroller.rows_of("resnet8", (3, 32, 32), 10)
    assert (cnn["network"], adder["network"]) == ("CNN", "adder network")
    torch.manual_seed(3)
    images = torch.randn(4, 3, 32, 32)
    network = reestimate_batchnorm(create_model("resnet8", "adder", 3, 10), [images]).eval()
    model = calibrate(network, [images], Scheme(ends="int8"))
    written = export_c(convert(model, images), images, tmp_path)
    assert adder["flash, KiB"] == f"{written.constants / 1024:.1f}"
    assert adder["memory, KiB"] == f"{written.arena / 1024:.1f}"
    cost = cmsis_nn.cnn_cost(create_model("resnet8", "cnn", 3, 10), (3, 32, 32))
    assert cnn["cycles, M"] == f"{cost.cycles / 1e6:.2f}" and cnn["ms"] == f"{cost.cycles / 120e3:.1f}"
    assert cnn["flash, KiB"] == f"{cost.weights / 1024:.1f}"
    # input, output and residual of the first block, 16 channels each, beside the widest windows in int16
    assert cnn["memory, KiB"] == f"{(3 * 16 * 1024 + cost.scratch) / 1024:.1f}"
    assert 2.5 < float(cnn["cycles, M"]) / float(adder["cycles, M"]) < 5


def test_global_random_numbers_stay_as_they_were():
    torch.manual_seed(5)
    microcontroller.rows_of.cache_clear()
    microcontroller.rows_of("lenet5", (1, 32, 32), 4)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_live_bytes():
    """A chain with a shortcut: 2 -> 4 -> 4 channels of 8x8 pixels, then 6 of 4x4 beside what the sum reads."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.first = nn.Conv2d(2, 4, 3, padding=1), AdderConv2d(4, 4, 3, padding=1)
            self.second, self.head = AdderConv2d(4, 4, 3, padding=1), nn.Linear(256, 3)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.head((self.second(torch.relu(self.first(x))) + x).flatten(1))

    images = torch.randn(4, 2, 8, 8)
    model = calibrate(Block().eval(), [images], Scheme(ends="int8"))
    assert microcontroller.live_bytes(program_of(convert(model, images), images)) == 3 * 4 * 64


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(arch="vgg_small"), "No numbers for vgg_small: it has 4.4 MiB of weights in int8"),
        (dict(arch="torchvision/squeezenet1_1"), "No numbers for torchvision/squeezenet1_1: "),
    ],
)
def test_one_line_says_why_there_is_none(runs, tmp_path, change, reason):
    run = runs["plain"]
    other = replace(run, config=run.config.changed(**change), finished=True)
    section = report._microcontroller(other)
    assert f"<p>{reason}" in section and "<table>" not in section and section.count("\n") == 2
