"""Integer inference: from a trained adder network to one that computes in bytes.

    model = calibrate(model, batches)        grids that fit the inputs of each adder layer; still floats
    reestimate_batchnorm(model, batches)     optional; or train it further
    integer = convert(model, example)        one call of adder_conv2d_int8 for adder layer, BatchNorm, sum and ReLU
    save(integer, example, path)             load(path) needs none of this but the operators

On a CPU one instruction sums eight |a - b| of bytes; a network of 8 bits has the accuracy of its floats.
"""

from adderops.batchnorm import reestimate_batchnorm
from adderops.quant.calibration import calibrate, insert, observe
from adderops.quant.fuse import convert
from adderops.quant.grid import Grid
from adderops.quant.network import IntegerNetwork
from adderops.quant.scheme import Scheme
from adderops.quant.serialization import load, save

__all__ = [
    "Grid",
    "IntegerNetwork",
    "Scheme",
    "calibrate",
    "convert",
    "insert",
    "load",
    "observe",
    "reestimate_batchnorm",
    "save",
]
