"""experiments/edge_accuracy.py: each run once, its rows are those of its networks, the tables those of the rows."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from distill.runs import write_bars

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
FLOATS, INTEGERS = "float_accuracy", "int8_accuracy"


@pytest.fixture
def edge(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import edge_accuracy

    return edge_accuracy


@pytest.fixture
def tables(edge):
    import edge_tables

    return edge_tables


@pytest.fixture
def small(edge, monkeypatch, tmp_path):
    """The command of the same form on images of bars, seconds long."""
    (tmp_path / "bars").mkdir()
    write_bars(tmp_path / "bars")
    monkeypatch.setattr(edge, "COMMON", f"--data {tmp_path / 'bars'} --augment none --batch-size 32 --lr 0.05")
    monkeypatch.setattr(edge, "QUEUE", [("ds_cnn_x0_5", method) for method in ("distilled", "labels")])
    return tmp_path


def rows_in(folder: Path) -> list[dict[str, str]]:
    with open(folder / "edge_accuracy.csv", newline="") as file:
        return list(csv.DictReader(file))


def row(network: str, kind: str, seed: int, floats: float, integers: float) -> dict[str, str]:
    return {
        **{"dataset": "bars", "network": network, "kind": kind, "seed": str(seed), "epochs": "1"},
        **{FLOATS: str(floats), INTEGERS: str(integers), "seconds": "1", "command": "?"},
    }


@pytest.mark.slow
def test_runs_and_rows(edge, small):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    command = [
        "run",
        "--epochs",
        "1",
        "--runs",
        str(small / "runs"),
        "--results",
        str(small / "results"),
        "--seeds",
        "0",
    ]
    edge.main(command)
    rows = rows_in(small / "results")
    assert list(rows[0]) == edge.COLUMNS and [r["kind"] for r in rows] == list(edge.KINDS)
    assert "--features none" in rows[1]["command"] and "--method plain" in rows[2]["command"]
    assert all(f"{edge.RUNS}/" not in r["command"] and str(small / "runs") not in r["command"] for r in rows)
    # the accuracy of the run itself, and int8 networks that are nearly as good
    for kind, (method, role) in edge.KINDS.items():
        run = edge.RunFolder.load(small / "runs" / f"ds_cnn_x0_5-{method}-1-0")
        [mine] = [r for r in rows if r["kind"] == kind]
        assert float(mine[FLOATS]) == pytest.approx(run.curve(f"{role}_test_accuracy")[-1])
        assert abs(float(mine[FLOATS]) - float(mine[INTEGERS])) <= 0.2

    # rows are computed again from the networks of the run, without a second training
    logs = {path: path.read_bytes() for path in (small / "runs").glob("*/log.csv")}
    (small / "results" / "edge_accuracy.csv").unlink()
    edge.main(command)
    assert rows_in(small / "results") == rows
    assert {path: path.read_bytes() for path in (small / "runs").glob("*/log.csv")} == logs

    # a run with rows is not looked at
    shutil.rmtree(small / "runs")
    edge.main(command)
    assert rows_in(small / "results") == rows and not list((small / "runs").glob("*/log.csv"))


@pytest.mark.slow
def test_onnxruntime_rounds(edge):
    """Logits closer than a step of their grid become equal, and the first of them is the class."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from adderops.distill.data import load_data
    from adderops.models import create_model

    data = load_data("digits")
    cnn = create_model("ds_cnn_x0_5", "cnn", 1, 10).eval()
    batches = [next(iter(data.test.batches([torch.arange(64)])))[0]]
    [(images, labels)] = data.test.batches([torch.arange(len(data.test))])
    with torch.no_grad():
        cnn.fc.weight.mul_(1e-6)
        cnn.fc.bias.copy_(torch.tensor([0.0] * 8 + [100.0, 100.1]))
        assert (cnn(images).argmax(1) == 9).all()
    assert edge.accuracy(cnn, data.test) == pytest.approx((labels == 9).float().mean().item())
    assert edge.onnxruntime_accuracy(cnn, batches, data.test) == pytest.approx((labels == 8).float().mean().item())


def test_table_of_accuracies(tables):
    rows = [row("ds_cnn", "cnn", seed, 0.9, value) for seed, value in enumerate((0.88, 0.89, 0.90))]
    rows.append(row("ds_cnn_x0_5", "adder, labels", 0, 0.8, 0.79))
    *_, narrow, wide = tables.accuracy_table(rows).splitlines()
    # deviation 1, t(.975, 2) = 4.3027, 4.3027 / sqrt(3) = 2.484
    assert wide == "| ds_cnn, cnn | 3 | 90.00 ± 0.00 | 89.00 ± 2.48 | -1.00 (-3.48 to +1.48) |"
    assert narrow == "| ds_cnn_x0_5, adder, labels | 1 | 80.00 | 79.00 | -1.00 |"


def test_table_of_contrasts_pairs_seeds(tables):
    accuracies = {"cnn": (0.9, 0.8, 0.85), "adder, distilled": (0.92, 0.82, 0.87), "adder, labels": (0.8,)}
    rows = [row("resnet8", kind, i, 0, value) for kind, values in accuracies.items() for i, value in enumerate(values)]
    *_, line = tables.contrast_table(rows).splitlines()
    assert line == "| resnet8 | +2.00 (+2.00 to +2.00) | -10.00 | +12.00 |"


def cost(network: str, kind: str, engine: str, cycles: float) -> dict[str, str]:
    sizes = {"parameters": "1000", "flash": "2048", "arena": "512"}
    return {"network": network, "kind": kind, "engine": engine, **sizes, "cycles": str(cycles)}


