"""How much fits into a policy."""

from __future__ import annotations

from torch import nn

from fastdaa.study.track.settings import TrackSettings
from fastdaa.train.backbone import causal_lm


def longest_prompt(
    model: nn.Module, settings: TrackSettings, max_length: int | None = None
) -> int | None:
    """Tokens that a prompt may have, so that an answer fits behind it; None for any number.

    Args:
        max_length: of prompt and completion in training, where longer prompts are not seen.

    Raises:
        ValueError: the model has no more positions than an answer takes.
    """
    positions = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    limits = [] if max_length is None else [max_length - 1]
    if isinstance(positions, int) and positions > 0:
        if positions <= settings.max_new_tokens:
            raise ValueError(
                f"track: expected max_new_tokens below {positions}, the positions that the model "
                f"has, got {settings.max_new_tokens}"
            )
        limits.append(positions - settings.max_new_tokens)
    return min(limits, default=None)
