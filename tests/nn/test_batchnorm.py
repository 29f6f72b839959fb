"""`reestimate_batchnorm`: its statistics, and everything that it must not change."""

import pytest
import torch
from torch import nn

from adderops import reestimate_batchnorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)
    )


def test_statistics_are_the_means_over_batches():
    model, batches = network().eval(), [torch.randn(6, 2, 8, 8) for _ in range(3)]
    reestimate_batchnorm(model, batches)
    with torch.no_grad():
        outputs = [model[0](batch) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0))
    assert model[1].momentum == 0.1


def test_pairs_and_a_generator():
    batches = [torch.randn(6, 2, 8, 8) for _ in range(2)]
    expected = reestimate_batchnorm(network(), batches).state_dict()
    found = reestimate_batchnorm(network(), ((batch, torch.zeros(6)) for batch in batches)).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_modes_stay_and_frozen_layers_keep_their_statistics():
    model = network().train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    before = model[1].running_mean.clone()
    reestimate_batchnorm(model, [torch.randn(6, 2, 8, 8)])
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, before) and model[5].running_mean.abs().sum() > 0


@pytest.mark.parametrize(
    "batches, expected",
    [
        ([], "expected at least one, got none"),
        ([torch.randn(4, 2, 8, 8), torch.full((4, 2, 8, 8), torch.nan)], "got others in batch 2"),
        ([torch.randn(4, 2, 8, 8), torch.randn(4, 5, 8, 8)], "channels"),
    ],
)
def test_a_failure_changes_nothing(batches, expected):
    model = reestimate_batchnorm(network().eval(), [torch.randn(6, 2, 8, 8)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=expected):
        reestimate_batchnorm(model, batches)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model[1].momentum == 0.1 and not any(module.training for module in model.modules())
