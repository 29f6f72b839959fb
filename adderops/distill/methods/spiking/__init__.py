"""The methods that train spiking networks, one class each, and what they share."""

from adderops.distill.methods.spiking.desire import DesireTask
from adderops.distill.methods.spiking.dsr import DSRTask
from adderops.distill.methods.spiking.joint import JointTask
from adderops.distill.methods.spiking.proxy import ProxyTask
from adderops.distill.methods.spiking.snn2ann import SNN2ANNTask
from adderops.distill.methods.spiking.surrogate import SurrogateTask
from adderops.distill.methods.spiking.task import Spiking, SpikingTask

__all__ = [
    "DSRTask",
    "DesireTask",
    "JointTask",
    "ProxyTask",
    "SNN2ANNTask",
    "Spiking",
    "SpikingTask",
    "SurrogateTask",
]
