"""A model's forward that returns token log-probs instead of logits, in the form that TRL reads."""

from __future__ import annotations

import contextlib
import functools
import types
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from fastdaa.drop_in.trl.entropy_gradient import with_gradient
from fastdaa.head import LmHead
from fastdaa.logps import head_logps_and_stats
from fastdaa.train.sharding import head_in_force
from fastdaa.train.zero3 import call_as, gathered, holds_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LABEL_NOT_SCORED = -100
_STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


def add_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
    *,
    keep: bool = False,
    bonus: bool = False,
    max_bytes: int | None = None,
) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` return TRL's ``FusedCausalLMOutput``.

    What TRL's ``add_fused_lm_head`` does, on the head of fastdaa. Every other call of the model is
    as before.

    Args:
        model: a causal language model, below any PEFT wrapper.
        temperature: divisor of the logits.
        cast_lm_head_to_fp32: hidden states in fp32, outside autocast.
        outputs: what is wanted of ``"log_probs"``, ``"entropy"``, ``"mean_logits"``, ``"is_top1"``,
            ``"log_sum_sq_probs"``. Log-probs and entropy are differentiable.
        keep: gradients of the logits of a trained head wait for the loss where they fit in memory
            (3U in place of 4U, whatever the loss).
        bonus: the loss has a gradient of the entropy. It is made with that of the log-probs then,
            3U for both or, of a trained head, 4U. Without it each gradient is made on its own, see
            :mod:`fastdaa.drop_in.trl.entropy_gradient`.
        max_bytes: memory of a call, as in :func:`fastdaa.plan_head`.

    Raises:
        ValueError: an output that this head does not have, or a head that it cannot reproduce.
    """
    unknown = sorted(set(outputs) - {"log_probs", *_STATS})
    if unknown:
        known = ", ".join(("log_probs", *_STATS))
        raise ValueError(f"outputs: expected some of {known}, got {unknown}")
    module: Any = model.get_output_embeddings()
    with gathered(() if module is None else module.parameters()):
        LmHead.from_model(model, temperature=temperature)  # raises now, not in the first step
    # Of the class, unless somebody has wrapped it: a bound one would stay that of this model in a
    # copy of it.
    wrapped = model.__dict__.get("forward")
    stats = any(name in outputs for name in _STATS)
    bonus = bonus and "entropy" in outputs
    options = {
        "stats": stats, "keep": keep, "bonus": bonus, "max_bytes": max_bytes, "selected": True
    }  # fmt: skip
    wanted = _Wanted(temperature, cast_lm_head_to_fp32, options)

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

    temperature: float
    in_fp32: bool
    options: dict[str, Any]
    """Of :func:`fastdaa.logps.head_logps_and_stats`."""


def _score(
    model: PreTrainedModel, labels: Tensor, wanted: _Wanted, *args: Any, **kwargs: Any
) -> FusedCausalLMOutput:
    """Log-probs of ``labels [S, T]`` as ``[S, T - 1]``, 0 where nothing is scored."""
    text_config = model.config.get_text_config()
    kwargs["use_cache"] = False
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    backbone = model.base_model(*args, **kwargs)

    def score(states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # Looked up now: inside `disable_adapter()` and the like another weight is in force.
        with head_in_force(model, wanted.temperature) as head:
            states, targets = states.to(head.weight.device), labels[:, 1:].to(head.weight.device)
            scored = targets != LABEL_NOT_SCORED
            with _precision(wanted.in_fp32, states.device):
                rows = states[scored].float() if wanted.in_fp32 else states[scored]
                return scored, _per_token(rows, head, targets[scored], wanted)

    states = backbone.last_hidden_state[:, :-1]
    module: Any = model.get_output_embeddings()
    scored, per_token = call_as(module, score, states) if holds_cut(module) else score(states)

    def spread(values: Tensor) -> Tensor:
        # Scattering keeps the graph where no token is scored: a gradient of 0, and no error.
        return values.new_zeros(scored.shape).masked_scatter(scored, values)

    loss, aux_loss = -per_token["log_probs"].sum() / scored.sum().clamp(min=1), None
    if kwargs.get("output_router_logits"):
        aux_loss = _aux_loss(backbone, text_config, kwargs.get("attention_mask"))
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
    values = {name: spread(values) for name, values in per_token.items()}
    return FusedCausalLMOutput(loss=loss, label_mask=scored, aux_loss=aux_loss, **values)


def _per_token(rows: Tensor, head: LmHead, tokens: Tensor, wanted: _Wanted) -> dict[str, Tensor]:
    """What TRL reads of every scored token, ``[N]`` each, by name."""
    options = wanted.options
    logps, stats = head_logps_and_stats(rows, head, tokens, **options)
    found = {"log_probs": logps}
    if stats is not None:
        found["entropy"] = stats.entropy
        if not options["bonus"]:
            found["entropy"] = with_gradient(stats.entropy, rows, head, options["max_bytes"])
        found["mean_logits"] = stats.mean_logit
        found["is_top1"] = stats.top1 > 0
        found["log_sum_sq_probs"] = stats.log_sum_sq
    return found


def _precision(in_fp32: bool, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, enabled=False) if in_fp32 else contextlib.nullcontext()


def _aux_loss(backbone: Any, text_config: Any, attention_mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a mixture of experts, as its own forward computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(text_config, "num_experts", None)
    if experts is None:  # gpt-oss before transformers 5.6
        experts = text_config.num_local_experts
    loss = load_balancing_loss_func(
        backbone.router_logits, experts, text_config.num_experts_per_tok, attention_mask
    )
    assert isinstance(loss, Tensor)  # it is 0 without router logits
    return loss
