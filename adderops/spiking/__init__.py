"""Spiking networks: the other networks without multiplications between their layers, made of ordinary CNNs.

`spiking` turns a CNN into a spiking network with neurons of its own or of SpikingJelly; `integrate_and_fire` is the
operator behind `IntegrateAndFire`, the neurons. `calibrate` makes a trained CNN spiking without training, and `to_nir`
hands a network to tools for neuromorphic chips.
"""

from adderops.spiking.calibration import calibrate
from adderops.spiking.functional import integrate_and_fire
from adderops.spiking.network import Spikes, as_cnn, set_steps, sites, spiking
from adderops.spiking.neuron import IntegrateAndFire
from adderops.spiking.nir import to_nir

__all__ = [
    "IntegrateAndFire",
    "Spikes",
    "as_cnn",
    "calibrate",
    "integrate_and_fire",
    "set_steps",
    "sites",
    "spiking",
    "to_nir",
]
