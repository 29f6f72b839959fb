"""The CUDA kernels of L_mid against float64 on a GPU; without one the whole file is one skip."""

import pytest
import torch
from ops.test_moments import CENTRES, groups, weights
from simt import test_moments as on_host

from adderops import _ops
from gpu.device import DEVICE


class OnDevice:
    """The operators with the calls of tests/simt/host.py: tensors of the CPU, which travel to the device and back."""

    def moments(self, student, teacher, scales, *options) -> torch.Tensor:
        return _ops.kernel_moments(moved(student), moved(teacher), scales.to(DEVICE), *options).cpu()

    def moments_grad(self, grad, student, teacher, scales, *options) -> list[torch.Tensor]:
        arguments = grad.to(DEVICE), moved(student), moved(teacher), scales.to(DEVICE)
        return [g.cpu() for g in _ops.kernel_moments_grad(*arguments, *options)]


def moved(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [t.to(DEVICE) for t in tensors]


@pytest.mark.parametrize("kernel", (True, False))
@pytest.mark.parametrize("types", [(a, c) for a in on_host.TYPES for c in on_host.TYPES], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "view"])
def test_against_float64(layout, types, kernel):
    on_host.check(OnDevice(), *on_host.make(layout, types), kernel)


def test_layers_of_a_network():
    """ResNet-20 and ResNet-50 at their sizes: several launches, many splits, tiles off the diagonal."""
    layers = [((128, c, s, s), c) for c, s in ((16, 32), (32, 16), (64, 8)) for _ in range(6)]
    layers += [((8, c, s, s), c) for c, s in ((64, 56), (128, 28), (256, 14), (512, 7))]
    on_host.check(OnDevice(), *on_host.make("channels_last", layers=layers), True, layers)


def test_same_bits_again():
    student, teacher, scales = on_host.make("contiguous")
    options = moved(student), moved(teacher), scales.to(DEVICE), *CENTRES, True
    first = [_ops.kernel_moments(*options), *_ops.kernel_moments_grad(weights(on_host.LAYERS).to(DEVICE), *options)]
    for _ in range(20):
        again = [_ops.kernel_moments(*options), *_ops.kernel_moments_grad(weights(on_host.LAYERS).to(DEVICE), *options)]
        assert all(map(torch.equal, again, first))


def test_mean_abs():
    for dtype in on_host.TYPES:
        xs = [torch.randn(s).to(dtype) for s in ((3, 5, 7, 4), (1, 1, 1, 1), (64, 33, 30, 20), (130, 2, 1, 3))] * 12
        xs += [x.transpose(1, 3) for x in xs[:4]] + [x[:, :, ::2, ::2] for x in xs[:4]]
        exact = torch.stack([x.double().abs().mean() for x in xs])
        assert ((_ops.mean_abs(moved(xs)).cpu() - exact).abs() <= 1e-6 * exact).all()


def test_match_rows():
    given = [list(lists) for lists in zip(*groups(), strict=True)]
    for a, b in zip(_ops.match_rows(*map(moved, given), 1e-5), _ops.match_rows(*given, 1e-5), strict=True):
        assert ((a.cpu() - b).abs() <= 1e-6 * b.abs().max()).all()


def test_operands_of_two_devices():
    """No kernel may receive a host address, for any operand."""
    student, teacher, scales = on_host.make("contiguous")
    for operands in (
        (moved(student), teacher, scales.to(DEVICE)),
        (student, moved(teacher), scales.to(DEVICE)),
        (moved(student), moved(teacher), scales),
    ):
        with pytest.raises(RuntimeError, match="expected the device of "):
            _ops.kernel_moments(*operands, *CENTRES, True)
    with pytest.raises(RuntimeError, match="expected the device of "):
        _ops.mean_abs([student[0].to(DEVICE), teacher[0]])


def test_a_graph_replays_the_operators():
    """Nothing reads the device from the host: the four operators are captured, with new outputs in the same tensors."""
    layers = [((2, 16, 8, 8), 16), ((2, 64, 4, 4), 64)]
    student, teacher, scales = on_host.make("contiguous", layers=layers)
    student, teacher, scales, grad = moved(student), moved(teacher), scales.to(DEVICE), weights(layers).to(DEVICE)
    given = [moved(lists) for lists in zip(*groups(), strict=True)]

    def step() -> list[torch.Tensor]:
        options = student, teacher, scales, *CENTRES, True
        found = [_ops.kernel_moments(*options), *_ops.kernel_moments_grad(grad, *options), _ops.mean_abs(student)]
        return found + _ops.match_rows(*given, 1e-5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in (*student, scales):
        tensor.mul_(0.75)
    graph.replay()
    assert all(map(torch.equal, captured, step()))
