"""DeepSpeed ZeRO-3: weights that lie in pieces except around the forward of their own module.

DeepSpeed puts a module's weights together in hooks around its call, and again before its backward.
So the work on the LM head is done as the head module's own call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch import distributed as dist


def is_cut(weight: Any) -> bool:
    """Whether ZeRO-3 keeps a weight in pieces; outside of forwards it may be empty."""
    return hasattr(weight, "ds_id")


def holds_cut(module: nn.Module) -> bool:
    """Whether ZeRO-3 keeps weights of a module in pieces."""
    return any(map(is_cut, module.parameters()))


def whole_size(weight: Any) -> int:
    """Elements of a weight, in pieces or not."""
    return int(weight.ds_numel) if is_cut(weight) else int(weight.numel())


def rows_of(weight: Any) -> int:
    """Length of the first dimension of a weight, in pieces or not."""
    return int(weight.ds_shape[0] if is_cut(weight) else weight.shape[0])


def own_piece(weight: Any) -> Tensor:
    """The values of a weight that this process keeps, ``[n]``; of whole weights, all of them."""
    if not is_cut(weight):
        return weight
    piece = weight.ds_tensor.detach().reshape(-1)
    # The last pieces are filled up to the same length, with anything.
    before = dist.get_rank(weight.ds_process_group) * int(weight.ds_tensor.ds_numel)
    return piece[: max(int(weight.ds_numel) - before, 0)]


@contextlib.contextmanager
def gathered(weights: Iterable[Any]) -> Iterator[None]:
    """Weights are whole here, to be read, where they are not already; a collective."""
    missing = [weight for weight in weights if is_cut(weight) and not weight.numel()]
    if not missing:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(missing):
        yield


def call_as(module: nn.Module, function: Callable[[Tensor], Any], hidden_states: Tensor) -> Any:
    """``function(hidden_states)`` as the call of a module, which DeepSpeed's hooks surround.

    Everything in the module is whole while ``function`` runs and in its backward, and a gradient
    that it gives weights is reduced as that of the module's own forward.
    """
    import deepspeed

    for weight in module.parameters():
        # Hooks put together what belongs to the module itself; adapters are modules inside it.
        deepspeed.zero.register_external_parameter(module, weight)
    own = vars(module).get("forward")
    object.__setattr__(module, "forward", function)
    try:
        return module(hidden_states)
    finally:
        if own is None:
            del module.forward
        else:
            object.__setattr__(module, "forward", own)


def let_go(module: nn.Module) -> None:
    """Free the pieces of a module that nobody uses any more; DeepSpeed keeps the module itself."""
    weights: Iterable[Any] = module.parameters()
    for weight in weights:
        if is_cut(weight):
            weight.data = weight.new_empty(0)
            weight.ds_tensor.data = weight.ds_tensor.new_empty(0)


def load_whole(args: Any) -> None:
    """Have ``from_pretrained`` load whole weights, which are checked and copied before training.

    With ZeRO-3, transformers would cut them as it loads them.

    Args:
        args: ``TrainingArguments``.
    """
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        return
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def check_whole(model: nn.Module, name: str) -> None:
    """Raise ``ValueError`` for a model that was cut as it was loaded."""
    if holds_cut(model):
        raise ValueError(
            f"{name}: expected whole weights, got a model that DeepSpeed has cut already; give its "
            "path, or load it after the settings (PreferenceConfig or the like) are made"
        )
