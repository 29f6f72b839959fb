"""benchmarks/bench_int8.py runs end to end; its CSV file and its means are those of its rows."""

import math

import bench_int8
import pytest
from harness import int8_peers, report


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(bench_int8, "PAUSE", 0)
    monkeypatch.setattr(bench_int8, "SAMPLE", 0.002)


@pytest.mark.slow
def test_end_to_end(limits, tiny, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    file, plot = tmp_path / "r.csv", tmp_path / "r.png"
    command = ["--threads", "1", "--batch", "2", "--seconds", "0.1", "--csv", str(file), "--plot", str(plot)]
    result = bench_int8.main(command, tiny)
    about, rows = report.read_csv(file)
    assert rows == result["rows"]
    measured = {name.removeprefix("limit, Gterm/s: "): rate for name, rate in about.items() if "Gterm/s" in name}
    assert measured == {name: str(rate) for name, rate in result["limits"].items()}
    assert limits or not measured
    missing = {name.removeprefix("missing: ") for name in about if name.startswith("missing: ")}
    assert missing == set(result["missing"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    rates = {}
    for row in rows:
        assert row["samples"] >= 3 and row["seconds"] > 0
        key = row.get("layer", "resnet20"), row["contestant"]
        rate = row["gterm_per_s"] if "layer" in row else row["images_per_s"]
        rates[key] = max(rate, rates.get(key, 0))
    names = [layer.name for layer in tiny]
    others = {"over_conv2d": ["conv2d float32"]}
    if "onnxruntime int8" not in missing:
        others["over_onnxruntime"] = ["onnxruntime int8"]
    if "torch int8" not in missing:
        others["over_torch_int8"] = ["torch int8"]
    others["over_int8_conv2d"] = [other[0] for title, other in others.items() if title != "over_conv2d"]
    for title, contestants in others.items():
        ratios = [rates[n, "adder int8"] / max(rates[n, c] for c in contestants) for n in names]
        assert math.isclose(result["geomean"][title], math.prod(ratios) ** (1 / len(names))), title
    ratio = rates["resnet20", "adder int8"] / rates["resnet20", "cnn float32"]
    assert math.isclose(result["geomean"]["resnet20_over_cnn_float32"], ratio)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and ("share_of_limit" in printed) == bool(measured)

    # the file alone gives the same means and a plot
    again = tmp_path / "again.png"
    assert bench_int8.main(["--read", str(file), "--plot", str(again)])["geomean"] == result["geomean"]
    assert again.read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_never_timed(tiny, without_limits, monkeypatch):
    real = bench_int8.adder_conv2d_int8
    monkeypatch.setattr(bench_int8, "adder_conv2d_int8", lambda *args, **kwargs: real(*args, **kwargs) + 1)
    with pytest.raises(SystemExit, match="adder int8: wrong result"):
        bench_int8.main(["--threads", "1", "--seconds", "0.1"], tiny)


def test_a_wrong_peer_is_never_timed(tiny, without_limits, monkeypatch):
    real = int8_peers.convolution_of_integers
    monkeypatch.setattr(int8_peers, "convolution_of_integers", lambda *args: 255 - real(*args))
    with pytest.raises(SystemExit, match="wrong result"):
        bench_int8.main(["--threads", "1", "--seconds", "0.1"], tiny)
