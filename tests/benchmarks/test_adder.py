"""benchmarks/bench_adder.py runs end to end; its CSV file and its means are those of its rows."""

import math
import sys

import bench_adder
import pytest
import torch
from harness import report, verify
from harness.layers import DEFAULT_LAYERS, LAYERS
from harness.peers import eager_step
from harness.timing import Contestant, take_turns


@pytest.mark.slow
def test_end_to_end(limits, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    file, plot = tmp_path / "r.csv", tmp_path / "r.png"
    command = ["--threads", "1", "--full", "--seconds", "0.1", "--csv", str(file), "--plot", str(plot)]
    result = bench_adder.main(command, tiny)

    about, rows = report.read_csv(file)
    assert rows == result["rows"]
    assert set(about) >= {"cpu", "threads", "instruction_set", "torch", "date"} and about["dtype"] == "float32"
    measured = {name.removeprefix("limit, Gterm/s: "): rate for name, rate in about.items() if "Gterm/s" in name}
    assert measured == {name: str(rate) for name, rate in result["limits"].items()}
    assert limits or not measured
    assert plot.read_bytes().startswith(b"\x89PNG")

    timed = [row for row in rows if row["pass"] != "memory"]
    rates = {}
    for row in timed:
        assert row["samples"] >= 3 and row["seconds"] > 0
        assert math.isclose(row["gterm_per_s"], row["terms"] / row["seconds"] / 1e9)
        rates[row["layer"], row["pass"], row["contestant"], row["memory_format"]] = row["gterm_per_s"]
    terms = {(row["layer"], row["pass"]): row["terms"] for row in timed if row["contestant"] == "adder"}
    passes = bench_adder.PASSES
    assert all(terms[x.name, name] == (3 if name == "step" else 1) * x.terms for x in tiny for name in passes)
    names = [layer.name for layer in tiny]
    for layer in names:
        for name in passes:
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

    shares = [row["share_of_limit"] for row in timed if "share_of_limit" in row]
    assert len(shares) == (24 if measured else 0) and all(share > 0 for share in shares)

    printed = capsys.readouterr().out
    assert all(layer in printed for layer in names) and about["cpu"] in printed
    if sys.platform == "linux":
        memory = [row for row in rows if row["pass"] == "memory"]
        assert [row["layer"] for row in memory] == names
        assert all(row["extra_bytes"] < row["allowed_bytes"] for row in memory)

    # the file alone gives the same means and a plot
    again = tmp_path / "again.png"
    assert bench_adder.main(["--read", str(file), "--plot", str(again)])["geomean"] == result["geomean"]
    assert again.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_never_timed(tiny, without_limits, monkeypatch):
    monkeypatch.setattr(bench_adder, "extra_memory", lambda *_: "not of interest here")
    real = bench_adder.adder_conv2d
    monkeypatch.setattr(bench_adder, "adder_conv2d", lambda *args, **kwargs: real(*args, **kwargs) * 1.001)
    with pytest.raises(SystemExit, match="adder contiguous forward: wrong result"):
        bench_adder.main(["--threads", "1", "--seconds", "0.1"], tiny)


@pytest.mark.parametrize("wrong", ["grad_x", "grad_w"])
def test_a_wrong_gradient_is_never_timed(tiny, wrong):
    layer = tiny[1]
    tensors = layer.tensors()
    results = dict(zip(("y", "grad_x", "grad_w"), eager_step(layer, *tensors), strict=True))
    assert verify.check_gradients("eager", layer, *tensors, results["grad_x"], results["grad_w"]) <= 1
    results[wrong] = results[wrong].clone()
    results[wrong][-1 if wrong == "grad_x" else 0, 0, 0, 0] += 0.01
    with pytest.raises(SystemExit, match=f"{wrong}: wrong result"):
        verify.check_gradients("eager", layer, *tensors, results["grad_x"], results["grad_w"])


def test_named_layers():
    assert len({layer.name for layer in LAYERS}) == len(LAYERS)
    assert set(DEFAULT_LAYERS) < set(LAYERS)
    for layer in LAYERS:
        x, w, grad_y = layer.batch_within(1).tensors()
        assert len(x) == 1
        y = torch.nn.functional.conv2d(x, w, stride=layer.stride, padding=layer.padding)
        assert y.shape == grad_y.shape
        assert layer.terms == layer.batch * y.numel() * w[0].numel()


def test_contestants_take_turns():
    calls = []

    def contestant(name, seconds):
        return Contestant(name, 1, lambda repeats: calls.append(name) or seconds * repeats)

    timings = take_turns([contestant("a", 0.01), contestant("b", 0.02)], budget=1.0, least=3, most=4)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]  # warm-up, then alternating first contestants
    assert timings["a"].seconds == 0.01 and timings["b"].seconds == 0.02
    slow = take_turns([contestant("slow", 1.0), contestant("quick", 0.01)], budget=1.0, least=3, most=20)
    assert (slow["slow"].samples, slow["quick"].samples) == (3, 20)
