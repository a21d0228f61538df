"""Fused preference training: log-probabilities and losses from hidden states, without logits.

- Losses as ``torch.nn`` modules: :class:`FusedLinearDPOLoss`, :class:`FusedLinearIPOLoss`,
  :class:`FusedLinearSLiCLoss`, :class:`FusedLinearAPALoss`, and :class:`FusedLinearPairLoss` for
  every other objective in :data:`LOSSES`.
- Functions below them: :func:`token_logps`, :func:`pair_loss`, :func:`token_divergence`,
  :func:`token_entropy`, :func:`token_logps_and_entropy`; :class:`LmHead` and
  :func:`select_pairs` make their inputs, :func:`plan_head` says what a call costs.
- Trainers, data and other parts are imported by name: ``fastdaa.train``, ``fastdaa.data``,
  ``fastdaa.drop_in``, ``fastdaa.online``, ``fastdaa.study``.

Public names are imported when they are first used, so that ``import fastdaa`` and the help of the
command line do not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdaa.divergence import token_divergence, token_kl
    from fastdaa.entropy import token_entropy
    from fastdaa.head import LmHead
    from fastdaa.head_plan import HeadPlan
    from fastdaa.logps import sequence_logps, token_logps, token_stats
    from fastdaa.logps_and_entropy import token_logps_and_entropy
    from fastdaa.losses import LOSSES, Objective, custom_loss, implicit_rewards
    from fastdaa.modules import (
        FusedLinearAPALoss,
        FusedLinearDPOLoss,
        FusedLinearIPOLoss,
        FusedLinearPairLoss,
        FusedLinearSLiCLoss,
    )
    from fastdaa.outputs import BatchTotals, PairLogps, PairLossOutput, TokenSelection, TokenStats
    from fastdaa.pair_loss import pair_loss
    from fastdaa.planner import plan_head
    from fastdaa.selection import select_pairs, select_tokens
    from fastdaa.vocab_shard import VocabShard

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "BatchTotals",
    "FusedLinearAPALoss",
    "FusedLinearDPOLoss",
    "FusedLinearIPOLoss",
    "FusedLinearPairLoss",
    "FusedLinearSLiCLoss",
    "HeadPlan",
    "LmHead",
    "Objective",
    "PairLogps",
    "PairLossOutput",
    "TokenSelection",
    "TokenStats",
    "VocabShard",
    "__version__",
    "custom_loss",
    "implicit_rewards",
    "pair_loss",
    "plan_head",
    "select_pairs",
    "select_tokens",
    "sequence_logps",
    "token_divergence",
    "token_entropy",
    "token_kl",
    "token_logps",
    "token_logps_and_entropy",
    "token_stats",
]

_NAMES_OF_MODULES = {
    "divergence": ("token_divergence", "token_kl"),
    "entropy": ("token_entropy",),
    "head": ("LmHead",),
    "head_plan": ("HeadPlan",),
    "logps": ("sequence_logps", "token_logps", "token_stats"),
    "logps_and_entropy": ("token_logps_and_entropy",),
    "losses": ("LOSSES", "Objective", "custom_loss", "implicit_rewards"),
    "modules": (
        "FusedLinearAPALoss", "FusedLinearDPOLoss", "FusedLinearIPOLoss", "FusedLinearPairLoss",
        "FusedLinearSLiCLoss",
    ),
    "outputs": ("BatchTotals", "PairLogps", "PairLossOutput", "TokenSelection", "TokenStats"),
    "pair_loss": ("pair_loss",),
    "planner": ("plan_head",),
    "selection": ("select_pairs", "select_tokens"),
    "vocab_shard": ("VocabShard",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULES.items() for name in names}


if not TYPE_CHECKING:  # type checkers see the imports above, and report unknown names

    def __getattr__(name: str) -> Any:
        """A public name, or a module that has some, at its first use (PEP 562)."""
        if name in _MODULE_OF:
            value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
            globals()[name] = value  # from now on an ordinary attribute
            return value
        if name in _NAMES_OF_MODULES:
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names and their modules, packages that are loaded, and what every module has."""
    loaded = (
        name
        for name, value in globals().items()
        if name.startswith("__") or getattr(value, "__package__", "").startswith(f"{__name__}.")
    )
    return sorted({*__all__, *_NAMES_OF_MODULES, *loaded})


class _Package(ModuleType):
    """Keeps names that a module shares with its function for the function.

    Importing ``fastdaa.pair_loss`` would otherwise put the module where ``from fastdaa import
    pair_loss`` looks.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and name in _MODULE_OF):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
