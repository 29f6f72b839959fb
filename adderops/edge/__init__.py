"""From an integer network to plain C for microcontrollers and small processors.

    export_c(integer, example, folder)      NAME.h and NAME.c: packed weights, kernels in use, a straight list of calls

Each layer runs in a kernel of `c/`; `program_of` gives the program that the C code is written from, and `run` its
definition in Python.
"""

from adderops.edge.code_size import code_size
from adderops.edge.export import export_c, program_of
from adderops.edge.interpreter import bytes_of, run
from adderops.edge.program import Program
from adderops.edge.report import Report

__all__ = ["Program", "Report", "bytes_of", "code_size", "export_c", "program_of", "run"]
