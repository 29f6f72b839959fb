"""benchmarks/bench_edge.py runs end to end; its CSV file and its figures are those of its rows."""

import math

import bench_edge
import pytest
from harness import cortex_m, edge_programs, report
from harness.edge_layers import EdgeLayer

TINY = (EdgeLayer(8, 8, 8, 8, 3), EdgeLayer(16, 8, 4, 4, 1), EdgeLayer(8, 8, 6, 6, 3, depthwise=True))


@pytest.fixture(autouse=True)
def tools():
    for package in ("unicorn", "capstone"):
        pytest.importorskip(package, reason=f"needs {package}: {cortex_m.TOOLS}")
    try:
        return cortex_m.toolchain()
    except cortex_m.Unavailable as reason:
        pytest.skip(str(reason))


def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_edge, "A64_LAYER", EdgeLayer(16, 8, 4, 4, 3))
    file = tmp_path / "r.csv"
    result = bench_edge.main(["--csv", str(file)], TINY, ())
    about, rows = report.read_csv(file)
    assert rows == result["rows"] and {"compiler", "unicorn", "date"} <= set(about)
    assert {row["contestant"] for row in rows if row["layer"] == TINY[0].name} >= {
        *bench_edge.ADDERS,
        *bench_edge.PEERS,
    }
    for row in rows:
        assert math.isclose(row["instructions_per_term"], row["instructions"] / row["terms"])
        assert row["core"] == "aarch64" or row["cycles"] >= row["instructions"]
    cycles = {(row["layer"], row["contestant"]): row.get("cycles") for row in rows}
    for layer in TINY[:2]:
        assert (
            cycles[layer.name, bench_edge.ADDER]
            < cycles[layer.name, bench_edge.ACLE]
            < cycles[layer.name, bench_edge.C]
        )
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*bench_edge.TARGETS, *(layer.name for layer in TINY)))

    again = bench_edge.main(["--read", str(file)])
    assert again["figures"] == result["figures"] and again["rows"] == rows


def test_a_wrong_result_is_never_counted(monkeypatch):
    real = edge_programs.trace
    monkeypatch.setattr(edge_programs, "trace", lambda *args: {name: y + 1 for name, y in real(*args).items()})
    with pytest.raises(edge_programs.WrongResult, match="8-8.3x3@8, assembly, float32: wrong result"):
        bench_edge.main([], TINY, ())
