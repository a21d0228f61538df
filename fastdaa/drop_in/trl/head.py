"""A model's forward that returns token log-probs instead of logits, in the form that TRL reads."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABEL_NOT_SCORED = -100
_STATS = ("entropy", "mean_logits", "is_top1")


def add_head(model: PreTrainedModel, outputs: tuple[str, ...] = ("log_probs",)) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` return TRL's ``FusedCausalLMOutput``.

    What TRL's ``add_fused_lm_head`` does, on the head of fastdaa. Every other call of the model is
    as before.

    Args:
        model: a causal language model, below any PEFT wrapper.
        outputs: what is wanted of ``"log_probs"``, ``"entropy"``, ``"mean_logits"``, ``"is_top1"``.

    Raises:
        ValueError: an output that this head does not have, or a head that it cannot reproduce.
    """
    unknown = sorted(set(outputs) - {"log_probs", *_STATS})
    if unknown:
        raise ValueError(f"outputs: expected some of log_probs, {', '.join(_STATS)}, got {unknown}")
    LmHead.from_model(model)  # raises now rather than in the first step
    original = model.forward
    stats = any(name in outputs for name in _STATS)

    @functools.wraps(type(model).forward)  # `generate` reads the names of the arguments
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if fused_lm_head:
            assert labels is not None
            return _score(self, labels, stats, *args, **kwargs)
        if labels is not None:
            kwargs["labels"] = labels
        return original(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _score(
    model: PreTrainedModel, labels: Tensor, stats: bool, *args: Any, **kwargs: Any
) -> FusedCausalLMOutput:
    """Log-probs of ``labels [S, T]`` as ``[S, T - 1]``, 0 where nothing is scored."""
    kwargs["use_cache"] = False
    states = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    # Looked up now: inside `disable_adapter()` and the like another weight is in force.
    head = LmHead.from_model(model)
    states = states.to(head.weight.device)
    targets = labels[:, 1:].to(states.device)
    scored = targets != LABEL_NOT_SCORED
    logps, values = head_logps_and_stats(states[scored], head, targets[scored], stats=stats)

    def spread(tokens: Tensor) -> Tensor:
        # Scattering keeps the graph where no token is scored: a gradient of 0, and no error.
        return tokens.new_zeros(scored.shape).masked_scatter(scored, tokens)

    per_token = {"log_probs": spread(logps)}
    if values is not None:
        per_token["entropy"] = spread(values.entropy)
        per_token["mean_logits"] = spread(values.mean_logit)
        per_token["is_top1"] = spread(values.top1) > 0
    loss = -logps.sum() / scored.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, label_mask=scored, **per_token)
