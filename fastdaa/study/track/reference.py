"""What a tracked policy is compared with: the trainer's reference, or one of its own kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from fastdaa.train.adapters import is_adapted
from fastdaa.train.references import Reference, check_reference, online_reference

if TYPE_CHECKING:
    from fastdaa.train.trainer import PreferenceTrainer

NO_REFERENCE = (
    "precompute_ref_log_probs: expected it off while quality is tracked, since it keeps no "
    "reference model for the KL in full training, got it on; leave it out, train adapters "
    "(use_peft), or measure the checkpoints afterwards with `fastdaa study track`"
)


def tracked_reference(trainer: PreferenceTrainer, given: Any = None) -> Reference:
    """A reference with a model at hand. Call it before the training.

    - the trainer's, where it is online: adapter off, frozen copy, or ``ref_model``;
    - with precomputed log-probs: ``given``, or with adapters the policy with its adapter off;
    - for a loss without a reference: ``given``, or the starting point of the policy (adapter off,
      else a frozen copy is made, which takes the memory of a second model).

    Args:
        given: a causal language model; only where the trainer has no online reference.

    Raises:
        ValueError: log-probs are precomputed in full training, and no model was given; or one was
            given beside the trainer's own.
    """
    own = trainer.reference
    if own is not None and own.online:
        if given is not None:
            raise ValueError("track: expected no ref_model, since the trainer has a reference")
        return own
    if given is not None:
        check_reference(given, trainer.model, same_vocabulary=True)
        model: nn.Module = given.eval().requires_grad_(False)
        return online_reference(trainer, model)
    if own is None or is_adapted(trainer.model):
        return online_reference(trainer, None)
    raise ValueError(NO_REFERENCE)
