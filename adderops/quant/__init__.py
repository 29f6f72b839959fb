"""Integer inference: from a trained adder network to an int8 network.

    model = calibrate(model, batches)        fake-quantized: grids that fit the inputs of each adder layer, still floats
    reestimate_batchnorm(model, batches)     optional, as is fine-tuning
    integer = convert(model, example)        adder layer, BatchNorm, residual sum and ReLU in one adder_conv2d_int8 call
    save(integer, example, path)             load(path) needs the operators only

One x86 instruction sums eight |a - b| of bytes; an 8-bit network is as accurate as the float network.
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
