"""benchmarks/bench_int8.py runs end to end, its file has the documented keys, and its means are those of its rows."""

import json
import math
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_int8

    monkeypatch.setattr(bench_int8, "PAUSE", 0)
    monkeypatch.setattr(bench_int8, "SAMPLE", 0.002)
    return bench_int8


@pytest.fixture
def tiny(bench):
    from layers import Layer

    return (Layer("tiny", 2, 16, 16, 6, 3), Layer("tiny", 3, 16, 32, 6, 3, 2), Layer("tiny", 2, 8, 16, 6, 1, 2))


def test_end_to_end(bench, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    file, plot = tmp_path / "r.json", tmp_path / "r.png"
    bench.main(["--threads", "1", "--batch", "2", "--seconds", "0.1", "--json", str(file), "--plot", str(plot)], tiny)
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "limits", "rows", "missing", "geomean"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    rates = {}
    for row in result["rows"]:
        assert row["samples"] >= 3 and row["seconds"] > 0
        key = row.get("layer", "resnet20"), row["contestant"]
        rate = row["gterm_per_s"] if "layer" in row else row["images_per_s"]
        rates[key] = max(rate, rates.get(key, 0))
    names = [layer.name for layer in tiny]
    others = {"over_conv2d": ["conv2d float32"]}
    if "onnxruntime int8" not in result["missing"]:
        others["over_onnxruntime"] = ["onnxruntime int8"]
    if "torch int8" not in result["missing"]:
        others["over_torch_int8"] = ["torch int8"]
    others["over_int8_conv2d"] = [other[0] for title, other in others.items() if title != "over_conv2d"]
    for title, contestants in others.items():
        ratios = [rates[n, "adder int8"] / max(rates[n, c] for c in contestants) for n in names]
        assert math.isclose(result["geomean"][title], math.prod(ratios) ** (1 / len(names))), title
    ratio = rates["resnet20", "adder int8"] / rates["resnet20", "cnn float32"]
    assert math.isclose(result["geomean"]["resnet20_over_cnn_float32"], ratio)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "share_of_limit" in printed


def test_a_wrong_result_is_never_timed(bench, tiny, monkeypatch):
    real = bench.adder_conv2d_int8
    monkeypatch.setattr(bench, "adder_conv2d_int8", lambda *args, **kwargs: real(*args, **kwargs) + 1)
    with pytest.raises(SystemExit, match="adder int8: wrong result"):
        bench.main(["--threads", "1", "--seconds", "0.1"], tiny)


def test_a_wrong_peer_is_never_timed(bench, tiny, monkeypatch):
    peer = sys.modules["int8_peers"]
    monkeypatch.setattr(peer, "SCALES", (0.02, 0.01, 0.5))
    real = peer.convolution_of_integers
    monkeypatch.setattr(peer, "convolution_of_integers", lambda *args: 255 - real(*args))
    with pytest.raises(SystemExit, match="wrong result"):
        bench.main(["--threads", "1", "--seconds", "0.1"], tiny)
