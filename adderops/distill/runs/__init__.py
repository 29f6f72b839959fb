"""Commands on run folders: `python -m adderops.distill COMMAND RUN`.

Each command is one module: a dataclass `Options`, from which its command line follows, and a function `run(options)`.
A module is imported when its command is given.  To add a command, write such a module and name it in `COMMANDS`.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """An entry of `COMMANDS`: a module of this package, and one line of help."""

    module: str
    help: str


COMMANDS = {
    "eval": Command("evaluate", "test the saved networks of a finished run again"),
    "compare": Command("compare", "print results, costs and statistics of several runs, finished or not; draw curves"),
    "export": Command("export", "write a network of a finished run as a state_dict, torch.export program or ONNX file"),
    "quantize": Command("quantize", "convert a network of a finished run to int8, test it and time it"),
    "spike": Command("spike", "make the CNN of a finished run a spiking network, without training, and test it"),
    "report": Command("report", "write report.html with its figures: curves, distillation, weights, operations"),
}
