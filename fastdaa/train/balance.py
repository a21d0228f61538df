"""The load-balancing loss of a mixture of experts: which models have one, and what it weighs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastdaa.validation import check_number

_GIVEN = "_fastdaa_router_aux_loss_coef"
"""Attribute of a model: the weight that was given for it; without it the configuration decides."""


def set_balance(core: nn.Module, coefficient: float | None) -> None:
    """Give the load-balancing loss of a model a weight in the place of its configuration's.

    Args:
        core: a transformers model.
        coefficient: 0 for no such loss; None for what the configuration says.

    Raises:
        ValueError: the model has no experts, or none whose load it can tell.
    """
    if coefficient is None:
        vars(core).pop(_GIVEN, None)
        return
    if coefficient and not can_balance(core):
        raise ValueError(
            "router_aux_loss_coef: expected a mixture of experts that has a load-balancing loss, "
            f"got {coefficient} for {type(core).__name__}"
        )
    setattr(core, _GIVEN, float(coefficient))


def can_balance(core: Any) -> bool:
    """Whether a transformers model can tell the load of its experts, and has a loss for it."""
    return _loss_of(core) is not None and hasattr(
        core.config.get_text_config(), "output_router_logits"
    )


def left_unbalanced(core: Any) -> float | None:
    """The weight in a configuration that nothing asks for; None where it is used or there is none.

    TRL 1.16 asks for it in every model, transformers where ``output_router_logits`` is on.
    """
    if getattr(core, _GIVEN, None) is not None or balance_of(core) is not None:
        return None
    coefficient = getattr(core.config.get_text_config(), "router_aux_loss_coef", None)
    return (coefficient or None) if can_balance(core) else None


def balance_of(core: Any) -> float | None:
    """What the load-balancing loss of a transformers model weighs; None where there is none."""
    given = getattr(core, _GIVEN, None)
    if given is not None:
        return given or None
    config = core.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return None
    return float(getattr(config, "router_aux_loss_coef", None) or 0.0)


def check_coefficient(coefficient: float | None) -> None:
    """Raise ``ValueError`` for a weight below 0, or ``TypeError`` for what is no number."""
    if coefficient is not None and check_number("router_aux_loss_coef", coefficient) < 0:
        raise ValueError(f"router_aux_loss_coef: expected 0 or more, got {coefficient}")


def load_balancing_loss(core: Any, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The family's own loss over its router logits, as its causal language model computes it.

    Raises:
        ValueError: the family has none, or its backbone gave no router logits.
    """
    function = _loss_of(core)
    logits = getattr(outputs, "router_logits", None)
    if function is None or not logits:
        raise ValueError(
            f"expected router logits and a load-balancing loss, since {type(core).__name__} has "
            "output_router_logits set, got none; set it to False in the configuration, or "
            "router_aux_loss_coef to 0"
        )
    mask = inputs.get("attention_mask")
    padding = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    # A classifier of the family does not have these numbers, which its language model keeps.
    experts = getattr(core, "num_experts", None) or logits[0].shape[-1]
    chosen = getattr(core, "num_experts_per_tok", None)
    chosen = chosen or core.config.get_text_config().num_experts_per_tok
    loss: Tensor = function(logits, experts, chosen, padding)
    return loss


def _loss_of(core: nn.Module) -> Any:
    # FSDP2 makes a class of its own, and so may a user, somewhere else than the family's module.
    modules = (sys.modules.get(kind.__module__) for kind in type(core).__mro__)
    return next(filter(None, (getattr(m, "load_balancing_loss_func", None) for m in modules)), None)
