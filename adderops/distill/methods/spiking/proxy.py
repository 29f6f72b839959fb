"""Proxy learning (arXiv 2109.13208): a spiking network trained by the gradient of its CNN."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from adderops.distill.methods.spiking.task import Spiking, SpikingTask, cnn_logits
from adderops.distill.methods.task import Losses, register_method
from adderops.spiking import IntegrateAndFire


@register_method("proxy")
class ProxyTask(SpikingTask):
    r"""A spiking network trained by the gradient of the CNN with the same weights.

    Both run on the batch, the spiking network without a graph. The loss is that of its logits s; their gradient goes
    back through the CNN, whose logits are a:

    .. math:: y = s + a - stopgrad(a), \quad L = CE(y, labels)

    The spikes have the value of the threshold, so that their rate is close to the ReLU's output up to the threshold.
    BatchNorm has the same weights in both passes. While training, each pass is normalized by its own statistics of the
    batch; the running statistics are those of the spiking network, which is what gets tested.

    Source: Proxy learning, arXiv 2109.13208, and its code, where spikes have the value 1, neurons are reset to 0, the
    logits are counts of neurons, and the loss is their squared distance to the label as 0 and 1.

    >>> from adderops.distill import Options
    >>> config = Options(method="proxy", steps=4).resolve()
    >>> task = ProxyTask({"student": ProxyTask.network(config, "student", in_channels=1, num_classes=10)})
    >>> losses = task(torch.randn(8, 1, 32, 32), torch.arange(8))
    >>> losses.total.backward()
    >>> task.networks["student"].get_parameter("conv1.weight").grad.shape
    torch.Size([6, 1, 5, 5])
    """

    label = "spiking, by a proxy"

    @classmethod
    def neuron(cls, options: Spiking) -> Callable[[], nn.Module]:
        return partial(IntegrateAndFire, options.threshold, decay=options.decay, scaled=True)

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        network = self.networks["student"]
        proxy = cnn_logits(network, images)
        with torch.no_grad():
            spiking = network(images)
        logits = spiking + (proxy - proxy.detach())
        loss = self.label_loss(logits, labels)
        return Losses(loss, {"student_ce": loss}, {"student": logits})
