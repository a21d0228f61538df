"""Where the reference log-probabilities of a pack come from."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastdaa.data import selection_from
from fastdaa.head import LmHead
from fastdaa.logps import head_logps, sequence_logps
from fastdaa.train.backbone import causal_lm, run_head_task

REF_ADAPTER = "ref"


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
        max_bytes: bytes of fp32 logits held at a time.
    """

    online = True

    def __init__(self, model: nn.Module, max_bytes: int | None = None):
        self.model = model
        self.max_bytes = max_bytes

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """Log-probs of the scored tokens of a pack under the model."""
        with torch.no_grad():
            return score_pack(self.model, pack, keep_rows=keep_rows, max_bytes=self.max_bytes)


class AdapterReference:
    """The policy with its adapter off, or with a frozen copy of the adapter it started from.

    The model is in eval mode meanwhile: no dropout, no activation checkpointing.
    """

    online = True

    def __init__(self, model: nn.Module, max_bytes: int | None = None):
        self.model = model
        self.max_bytes = max_bytes

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """Log-probs of the scored tokens of a pack under the starting point of the policy."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), reference_adapter(peft_model(self.model)):
                return score_pack(self.model, pack, keep_rows=keep_rows, max_bytes=self.max_bytes)
        finally:
            self.model.train(training)


class CachedReference:
    """Log-probs that the collator took from the dataset."""

    online = False

    def score(self, pack: Mapping[str, Any], *, keep_rows: bool = False) -> ReferenceScores:
        """The cached sums.

        Raises:
            KeyError: the pack has none.
        """
        return ReferenceScores(pack["ref_logps"], pack.get("ref_token_logps"))


def score_pack(
    model: nn.Module, pack: Mapping[str, Any], *, keep_rows: bool, max_bytes: int | None
) -> ReferenceScores:
    """Run ``model`` on a pack and score its selection, inside the model's forward."""
    selection = selection_from(pack)

    def task(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = flat.index_select(0, selection.rows)
        head = LmHead.from_model(causal_lm(model)).detach()
        return head_logps(rows, head, selection.targets, max_bytes=max_bytes), rows

    token_logps, rows = run_head_task(model, pack, task).result
    sums = sequence_logps(token_logps, selection.lengths)
    if not keep_rows:
        return ReferenceScores(sums, token_logps)
    return ReferenceScores(sums, token_logps, rows, LmHead.from_model(causal_lm(model)).detach())


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model in eval mode that needs no gradient: the reference of full training."""
    ref = copy.deepcopy(model).eval()
    return ref.requires_grad_(False)


def peft_model(model: nn.Module) -> Any:
    """The PEFT model inside wrappers of DDP and the like."""
    inner: Any = model
    while not hasattr(inner, "disable_adapter"):
        inner = inner.module
    return inner


@contextlib.contextmanager
def reference_adapter(model: Any) -> Iterator[None]:
    """The PEFT model as it was before training: its frozen copy of the adapter, or none."""
    if REF_ADAPTER not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    active = model.active_adapter
    model.set_adapter(REF_ADAPTER)
    try:
        yield
    finally:
        # set_adapter switches gradients along with the adapter; the copy stays frozen.
        model.set_adapter(active)
        freeze_adapter(model, REF_ADAPTER)


def keep_starting_adapter(model: Any) -> bool:
    """Copy a trained adapter, so that the policy can be compared with where it started.

    A fresh LoRA adapter changes nothing (its ``B`` is zero): switching it off is the same and
    costs no memory.

    Returns:
        Whether a copy was made.
    """
    name = model.active_adapter
    weights = {k: v for k, v in model.named_parameters() if f".{name}" in k}
    outputs = [v for k, v in weights.items() if "lora_B" in k or "lora_embedding_B" in k]
    if outputs and not any(bool(v.detach().any()) for v in outputs):
        return False
    model.add_adapter(REF_ADAPTER, model.peft_config[name])
    parameters = dict(model.named_parameters())
    for key, value in weights.items():
        parameters[key.replace(f".{name}", f".{REF_ADAPTER}")].data.copy_(value.data)
    freeze_adapter(model, REF_ADAPTER)
    model.set_adapter(name)
    return True


def freeze_adapter(model: Any, name: str) -> None:
    """No gradient for the parameters of one adapter."""
    for key, parameter in model.named_parameters():
        if f".{name}" in key:
            parameter.requires_grad_(False)
