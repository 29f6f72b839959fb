"""benchmarks/bench_spiking.py runs end to end; its CSV file and its extremes are those of its rows."""

import sys

import bench_spiking
import pytest
from harness import report


@pytest.mark.parametrize("installed", (True, False))
def test_end_to_end(installed, tmp_path, set_threads, monkeypatch, capsys):
    set_threads(1)
    if not installed:
        peers = ("spikingjelly", "snntorch")
        for name in [*peers, *(name for name in sys.modules if name.startswith(tuple(f"{peer}." for peer in peers)))]:
            monkeypatch.setitem(sys.modules, name, None)
    shapes = [(3, 2, 4, 5, 5), (2, 1, 3, 4, 4)]
    result = bench_spiking.main(
        ["--threads", "1", "--seconds", "0.2", "--new-pages", "--csv", str(tmp_path / "r.csv")], shapes
    )
    about, rows = report.read_csv(tmp_path / "r.csv")
    assert rows == result["rows"]
    contestants = {row["contestant"] for row in rows}
    assert contestants == {"operator", "clone", "copy_", "loop", *bench_spiking.PEERS} - set(result["missing"])
    assert installed or set(result["missing"]) == set(bench_spiking.PEERS)
    assert len(rows) == len(shapes) * 2 * len(contestants) and all(row["samples"] >= 3 for row in rows)
    assert min(row["ratio"] for row in rows if row["contestant"] == "loop") == float(about["least over loop"])
    assert max(1 / row["ratio"] for row in rows if row["contestant"] == "clone") == float(about["most clone"])
    printed = capsys.readouterr().out
    assert "3x2x4x5x5" in printed and all(f"{name} did not take part" in printed for name in result["missing"])


def test_a_wrong_result_ends_the_run(monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setattr(bench_spiking, "_loop", lambda x, **_: x)
    with pytest.raises(SystemExit, match="IF loop: another result than the operator's"):
        bench_spiking.main(["--threads", "1", "--seconds", "0.1", "--new-pages"], [(3, 2, 4, 5, 5)])
