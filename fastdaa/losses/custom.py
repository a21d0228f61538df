"""A loss of the caller's own beside those of the table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdaa.losses.registry import ALIASES, LOSSES, Loss

_OURS = tuple(loss.fn for loss in LOSSES.values())


def custom_loss(
    fn: Callable[..., Tensor],
    *,
    name: str | None = None,
    needs_ref: bool = True,
    coupled: bool = True,
    sparse: bool = False,
) -> Loss:
    """A loss of sequence log-probs for :meth:`fastdaa.Objective.parse`, alone or in a mixture.

    The head then costs what it costs with the losses of the table: ``fn`` runs inside the call, on
    log-probs that are leaves, and its derivatives by them go into the single pass. They are its
    only gradient there, so a tensor that requires one of its own is an error when the loss is
    evaluated; detach it, or keep the loss outside with ``impl="recompute"``.

    Args:
        fn: ``fn(policy, ref, *, <hyperparameters>)`` gives one loss a pair, ``[B]``, unreduced, in
            differentiable torch. ``policy`` and ``ref`` are :class:`fastdaa.PairLogps`, and ``ref``
            is None where there is no reference. Hyperparameters are keyword-only with numbers or
            True or False as defaults. One of the name ``totals`` gets the
            :class:`fastdaa.BatchTotals` of the batch, for means over tokens, and one of the name
            ``beta`` is the scale of the logged rewards.
        name: what ``str`` of the objective and error messages show; None for that of ``fn``.
        needs_ref: ``fn`` reads ``ref``.
        coupled: the loss of a pair may depend on other pairs of the batch, so ``fn`` has to see all
            of them at once. False if it does not: then batches of any size cost 3U.
        sparse: many pairs have a gradient of exactly 0, as those that satisfy a hinge.

    Raises:
        TypeError: ``fn`` does not have that signature.
        ValueError: a name that a loss of the table has.
    """
    name = getattr(fn, "__name__", type(fn).__name__) if name is None else name
    if name in LOSSES or name in ALIASES:
        raise ValueError(f"name: expected one that no loss of the library has, got {name!r}")
    _check_signature(fn, name)
    return Loss(
        name, fn, "of the caller", "a function of the caller's", needs_ref=needs_ref,
        coupled=coupled, sparse=sparse,
    )  # fmt: skip


def is_custom(loss: Loss) -> bool:
    """Whether a loss computes something other than one of the table."""
    return loss.level != "unpaired" and getattr(loss.fn, "func", loss.fn) not in _OURS


def _check_signature(fn: Any, name: str) -> None:
    expected = f"fn: expected {name}(policy, ref, *, <hyperparameters with defaults>)"
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        raise TypeError(f"{expected}, got {fn!r}") from None
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    others = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    fits = len(others) == 2 and len(others) + len(keywords) == len(parameters)
    if not fits:
        raise TypeError(f"{expected}, got {name}({', '.join(map(str, parameters))})")
    for p in keywords:
        if p.name != "totals" and not isinstance(p.default, (bool, int, float)):
            raise TypeError(
                f"{expected}: numbers, True or False; {p.name} has "
                f"{'none' if p.default is p.empty else repr(p.default)}"
            )
