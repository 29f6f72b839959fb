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
    "compare": Command("compare", "print a table, statistics over seeds, and curves of several runs, finished or not"),
    "export": Command("export", "write a network of a finished run as a state_dict, torch.export program or ONNX file"),
    "quantize": Command("quantize", "convert the student of a finished run to an int8 network, test it and time it"),
    "report": Command("report", "write report.html with its figures: curves, distillation, weights, operations"),
}
