"""Micro-batches of one example, which has no other prompt's completion for KTO's baseline."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fastdaa.counted import counted
from fastdaa.train.steps_left import sharing_processes

if TYPE_CHECKING:
    from fastdaa.train.unpaired_config import UnpairedConfig

logger = logging.getLogger(__name__)


def check_lone(count: int, name: str, args: UnpairedConfig, *, training: bool) -> None:
    """Say which examples have the baseline 0, where mismatched completions are a micro-batch's.

    Args:
        count: examples of the dataset.
        name: of it.
        training: it is trained on, not evaluated on.

    Raises:
        ValueError: there is one example, and it is to be trained on or its log-probs cached.
    """
    cached = args.precompute_ref_log_probs
    if count == 1 and (training or cached):
        raise ValueError(
            f"{name}: expected at least 2 examples for kto, whose KL baseline is estimated on "
            "prompts with each other's completions, got 1"
        )
    size = args.train_batch_size if training else args.eval_batch_size
    # In training, several processes fill the last batch; where it is dropped, none is lone.
    filled = training and (sharing_processes(args) > 1 or args.dataloader_drop_last)
    if cached or filled or count % size != 1 or not args.should_log:
        return
    option = f"per_device_{'train' if training else 'eval'}_batch_size"
    logger.warning(
        "%s: 1 of %s is alone in %s, with no other one's completion for the KL baseline "
        "of kto: there z0 is 0%s",
        name, counted(count, "example"),
        "the last batch of an epoch" if training else "the last batch",
        f"; with another {option} than {size} it is not alone" if count > 1 else "",
    )  # fmt: skip


def check_found_size(size: int) -> None:
    """Raise ``MemoryError`` where ``auto_find_batch_size`` has come down to lone examples."""
    if size < 2:
        raise MemoryError(
            "auto_find_batch_size: expected memory for at least 2 examples at once, of which kto "
            "estimates its KL baseline, got less; --tokens_per_pack bounds memory and leaves the "
            "baseline as it is"
        )
