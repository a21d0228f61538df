"""Where the reference log-probabilities of a pack come from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdaa.data import selection_from
from fastdaa.head import LmHead
from fastdaa.logps import head_logps, sequence_logps
from fastdaa.train.adapters import is_adapted, starting_point
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.compilation import compile_backbone
from fastdaa.train.prepare import prepare_model
from fastdaa.train.sharding import (
    head_afterwards,
    head_in_force,
    is_sharded,
    prepare_reference,
)

if TYPE_CHECKING:
    from fastdaa.train.trainer import PreferenceTrainer


class ReferenceScores(NamedTuple):
    """What is known of a pack under the reference, without gradient."""

    sequence_logps: Tensor
    """``[S]`` fp32."""
    token_logps: Tensor | None
    """``[N]`` fp32; None where only sums are cached, for objectives that need no more."""
    rows: Tensor | None = None
    """``[N, D]`` hidden states of the scored tokens, if asked for."""
    head: LmHead | None = None
    """The head that belongs to ``rows``."""


class Reference(Protocol):
    """Scores packs."""

    online: bool
    """Whether it has a model at hand, and so token log-probs and hidden states."""

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """Log-probs of the scored tokens of a pack."""


class ModelReference:
    """A second, frozen model.

    Args:
        model: prepared by the accelerator, with ``install_head_task``.
        max_bytes: memory that the head may take, see :func:`fastdaa.plan_head`.
        engine: what works on them, see :func:`fastdaa.token_logps`.
    """

    online = True

    def __init__(self, model: nn.Module, max_bytes: int | None = None, engine: str = "auto"):
        self.model = model
        self.options: dict[str, Any] = {"max_bytes": max_bytes, "engine": engine}

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """Log-probs of the scored tokens of a pack under the model."""
        with torch.no_grad():
            return score_pack(self.model, pack, keep_rows=keep_rows, **self.options)


class AdapterReference:
    """The policy with its adapter off, or with a frozen copy of the adapter it started from.

    The model is in eval mode meanwhile: no dropout, no activation checkpointing.

    Args:
        policy: gives the model as it is now; sharding may put another in its place.
        max_bytes: memory that the head may take, see :func:`fastdaa.plan_head`.
        engine: what works on them, see :func:`fastdaa.token_logps`.
    """

    online = True

    def __init__(
        self, policy: Callable[[], nn.Module], max_bytes: int | None = None, engine: str = "auto"
    ):
        self.policy = policy
        self.options: dict[str, Any] = {"max_bytes": max_bytes, "engine": engine}

    @property
    def model(self) -> nn.Module:
        """The policy as it is now."""
        return self.policy()

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """Log-probs of the scored tokens of a pack under the starting point of the policy."""
        model = self.model
        with torch.no_grad(), starting_point(model):
            return score_pack(model, pack, keep_rows=keep_rows, **self.options)


class CachedReference:
    """Log-probs that the collator took from the dataset."""

    online = False

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """The cached sums, and where the dataset has them the log-probs of the tokens."""
        return ReferenceScores(pack["ref_logps"], pack.get("ref_token_logps"))


def online_reference(
    trainer: PreferenceTrainer, given: nn.Module | None
) -> ModelReference | AdapterReference:
    """The reference that scores packs while the policy is trained.

    Args:
        trainer: with the policy before its training.
        given: a second model; else it is the starting point of the policy, see
            :func:`fastdaa.train.adapters.keep_starting_adapter`.
    """
    options = (trainer.args.head_max_bytes, trainer.args.head_engine)
    if given is None and is_adapted(trainer.model):
        return AdapterReference(lambda: trainer.model, *options)
    ref = frozen_copy(trainer.model) if given is None else given
    prepare_model(ref, trainer.layout)
    compile_backbone(ref, trainer.compilation)
    return ModelReference(prepare_reference(ref, trainer.accelerator), *options)


def reference_for_cache(
    trainer: PreferenceTrainer, given: nn.Module | None
) -> ModelReference | AdapterReference:
    """The reference that scores packs before the training, and is dropped then."""
    adapted = is_adapted(trainer.model)
    if given is not None or (adapted and not is_sharded(trainer)):
        return online_reference(trainer, given)
    options = (trainer.args.head_max_bytes, trainer.args.head_engine)
    # The policy itself, before it is trained, spares a copy, but it is cut only when it is trained.
    model = trainer.model.eval()
    if is_sharded(trainer):
        model = prepare_reference(frozen_copy(model), trainer.accelerator)
    return AdapterReference(lambda: model, *options) if adapted else ModelReference(model, *options)


def score_pack(
    model: nn.Module,
    pack: Mapping[str, Any],
    *,
    keep_rows: bool,
    max_bytes: int | None,
    engine: str = "auto",
) -> ReferenceScores:
    """Run ``model`` on a pack and score its selection, inside the model's forward."""
    selection = selection_from(pack)
    core = causal_lm(model)

    def task(hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = flat.index_select(0, selection.rows)
        with head_in_force(core) as head:
            logps = head_logps(
                rows, head.detach(), selection.targets, engine=engine, max_bytes=max_bytes
            )
        return logps, rows if keep_rows else None

    token_logps, rows = run_head_task(model, pack, task).result
    sums = sequence_logps(token_logps, selection.lengths)
    return ReferenceScores(sums, token_logps, rows, head_afterwards(core) if keep_rows else None)


def check_reference(ref: nn.Module, policy: nn.Module, *, same_vocabulary: bool) -> None:
    """Raise ``ValueError`` for a second model that cannot be the reference of the policy.

    Args:
        ref: the model that was given.
        policy: the model that is trained.
        same_vocabulary: also compare the sizes of the vocabularies.
    """
    trained = {id(parameter) for parameter in policy.parameters()}
    if any(id(parameter) in trained for parameter in ref.parameters()):
        raise ValueError(
            "ref_model: expected a model with weights of its own, got one that shares them with "
            "the policy (PEFT puts adapters into the model that it is given); leave ref_model out "
            "to compare with the starting point"
        )
    sizes = [LmHead.from_model(causal_lm(model)).vocab_size for model in (policy, ref)]
    if same_vocabulary and sizes[0] != sizes[1]:
        raise ValueError(
            f"ref_model: expected a vocabulary of {sizes[0]} as in the policy, got {sizes[1]}; if "
            "the tokens mean the same in both, set log_exact_kl to false"
        )


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that needs no gradient: the reference of full training."""
    ref = copy.deepcopy(model).eval()
    return ref.requires_grad_(False)
