"""A finished model in one piece, also where checkpoints are in shards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.train.base import PairTrainer


@contextlib.contextmanager
def whole_weights(trainer: PairTrainer) -> Iterator[None]:
    """Has FSDP save whole weights, whatever its ``state_dict_type``.

    With shards (``SHARDED_STATE_DICT``, what ``accelerate config`` proposes) the Trainer would
    write no model that ``from_pretrained`` can read, and say nothing.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if not trainer.is_fsdp_enabled or plugin is None:
        yield
        return
    of_checkpoints = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(of_checkpoints)
