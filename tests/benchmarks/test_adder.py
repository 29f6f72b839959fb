"""benchmarks/bench_adder.py runs end to end, its file has the documented keys, and its means are those of its rows."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch, set_threads):
    """The module bench_adder; its siblings are found as they are when it runs as a script."""
    set_threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_adder

    return bench_adder


@pytest.fixture
def tiny(bench):
    from layers import Layer

    return (Layer("tiny", 2, 16, 16, 6, 3), Layer("tiny", 3, 16, 32, 6, 3, 2), Layer("tiny", 2, 8, 16, 6, 1, 2))


def test_end_to_end(bench, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    file, plot = tmp_path / "r.json", tmp_path / "r.png"
    command = ["--threads", "1", "--full", "--seconds", "0.1", "--json", str(file), "--plot", str(plot)]
    bench.main(command, tiny)

    result = json.loads(file.read_text())
    assert set(result) == {"machine", "limits", "rows", "memory", "geomean"}
    assert set(result["machine"]) >= {"cpu", "threads", "instruction_set", "torch", "date"}
    assert plot.read_bytes().startswith(b"\x89PNG")

    rates = {}
    for row in result["rows"]:
        assert row["samples"] >= 3 and row["seconds"] > 0
        assert math.isclose(row["gterm_per_s"], row["terms"] / row["seconds"] / 1e9)
        rates[row["layer"], row["pass"], row["contestant"], row["memory_format"]] = row["gterm_per_s"]
    terms = {(row["layer"], row["pass"]): row["terms"] for row in result["rows"] if row["contestant"] == "adder"}
    assert all(terms[x.name, name] == (3 if name == "step" else 1) * x.terms for x in tiny for name in bench.PASSES)
    names = [layer.name for layer in tiny]
    for layer in names:
        for name in bench.PASSES:
            for contestant in ("adder", "conv2d"):
                for memory_format in ("contiguous", "channels_last"):
                    assert (layer, name, contestant, memory_format) in rates
        for peer in ("cdist", "eager"):
            assert {(layer, name, peer, "contiguous") in rates for name in ("forward", "step")} == {True}

    for mean, name, other in (
        ("forward_over_conv2d", "forward", "conv2d"),
        ("step_over_conv2d", "step", "conv2d"),
        ("forward_over_cdist", "forward", "cdist"),
        ("step_over_eager", "step", "eager"),
    ):
        ratios = [rates[n, name, "adder", "contiguous"] / rates[n, name, other, "contiguous"] for n in names]
        assert math.isclose(result["geomean"][mean], math.prod(ratios) ** (1 / len(names)))

    printed = capsys.readouterr().out
    assert all(layer in printed for layer in names) and result["machine"]["cpu"] in printed
    if sys.platform == "linux":
        assert [entry["layer"] for entry in result["memory"]] == names
        assert all(entry["extra_bytes"] < entry["allowed_bytes"] for entry in result["memory"])


def test_a_wrong_result_is_never_timed(bench, tiny, monkeypatch):
    real = bench.adder_conv2d
    monkeypatch.setattr(bench, "adder_conv2d", lambda *args, **kwargs: real(*args, **kwargs) * 1.001)
    with pytest.raises(SystemExit, match="adder contiguous forward: wrong result"):
        bench.main(["--threads", "1", "--seconds", "0.1"], tiny)


@pytest.mark.parametrize("wrong", ["grad_x", "grad_w"])
def test_a_wrong_gradient_is_never_timed(bench, tiny, wrong):
    import verify
    from peers import eager_step

    layer = tiny[1]
    tensors = layer.tensors()
    results = dict(zip(("y", "grad_x", "grad_w"), eager_step(layer, *tensors), strict=True))
    assert verify.check_gradients("eager", layer, *tensors, results["grad_x"], results["grad_w"]) <= 1
    results[wrong] = results[wrong].clone()
    results[wrong][-1 if wrong == "grad_x" else 0, 0, 0, 0] += 0.01
    with pytest.raises(SystemExit, match=f"{wrong}: wrong result"):
        verify.check_gradients("eager", layer, *tensors, results["grad_x"], results["grad_w"])


def test_named_layers(bench):
    from layers import DEFAULT_LAYERS, LAYERS

    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
    assert set(DEFAULT_LAYERS) < set(LAYERS)
    for layer in LAYERS:
        x, w, grad_y = layer.batch_within(1).tensors()
        assert len(x) == 1
        y = torch.nn.functional.conv2d(x, w, stride=layer.stride, padding=layer.padding)
        assert y.shape == grad_y.shape
        assert layer.terms == layer.batch * y.numel() * w[0].numel()


def test_contestants_take_turns(bench):
    from timing import Contestant, take_turns

    calls = []

    def contestant(name, seconds):
        return Contestant(name, 1, lambda repeats: calls.append(name) or seconds * repeats)

    timings = take_turns([contestant("a", 0.01), contestant("b", 0.02)], budget=1.0, least=3, most=4)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # warm-up, then rounds with another one first
    assert timings["a"].seconds == 0.01 and timings["b"].seconds == 0.02
    slow = take_turns([contestant("slow", 1.0), contestant("quick", 0.01)], budget=1.0, least=3, most=20)
    assert (slow["slow"].samples, slow["quick"].samples) == (3, 20)