WIDTHS = ("resnet8_x0_5", "resnet8", "resnet8_x2_0")


@pytest.fixture
def compared():
    """Adder networks at a third of the CNN's cycles that need sqrt(2) times the width for its accuracy."""
    rows, costs = [], []
    for i, network in enumerate(WIDTHS):
        rows += [row(network, "cnn", 0, 0, 0.85 + 0.02 * i), row(network, "adder, distilled", 0, 0, 0.84 + 0.02 * i)]
        costs += [cost(network, "cnn", "CMSIS-NN", 3e6 * 4**i), cost(network, "adder", "adderops", 1e6 * 4**i)]
    return rows, costs


def test_what_is_left_at_the_same_accuracy(tables, compared):
    found = tables.points(*compared)
    text = tables.equal_accuracy_table(found, "adder, distilled").splitlines()[2:]
    assert text[1] == "| resnet8 | CMSIS-NN | -1.00 | 3.00 | 1.41 | 1.50 |"  # sqrt(2) wider, twice the cycles
    assert text[2] == "| resnet8_x2_0 | CMSIS-NN | -1.00 | 3.00 | > 1.00 |  |"  # no measured width reaches it
    better = [point for point in found if point.kind == "cnn" or point.width == 2]
    text = tables.equal_accuracy_table(better, "adder, distilled").splitlines()[2:]
    assert text[0] == "| resnet8_x0_5 | CMSIS-NN |  |  | <= 4.00 | >= 0.19 |"  # the narrowest reaches it already


def test_the_answer_in_words(tables, compared):
    narrow, middle, wide = tables.answer(*compared, "adder, distilled")
    assert middle == (
        "- Accuracy of resnet8 as a CNN, by the adder network (adder, distilled): it needs 1.41 times the width, which "
        "leaves 1.50 (CMSIS-NN) times the CNN's speed (same width: 3.00 (CMSIS-NN) times the CNN's speed)."
    )
    assert (
        "no measured width reaches it; resnet8_x2_0, the best, is 1.00 points behind at 3.00 (" in wide
        and "same width" not in wide
    )
    assert "it needs 1.41 times the width, which" in narrow
    # a second seed, whose CNN of width 1 is half a point worse: half of that way
    rows, costs = compared
    second = [r | {"seed": "1", INTEGERS: str(float(r[INTEGERS]) - 0.005 * (r["kind"] == "cnn"))} for r in rows]
    _, middle, _ = tables.answer(rows + second, costs, "adder, distilled")
    assert "it needs 1.30 times the width (by seed: 1.19, 1.41), which leaves 1.78 (CMSIS-NN)" in middle


def test_front_and_costs(tables, compared):
    rows, costs = compared
    found = tables.points(rows, costs)
    # cycles 1, 3, 4, 12, 16, 48 M; accuracy 84, 85, 86, 87, 88, 89
    assert len(tables.front(found)) == 6
    worse = [*found, tables.Point("resnet8", "cnn", "", 5e6, 0.86), tables.Point("resnet8", "cnn", "", 4e6, 0.85)]
    assert tables.front(worse) == tables.front(found)
    line = tables.cost_table(rows, costs).splitlines()[-1]
    assert line == "| resnet8_x2_0, adder | adderops | 1,000 | 2.0 | 0.5 | 16.00 | 133.3 | 88.00 |"
    assert "resnet8_x0_5 (adder, distilled), resnet8_x0_5 (cnn), resnet8 (adder" in tables.front_line(found)


def test_tables_are_written(edge, compared, tmp_path, capsys):
    rows, costs = compared
    edge.add_rows(rows, tmp_path / "edge_accuracy.csv")
    with open(tmp_path / "edge_costs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, costs[0])
        writer.writeheader()
        writer.writerows(costs)
    edge.main(["tables", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "edge_accuracy.md").read_text().strip()
    assert "**bars, 1 epoch**" in printed and "On the front, with CMSIS-NN" in printed
    assert (tmp_path / "edge_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_rows_are_added_once(edge, tmp_path):
    path = tmp_path / "new" / "edge_accuracy.csv"
    edge.add_rows([row("ds_cnn", "cnn", 0, 0.9, 0.8)], path)
    edge.add_rows([row("ds_cnn", "cnn", 0, 0.1, 0.1), row("ds_cnn", "cnn", 1, 0.7, 0.6)], path)
    assert [(r["seed"], r[FLOATS]) for r in edge.read_rows(path)] == [("0", "0.9"), ("1", "0.7")]


def test_an_unknown_network_is_refused(edge, small, capsys):
    with pytest.raises(SystemExit):
        edge.main(["run", "alexnet"])
    assert "NETWORK: expected some of resnet8, " in capsys.readouterr().err


def test_every_run_is_one_that_the_trainer_takes(edge, tables):
    from adderops.distill.command_line import training_parser

    for network, method in edge.QUEUE:
        training_parser().parse_args(f"{edge.COMMON} --arch {network} {edge.METHODS[method]}".split())
    assert tuple(edge.KINDS) == tables.KINDS
    assert {(n, m) for n in edge.NETWORKS for m in edge.METHODS} == set(edge.QUEUE)


def test_networks_are_sorted_by_width(tables):
    networks = [row(network, "cnn", 0, 0, 0) for network in ("resnet8_x2_0", "resnet8", "ds_cnn", "resnet8_x0_5")]
    assert tables.networks_of(networks) == ["ds_cnn", "resnet8_x0_5", "resnet8", "resnet8_x2_0"]
