"""report.html: what a run did, in one file that needs no other."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adderops.atomic import write_atomically
from adderops.distill.figures import (
    draw_accuracy,
    draw_layers,
    draw_losses,
    draw_weights,
    fit_gaussian,
    fit_laplace,
    layer_weights,
    png,
)
from adderops.distill.run_folder import RunFolder
from adderops.models import classifier, create_model
from adderops.operations import count_operations, energy

STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; } img { max-width: 100%; } pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; }
table { border-collapse: collapse; } th, td { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }"""

LAYERS = (
    "By layer, in the last step of each epoch. A variance of y_c that falls to 0 tells that features became constant, "
    "a ratio of gradients far above 1 that the match drowns the other losses."
)
WEIGHTS = (
    "Weights in units of their layer's standard deviation: layers of different scale, put together as they are, would "
    "look like a Laplace density though each were Gaussian. AdderNet's paper (arXiv 1912.13200) finds the weights of "
    "adder layers Laplacian and those of CNNs Gaussian."
)
FITS = "Log-likelihood of the maximum likelihood fits, in nats a weight, of each layer's weights as they are."

OPERATIONS_TITLE = "Operations of an image"
OPERATIONS = (
    "Of convolutions, adder layers and classifier; a term |x - w| is two additions. Energy of the arithmetic alone, "
    "without memory, in 45 nm circuits: M. Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9. int8: if "
    "the network were computed in it."
)


def write_report(run: RunFolder, folder: Path) -> Path:
    """Writes report.html, which holds its figures, and the figures as PNG files beside it; returns its path.

    Parts for which a run has no data are left out: the match of layers where there is no distillation, weights and
    operations where the run is not finished.

    Raises:
        ValueError, FileNotFoundError: the weights of a finished run are damaged or missing.
    """
    networks = {name: run.network(name) for name in ("teacher", "student") if run.finished and name in run.networks}
    figures = {"accuracy": png(draw_accuracy(run)), "losses": png(draw_losses(run))}
    if run.layers:
        figures["layers"] = png(draw_layers(run))
    if networks:
        figures["weights"] = png(draw_weights(networks))
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in figures.items():
        write_atomically(folder / f"{name}.png", content)
    write_atomically(folder / "report.html", _page(run, figures, networks).encode())
    return folder / "report.html"


def _page(run: RunFolder, figures: Mapping[str, bytes], networks: Mapping[str, nn.Module]) -> str:
    title, kind = escape(run.title), run.tested_on
    parts = [
        _results(run),
        _figure("Accuracy", figures["accuracy"], f"Of the {kind} images, and of the training images as augmented."),
        _figure("Losses", figures["losses"], f"Means over the {kind} images, and over an epoch's training images."),
    ]
    if "layers" in figures:
        parts.append(_figure("Match of the layers", figures["layers"], LAYERS))
    if "weights" in figures:
        parts += [_figure("Weights", figures["weights"], WEIGHTS), _fits(networks)]
        parts.append(_operations(run, next(iter(networks.values()))))
    body = "\n".join([*parts, _configuration(run)])
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>\n{STYLE}\n</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _section(title: str, content: str, caption: str = "") -> str:
    return f"<h2>{escape(title)}</h2>\n{content}" + (f"\n<p>{escape(caption)}</p>" if caption else "")


def _figure(title: str, content: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return _section(title, f'<img alt="{escape(title)}" src="{source}">', caption)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(tag: str, cells: Sequence[Any]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return "\n".join(["<table>", line("th", header), *(line("td", row) for row in rows), "</table>"])


def _results(run: RunFolder) -> str:
    header = ["network", f"{run.tested_on} accuracy", "best", "in epoch", "training accuracy", "images/s", "hours"]
    rows = [
        (
            row["network"],
            _percent(row["test_accuracy"]),
            _percent(row["best_test_accuracy"]),
            row["best_epoch"],
            _percent(row["train_accuracy"]),
            f"{row['images_per_second']:.0f}",
            f"{row['hours']:.3g}",
        )
        for row in run.results()
    ]
    return _section("Result", _table(header, rows), f"After epoch {len(run.rows)} of {run.config.epochs}.")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _fits(networks: Mapping[str, nn.Module]) -> str:
    rows = []
    for network, module in networks.items():
        for kind, layers in layer_weights(module).items():
            for name, weights in layers.items():
                gaussian, laplace = fit_gaussian(weights), fit_laplace(weights)
                better = "Gaussian" if gaussian.log_likelihood > laplace.log_likelihood else "Laplace"
                numbers = (gaussian.scale, gaussian.log_likelihood, laplace.scale, laplace.log_likelihood)
                rows.append((f"{network} {name}", kind, len(weights), *(f"{x:.4g}" for x in numbers), better))
    header = ["layer", "kind", "weights", "sigma", "Gaussian, nats", "b", "Laplace, nats", "more likely"]
    return _section("Fits to the weights", _table(header, rows), FITS)


def _operations(run: RunFolder, network: nn.Module) -> str:
    """The CNN against the adder network, whichever of them the run has trained."""
    try:
        shape = run.input_shape(network)
    except FileNotFoundError as error:
        return _section(OPERATIONS_TITLE, "", f"Not counted, because the size of the images is not known: {error}")
    rows = []
    for kind, label in (("cnn", "CNN"), ("adder", "adder network")):
        with torch.device("meta"):
            model = create_model(run.config.arch, kind, shape[0], len(classifier(network)[1].weight))
        counted = count_operations(model, (1, *shape))
        numbers = (counted.multiplications, counted.additions, energy(counted), energy(counted, "int8"))
        rows.append((label, *(f"{number:,.0f}" for number in numbers)))
    header = ["network", "multiplications", "additions", "energy in float32, pJ", "energy in int8, pJ"]
    return _section(OPERATIONS_TITLE, _table(header, rows), OPERATIONS)


def _configuration(run: RunFolder) -> str:
    rows = [(name, "-" if value is None else value) for name, value in run.config.flat().items()]
    command = f"<pre>{escape(run.config.command())}</pre>"
    return _section("Command", command) + "\n" + _section("Configuration", _table(["option", "value"], rows))
