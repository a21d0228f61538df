"""A model's forward that returns token log-probs instead of logits, in the form that TRL reads."""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats, sharper_logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABEL_NOT_SCORED = -100
_STATS = ("entropy", "mean_logits", "is_top1")
_SUM_SQ = "log_sum_sq_probs"


def add_head(
    model: PreTrainedModel,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    keep: bool = False,
    max_bytes: int | None = None,
) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` return TRL's ``FusedCausalLMOutput``.

    What TRL's ``add_fused_lm_head`` does, on the head of fastdaa. Every other call of the model is
    as before.

    Args:
        model: a causal language model, below any PEFT wrapper.
        outputs: what is wanted of ``"log_probs"``, ``"entropy"``, ``"mean_logits"``, ``"is_top1"``,
            ``"log_sum_sq_probs"``; the last one costs a product of the head more.
        keep: gradients of the logits of a trained head wait for the loss where they fit in memory
            (3U in place of 4U, whatever the loss).
        max_bytes: memory of a call, as in :func:`fastdaa.plan_head`.

    Raises:
        ValueError: an output that this head does not have, or a head that it cannot reproduce.
    """
    unknown = sorted(set(outputs) - {"log_probs", *_STATS, _SUM_SQ})
    if unknown:
        known = ", ".join(("log_probs", *_STATS, _SUM_SQ))
        raise ValueError(f"outputs: expected some of {known}, got {unknown}")
    LmHead.from_model(model)  # raises now rather than in the first step
    # Of the class, unless somebody has wrapped it: a bound one would stay that of this model in a
    # copy of it.
    wrapped = model.__dict__.get("forward")
    stats = any(name in outputs for name in _STATS)
    options = {"stats": stats, "keep": keep, "max_bytes": max_bytes, "selected": True}
    wanted = _Wanted(_SUM_SQ in outputs, options)

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
            return _score(self, labels, wanted, *args, **kwargs)
        if labels is not None:
            kwargs["labels"] = labels
        if wrapped is not None:
            return wrapped(*args, **kwargs)
        return type(self).forward(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


class _Wanted(NamedTuple):
    """What is asked of every call of a head."""

    sum_sq: bool
    options: dict[str, Any]
    """Of :func:`fastdaa.logps.head_logps_and_stats`."""


def _score(
    model: PreTrainedModel, labels: Tensor, wanted: _Wanted, *args: Any, **kwargs: Any
) -> FusedCausalLMOutput:
    """Log-probs of ``labels [S, T]`` as ``[S, T - 1]``, 0 where nothing is scored."""
    kwargs["use_cache"] = False
    states = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
    # Looked up now: inside `disable_adapter()` and the like another weight is in force.
    head = LmHead.from_model(model)
    states = states.to(head.weight.device)
    targets = labels[:, 1:].to(states.device)
    scored = targets != LABEL_NOT_SCORED
    rows, tokens = states[scored], targets[scored]
    logps, stats = head_logps_and_stats(rows, head, tokens, **wanted.options)

    def spread(values: Tensor) -> Tensor:
        # Scattering keeps the graph where no token is scored: a gradient of 0, and no error.
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    per_token = {"log_probs": spread(logps)}
    if stats is not None:
        per_token["entropy"] = spread(stats.entropy)
        per_token["mean_logits"] = spread(stats.mean_logit)
        per_token["is_top1"] = spread(stats.top1) > 0
    if wanted.sum_sq:
        sharper = sharper_logps(rows, head, tokens, max_bytes=wanted.options["max_bytes"])
        per_token[_SUM_SQ] = spread(2 * logps.detach() - sharper)
    loss = -logps.sum() / scored.sum().clamp(min=1)
    return FusedCausalLMOutput(loss=loss, label_mask=scored, **per_token)
