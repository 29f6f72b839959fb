"""A training step on a GPU: it waits for nothing, and as a CUDA graph it gives the same bits.

Without a GPU, or without kernels, the whole file is one skip; tests/distill/test_device_step.py has what the meta
device and the CPU can show.
"""

import pytest
import torch

pytest.importorskip("torchvision", reason="adderops.distill needs torchvision")

from distill.runs import assert_same_state
from distill.test_device_step import loop_of, trained

from adderops.distill import Options, train
from adderops.distill.data import load_data
from adderops.distill.graph import WARM_UP, CudaRecorder
from gpu.device import DEVICE


class Counting(CudaRecorder):
    """Counts the runs of the graphs."""

    replayed = 0

    def record(self, step):
        replay = super().record(step)

        def counted():
            self.replayed += 1
            return replay()

        return counted


@pytest.fixture
def deterministic(monkeypatch):
    """cuDNN's kernels with atomics would differ from run to run."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def on_cpu(result):
    weights, losses, rows = result
    return {name: value.cpu() for name, value in weights.items()}, losses, rows


@pytest.mark.parametrize("options", [{}, {"clip": 1.0}, {"amp": "bfloat16"}], ids=str)
def test_a_graph_gives_the_bits_of_the_steps_it_replaces(deterministic, options):
    recorder = Counting()
    eager, again = (on_cpu(trained(loop_of(None, DEVICE, **options))) for _ in range(2))
    assert_same_state(again, eager, "the same run")
    assert_same_state(on_cpu(trained(loop_of(recorder, DEVICE, **options))), eager, "graph")
    assert recorder.replayed == 14 - WARM_UP - 4


@pytest.mark.parametrize("options", [{}, {"amp": "float16"}, {"clip": 1.0}], ids=str)
def test_a_step_does_not_wait(options):
    steps = iter(loop_of(None, DEVICE, **options))
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_trainer_with_a_graph_learns_the_same(tmp_path, deterministic):
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    rows = []
    for cuda_graph in (False, True):
        options = Options(
            data="digits", method="pkkd", epochs=2, device=DEVICE, cuda_graph=cuda_graph, lr_per_step=True, ema=0.9
        )
        folder = tmp_path / str(cuda_graph)
        rows.append(train(options, load_data(options.data), folder, torch.device(DEVICE)))
    for name in ("student_test_accuracy", "teacher_test_accuracy", "student_train_accuracy"):
        assert rows[0][name] == rows[1][name]
