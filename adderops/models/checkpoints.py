"""Weights from checkpoints: finds the state_dict that training tools wrap, and checks whose weights it holds."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from adderops.optim import AdaptiveRateLayer

_HOLDERS = ("state_dict", "model_state_dict", "model")  # keys of a checkpoint under which trainers keep the weights
# components that wrappers insert into names, at any depth: torch.compile, FSDP, activation checkpointing
_OF_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_OUTERMOST = ("module", "model", "net")  # attributes of DistributedDataParallel and of Lightning modules


def unwrap_state_dict(content: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Returns the state_dict in a checkpoint, under the names of the unwrapped model.

    The checkpoint is the state_dict, or holds it as `state_dict`, `model_state_dict` or `model`. Prefixes of wrappers
    are removed from the names: `_orig_mod.` (torch.compile), FSDP's and activation checkpointing's at any depth;
    `module.` (DistributedDataParallel), `model.` and `net.` (Lightning) if all names start with it, but no name of the
    model does; in any order.

    Args:
        content: content of a checkpoint file; it is not changed.
        model: the model that the weights are for.

    Returns:
        The tensors by name.

    Raises:
        ValueError: the checkpoint holds no weights.

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
    """Returns the state_dict that a checkpoint is or holds, with unchanged names.

    Raises:
        ValueError: it is or holds none.

    >>> list(find_state_dict({"epoch": 3, "model": {"module.weight": nn.Linear(2, 1).weight}}))
    ['module.weight']
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
    """Returns a state_dict with the weights of a model's adder layers marked as adder weights.

    An adder layer refuses weights without the mark, because those of an ordinary layer have the same shape. Use this
    for adder weights that were saved before marks existed.

    Args:
        state_dict: weights under the names of the model; it is not changed.
        model: an adder network.

    Returns:
        The marks and the weights by name.

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
    """Loads a checkpoint of the AdderNet reference code, or of any trainer, strictly into a model.

    `unwrap_state_dict` finds the weights; adder layers accept the key `adder` for their `weight`.

    Args:
        model: a network of the same architecture, `resnet20()` for example.
        state_dict: as the reference code publishes it, or a checkpoint that holds one; it is not changed.

    Raises:
        RuntimeError: missing, unexpected or misshapen entries; weights of ordinary layers for adder layers, or vice
            versa.
        ValueError: the checkpoint holds no weights.

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
