"""`report RUN`: writes report.html, which shows what a run did in one file that needs no other."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import nn

from adderops.atomic import write_atomically
from adderops.distill.options import option
from adderops.distill.runs import microcontroller
from adderops.distill.runs.command import CommandOptions, run_folder
from adderops.distill.runs.costs import COUNTED
from adderops.distill.runs.folder import RunFolder
from adderops.distill.runs.tables import KINDS, html_table, outcome, shown
from adderops.distill.runs.weights import fit_gaussian, fit_laplace, layer_weights
from adderops.models import create_model
from adderops.operations import LayerOperations, count_operations, count_spiking_operations, energy

STYLE = """\
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #222; }
h2 { margin-top: 2em; } img { max-width: 100%; } pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; }
table { border-collapse: collapse; } th, td { padding: .15em .8em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }"""

SPEED = (
    "Time is the sum of the learning rates. The speed limit is the least time in which the weights get as far from "
    "where they began with the same action, the sum of |step|^2 / learning rate: on a straight line at constant speed. "
    "Time over it is curvature, (length of the path / straight distance)^2, times unevenness of speed; both are at "
    "least 1. Noise shows as curvature: n equal steps in random directions have about n. Source: Speed Limits for Deep "
    "Learning, arXiv 2307.14653."
)
LAYERS = (
    "Per layer, in the last step of each epoch. If the variance of y_c falls to 0, the features have become constant; "
    "if the ratio of gradients is far above 1, the match drowns out the other losses."
)
WEIGHTS = (
    "Weights in units of their layer's standard deviation: pooled without that, layers of different scale would look "
    "like a Laplace density even if each were Gaussian. AdderNet's paper (arXiv 1912.13200) finds the weights of "
    "adder layers Laplacian and those of CNNs Gaussian."
)
FITS = "Maximum likelihood fits to each layer's weights; log-likelihoods in nats per weight."

OPERATIONS_TITLE = "Operations per image"
OPERATIONS = (
    "Convolutions, adder layers and classifier; a term |x - w| counts as two additions. Energy of the arithmetic, "
    "without memory, in 45 nm circuits: M. Horowitz, Computing's energy problem, ISSCC 2014, figure 1.1.9. int8: as if "
    "the network were computed in it."
)

SPIKES_TITLE = "Spikes per layer"
SPIKES = (
    "Means over {} {} images. A spike adds one weight to each output that it reaches; neurons add to their membrane in "
    "each time step, and once more for each spike."
)


@dataclass(frozen=True)
class Options(CommandOptions):
    folder: Path = run_folder("run folder, finished or not")
    output: Path | None = option(None, "folder to write to (default: RUN/report)", type=Path, metavar="FOLDER")


def run(options: Options) -> None:
    run = RunFolder.load(options.folder)
    print(write_report(run, options.output or run.path / "report"))


def write_report(run: RunFolder, folder: Path) -> Path:
    """Writes report.html, which holds its figures, and the figures as PNG files next to it; returns its path.

    Parts without data are left out: the speed limit of a run of an older version, the match of layers if none were
    matched, weights and operations if the run is not finished.

    Raises:
        ValueError, FileNotFoundError: the weights of a finished run are damaged or missing.
    """
    from adderops.distill.runs.figures import (
        draw_accuracy,
        draw_layers,
        draw_losses,
        draw_speed,
        draw_weights,
        has_speed,
        png,
    )

    networks = {role: run.network(role) for role in run.task.roles if run.finished and role in run.networks}
    figures = {"accuracy": png(draw_accuracy(run)), "losses": png(draw_losses(run))}
    if has_speed(run):
        figures["speed"] = png(draw_speed(run))
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
        _figure("Accuracy", figures["accuracy"], f"On the {kind} images, and on the training images as augmented."),
        _figure("Losses", figures["losses"], f"Means over the {kind} images, and over the training images per epoch."),
    ]
    if "speed" in figures:
        parts.append(_figure("Speed limit", figures["speed"], SPEED))
    if "layers" in figures:
        parts.append(_figure("Match of the layers", figures["layers"], LAYERS))
    if "weights" in figures:
        parts += [_figure("Weights", figures["weights"], WEIGHTS), _fits(networks)]
        parts += [_operations(run), *_spikes(run, networks), _microcontroller(run)]
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


def _results(run: RunFolder) -> str:
    rows = [{"network": row["network"], **outcome(row)} for row in run.results()]
    caption = f"After epoch {len(run.rows)} of {run.config.epochs}. Accuracies in percent, on {run.tested_on} images."
    return _section("Result", html_table(rows), caption)


def _fits(networks: Mapping[str, nn.Module]) -> str:
    rows = []
    for network, module in networks.items():
        for kind, layers in layer_weights(module).items():
            for name, weights in layers.items():
                gaussian, laplace = fit_gaussian(weights), fit_laplace(weights)
                better = "Gaussian" if gaussian.log_likelihood > laplace.log_likelihood else "Laplace"
                numbers = {
                    "sigma": gaussian.scale,
                    "Gaussian, nats": gaussian.log_likelihood,
                    "b": laplace.scale,
                    "Laplace, nats": laplace.log_likelihood,
                }
                cells = {"layer": f"{network} {name}", "kind": kind, "weights": str(len(weights))}
                cells |= {title: f"{number:.4g}" for title, number in numbers.items()}
                rows.append(cells | {"more likely": better})
    return _section("Fits to the weights", html_table(rows), FITS)


def _operations(run: RunFolder) -> str:
    """The CNN against the adder network, whichever of them the run has trained."""
    try:
        shape, classes = run.input_shape(), run.num_classes()
    except FileNotFoundError as error:  # a run of an older version on images that are gone
        return _section(OPERATIONS_TITLE, "", f"Not counted, because the size of the images is not known: {error}")
    rows = []
    for kind, label in KINDS.items():
        try:
            with torch.device("meta"):
                model = create_model(run.config.arch, kind, shape[0], classes)
        except ValueError:  # an architecture without adder layers
            continue
        counted = count_operations(model, (1, *shape))
        numbers = {
            "multiplications": counted.multiplications,
            "additions": counted.additions,
            "energy in float32, pJ": energy(counted),
            "energy in int8, pJ": energy(counted, "int8"),
        }
        rows.append({"network": label, **{title: f"{number:,.0f}" for title, number in numbers.items()}})
    return _section(OPERATIONS_TITLE, html_table(rows), OPERATIONS)


def _spikes(run: RunFolder, networks: Mapping[str, nn.Module]) -> list[str]:
    """A section for each spiking network: the rates of its neurons, and the operations of its layers."""
    spiking = [name for name in networks if run.kind(name) == "spiking"]
    if not spiking:
        return []
    try:
        test = run.load_data().test
    except (FileNotFoundError, ValueError) as error:
        return [_section(SPIKES_TITLE, "", f"Not counted, because the images are missing: {error}")]
    sections = []
    for name in spiking:
        [(images, _)] = test.batches([torch.arange(min(COUNTED, len(test)))])
        counted = count_spiking_operations(networks[name], images)
        total = LayerOperations("total", "", counted.multiplications, counted.additions)
        rows = [
            {
                "layer": f"{name} {row.name}",
                "type": row.layer,
                "spikes per neuron and step": shown(counted.rates.get(row.name)),
                "multiplications": f"{row.multiplications:,}",
                "additions": f"{row.additions:,}",
            }
            for row in (*counted.layers, total)
        ]
        sections.append(_section(SPIKES_TITLE, html_table(rows), SPIKES.format(len(images), run.tested_on)))
    return sections


def _microcontroller(run: RunFolder) -> str:
    """Both kinds in int8 on a small processor; a line with the reason if the architecture does not become C."""
    title = "On a microcontroller"
    try:
        rows = microcontroller.rows_of(run.config.arch, run.input_shape(), run.num_classes())
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return _section(title, "", f"No numbers for {run.config.arch}: {reason}")
    return _section(title, html_table(rows), microcontroller.CAPTION)


def _configuration(run: RunFolder) -> str:
    rows = [{"option": name, "value": shown(value)} for name, value in run.config.flat().items()]
    command = f"<pre>{escape(run.config.command())}</pre>"
    return _section("Command", command) + "\n" + _section("Configuration", html_table(rows))
