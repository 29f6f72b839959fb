"""The model of a step on a GPU: its counts by hand, and what it says of PKKD."""

import pytest
import torch
from harness.gpu_model import GPUS, Operation, Work, parts, seconds, work_of

from adderops import _ops


def test_counts_by_hand():
    """Two layers of 8 images of 4x4 pixels: 16 channels make one tile of 32, 80 channels two of 128."""
    student = [torch.empty(8, c, 4, 4, device="meta") for c in (16, 80)]
    x, w = torch.empty(8, 3, 6, 6, device="meta"), torch.empty(5, 3, 3, 3, device="meta")
    with Work() as mode:
        _ops.kernel_moments(student, student, torch.empty(2, 2, device="meta"), 0.0, 0.0, True)
        _ops.adder_conv2d(x, w, None, (1, 1), (0, 0, 0, 0), (1, 1), 1)
        torch.empty(2, 3, device="meta") @ torch.empty(3, 4, device="meta")
        x.view(-1).add_(1)
    pixels = 8 * 16
    read = 2 * 4 * pixels * (16 + 2 * 80)
    assert mode.operations == [
        ("_kernel_moments", 0, (2.22 * 32**2 + 1.52 * 3 * 128**2) * pixels, read + 4 * (32 * 33 + 160 * 161)),
        ("adder_conv2d", 0, 2.65 * 8 * 5 * 16 * 27, 4 * (8 * 3 * 36 + 5 * 27 + 8 * 5 * 16)),
        ("mm", 24, 0, 4 * (6 + 12 + 8)),
        ("add_", 0, 0, 4 * 8 * 3 * 36),
    ]


def test_the_longer_of_instructions_and_bytes_decides():
    gpu = GPUS["H200"]
    assert seconds(gpu, Operation("adder_conv2d", 0, 1e9, 1), True) == pytest.approx(1e9 / 33.5e12)
    assert seconds(gpu, Operation("mm", 1e9, 0, 1), False) == pytest.approx(1e9 / 33.5e12)
    assert seconds(gpu, Operation("mm", 1e9, 0, 1), True) == pytest.approx(1e9 / 247.25e12)
    assert seconds(gpu, Operation("mm", 1, 0, 4.8e9), True) == pytest.approx(1e-3)


@pytest.mark.slow
def test_a_pkkd_step_of_resnet20_costs_little_more_than_its_networks():
    cnn, plain, pkkd = (
        parts(GPUS["H200"], work_of("resnet20", name), False).total() for name in ("cnn", "plain", "pkkd")
    )
    assert 1 < pkkd / (cnn + plain) <= 1.15
