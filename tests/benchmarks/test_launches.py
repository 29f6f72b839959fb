"""The launches of a training step, counted on the meta device."""

import pytest
import torch
from harness.launches import CONTESTANTS, Launches, count


@pytest.mark.parametrize("arch, most", [("resnet20", 120), pytest.param("resnet50", 156, marks=pytest.mark.slow)])
def test_pkkd_adds_few_launches_to_those_of_its_networks(arch, most):
    """resnet50 has 52 matched layers instead of 20, in 6 groups instead of 3."""
    cnn, plain, pkkd = (count(arch, contestant).total() for contestant in CONTESTANTS)
    assert 20 < pkkd - cnn - plain <= most


def test_launches_are_counted():
    tensors = {"device": "meta"}
    with Launches() as mode:
        x = torch.zeros(3, 4, **tensors)
        x.view(12).add_(1)
        torch.cat([x, torch.empty(4, 3, **tensors).T])
        # by the blocks of 65536 numbers, 320 of which are a launch, and by the tensors, 110 of one list
        torch._foreach_add_([torch.empty(320 * 65536 + 1, **tensors)], 1.0)
        torch._foreach_neg_(111 * [torch.empty(1, **tensors)])
    assert +mode.counts == {"zeros": 1, "add_": 1, "cat": 1, "_foreach_add_": 2, "_foreach_neg_": 2}


@pytest.mark.parametrize("name", ["_mean_abs", "_kernel_moments", "_kernel_moments_grad", "_match_rows"])
def test_operators_on_lists_count_their_lists(name):
    """Layers of 8 and 64 channels need kernels of their own; 41 layers are more than any list holds."""

    def launched(*channels: int) -> int:
        student = [torch.empty(2, c, 4, 4, device="meta") for c in channels]
        rows = [torch.empty(1, c, 2 * c, device="meta") for c in channels]
        weights = [torch.empty(1, c, c, device="meta") for c in channels]
        moments = torch.empty(sum((2 * c + 1) * 2 * c for c in channels), device="meta")
        arguments = {
            "_mean_abs": (student,),
            "_kernel_moments": (student, student, torch.empty(2, len(channels), device="meta"), 0.0, 0.0, True),
            "_match_rows": (rows, rows, weights, weights, 1e-5),
        }
        arguments["_kernel_moments_grad"] = (moments, *arguments["_kernel_moments"])
        with Launches() as mode:
            getattr(torch.ops.adderops, name)(*arguments[name])
        return mode.counts[name]

    both = 2 if name in ("_mean_abs", "_match_rows") else 4
    assert (launched(8), launched(8, 8, 8), launched(8, 64)) == (2, 2, both)
    assert launched(*[8] * 41) in (4, 6)
