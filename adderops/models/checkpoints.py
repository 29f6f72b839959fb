"""Weights from files: what training tools put around a state_dict, and whose weights they are."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adderops.optim import AdaptiveRateLayer

_HOLDERS = ("state_dict", "model_state_dict", "model")  # keys of a checkpoint under which trainers keep the weights
# path components that wrappers put into names, at any depth: torch.compile, FSDP, activation checkpointing
_OF_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTERMOST = ("module", "model", "net")  # attributes of DistributedDataParallel and of Lightning modules


def unwrap_state_dict(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns the state_dict within a checkpoint, under the names of a model that no tool has wrapped.

    Takes the weights out of `{"state_dict": ...}`, `{"model_state_dict": ...}` and `{"model": ...}`, and off their
    names `_orig_mod.` (torch.compile) and its like wherever it stands, and `module.` (DistributedDataParallel),
    `model.` or `net.` (Lightning) where every name starts with it and none of the model's does; in any order.

    Args:
        content: of a file; it is not changed.
        model: that the weights are meant for.

    Raises:
        ValueError: there are no weights in it.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> list(unwrap_state_dict({"model": {"module._orig_mod.weight": layer.weight}}, layer))
    ['weight']
    """
    state = find_state_dict(content)
    named = {".".join(part for part in key.split(".") if part not in _OF_WRAPPERS): v for key, v in state.items()}
    own = model.state_dict().keys()
    while True:
        first = {name.partition(".")[0] for name in named if name != "n_averaged"}  # a counter of AveragedModel
        prefix = first.pop() if len(first) == 1 else None
        if prefix not in _OUTERMOST or own & named.keys():
            return named
        named = {name.partition(".")[2]: value for name, value in named.items() if name != "n_averaged"}


def find_state_dict(content: Any) -> Mapping[str, Tensor]:
    """Returns the state_dict that a checkpoint is or holds, names as they are.

    Raises:
        ValueError: there is none.
    """
    while not (
        isinstance(content, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    ):
        held = [
            content[key] for key in _HOLDERS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ]
        if not held:
            raise ValueError("state_dict: expected names and tensors, or a checkpoint that holds them, got neither")
        content = held[0]
    return content


def mark_adder_weights(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns a state_dict in which the weights of a model's adder layers are marked as such.

    An adder layer refuses weights without the mark, because those of an ordinary layer have the same shape.  This is
    for adder weights that were saved before there were marks.

    Args:
        state_dict: with the names of the model; it is not changed.
        model: an adder network.

    >>> from adderops import AdderLinear
    >>> old = {"weight": AdderLinear(2, 1).weight.detach()}
    >>> AdderLinear(2, 1).load_state_dict(mark_adder_weights(old, AdderLinear(2, 1)))
    <All keys matched successfully>
    """
    marks = {
        f"{name}._extra_state" if name else "_extra_state": layer.get_extra_state()
        for name, layer in model.named_modules()
        if isinstance(layer, AdaptiveRateLayer)
    }
    return {**marks, **state_dict}


def load_reference_checkpoint(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads a checkpoint strictly into `model`: one of the AdderNet reference code, or of any trainer.

    `unwrap_state_dict` finds the weights in it; the adder layers take the key `adder` for their `weight` by themselves.

    Args:
        model: a network of the same architecture, `resnet20()` for example.
        state_dict: as the reference code publishes it, or a checkpoint that holds one; it is not changed.

    Raises:
        RuntimeError: missing, unexpected or misshapen entries; weights of ordinary layers for adder layers, or the
            other way round.
        ValueError: there are no weights in it.

    >>> from adderops.models import resnet20
    >>> student, published = resnet20(), resnet20().state_dict()
    >>> published = {f"module.{k}": v for k, v in published.items()}
    >>> load_reference_checkpoint(student, published)
    """
    state = unwrap_state_dict(state_dict, model)
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        marked = f"{prefix}_extra_state" in state or f"{prefix}adder" in state
        if f"{prefix}weight" in state and not marked and isinstance(module, AdaptiveRateLayer):
            raise RuntimeError(
                f"{prefix}weight: expected the weight of an {type(module).__name__}, got one without the mark of adder "
                "weights (from before there were marks: adderops.models.mark_adder_weights)"
            )
        if marked and isinstance(module, (nn.Conv2d, nn.Linear)):
            raise RuntimeError(
                f"{prefix}weight: expected the weight of a {type(module).__name__}, got one of an adder layer"
            )
    model.load_state_dict(state)
