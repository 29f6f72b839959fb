"""The methods, one class each: networks in training, and the losses of a batch.

`METHODS` lists the methods by name.  `register_method` adds a subclass of `Task` to them; it then works in
`adderops.distill.train` and on the whole command line.
"""

from adderops.distill.methods.distillation import Distillation
from adderops.distill.methods.matching import FeatureMatch
from adderops.distill.methods.pkkd import PKKDTask
from adderops.distill.methods.single import SingleTask
from adderops.distill.methods.spiking import (
    DesireTask,
    DSRTask,
    JointTask,
    ProxyTask,
    SNN2ANNTask,
    Spiking,
    SpikingTask,
    SurrogateTask,
)
from adderops.distill.methods.task import METHODS, LabelLoss, Losses, Task, register_method

__all__ = [
    "METHODS",
    "DSRTask",
    "DesireTask",
    "Distillation",
    "FeatureMatch",
    "JointTask",
    "LabelLoss",
    "Losses",
    "PKKDTask",
    "ProxyTask",
    "SNN2ANNTask",
    "SingleTask",
    "Spiking",
    "SpikingTask",
    "SurrogateTask",
    "Task",
    "register_method",
]
