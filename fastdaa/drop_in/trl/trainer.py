"""TRL's ``DPOTrainer`` with the LM head of fastdaa in place of its own."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from transformers import ProcessorMixin
from trl.trainer import dpo_trainer
from trl.trainer.utils import hash_module

from fastdaa.drop_in.trl.head import add_head
from fastdaa.validation import check_positive


class DPOTrainer(dpo_trainer.DPOTrainer):
    """``trl.DPOTrainer`` whose token log-probs come from fastdaa's head.

    Same arguments, data, losses, references, metrics and checkpoints. TRL asks policy and reference
    for token log-probs and statistics, through a forward that its function ``add_fused_lm_head``
    adds to a model; everything else it makes of those. Only ``__init__`` is overridden: while TRL's
    own runs, two names of ``trl.trainer.dpo_trainer`` stand for others, and are put back before it
    returns. ``add_fused_lm_head`` adds fastdaa's head
    (:func:`fastdaa.drop_in.trl.head.add_head`), and ``hash_module``, which names the cache of
    precomputed reference log-probs, gives another name, so that policy and reference are never
    scored by two different heads.

    So every loss of TRL works, with ``ld_alpha``, f-divergences, precomputed reference log-probs, a
    ``ref_model`` of its own, synchronised references, PEFT adapters and reference adapters. Where
    ``U = 2 x scored tokens x vocabulary x hidden size`` FLOP, the head takes 1U without gradient,
    2U frozen, as under LoRA (TRL's takes 3U), and 3U trained, whatever the loss (TRL's takes 4U):
    the gradients of the logits wait for it (:mod:`fastdaa.kept_logps`), as many as fit in memory;
    the others are made again, up to 4U. 4U with ``activation_offloading``, which would send them
    to the host. ``use_weighting`` takes 1U more.

    Args:
        args, kwargs: those of ``trl.DPOTrainer``.
        head_max_bytes: memory that a call of the head may take, as ``max_bytes`` of
            :func:`fastdaa.plan_head`. None for the default.

    Raises:
        TypeError: ``head_max_bytes`` is no integer.
        ValueError: one that is not above 0; what this head does not serve: a weighted
            ``router_aux_loss_coef``, vision models, FSDP, DeepSpeed ZeRO-3, tensor, context and
            sequence parallelism, ``torch_compile``, ``use_liger_kernel``, a head with further
            layers; and whatever TRL refuses.
        RuntimeError: TRL did not ask for a head.
    """

    def __init__(self, *args: Any, head_max_bytes: int | None = None, **kwargs: Any) -> None:
        given = inspect.signature(dpo_trainer.DPOTrainer.__init__).bind(self, *args, **kwargs)
        _check_settings(given.arguments.get("args"), given.arguments.get("processing_class"))
        if head_max_bytes is not None and (
            isinstance(head_max_bytes, bool) or not isinstance(head_max_bytes, int)
        ):
            raise TypeError(f"head_max_bytes: expected an integer or None, got {head_max_bytes!r}")
        check_positive("head_max_bytes", head_max_bytes)
        heads = 0

        def add_checked(model: Any, outputs: tuple[str, ...] = ("log_probs",)) -> None:
            nonlocal heads
            if not heads:
                _check_trainer(self)
            # Its hooks would offload what is kept.
            keep = not getattr(self.args, "activation_offloading", False)
            add_head(model, outputs, keep=keep, max_bytes=head_max_bytes)
            heads += 1

        with _names_of_trl(add_fused_lm_head=add_checked, hash_module=_hash_module):
            super().__init__(*args, **kwargs)
        if not heads:
            raise RuntimeError(
                "expected trl.DPOTrainer to call add_fused_lm_head, got no call: this TRL is not "
                "the one that fastdaa.drop_in.trl was written for"
            )


@contextlib.contextmanager
def _names_of_trl(**functions: Callable[..., Any]) -> Iterator[None]:
    """Other functions under names of ``trl.trainer.dpo_trainer``, for a while."""
    originals = {name: getattr(dpo_trainer, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(dpo_trainer, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(dpo_trainer, name, original)


def _hash_module(module: Any) -> str:
    # TRL's own head rounds half-precision logits: its log-probs of the same weights are others.
    return f"fastdaa-{hash_module(module)}"


def _check_settings(args: Any, processing_class: Any) -> None:
    """Raise ``ValueError`` for what can be refused before anything is loaded."""
    if isinstance(processing_class, ProcessorMixin):
        raise _refused("processing_class", "a tokenizer", type(processing_class).__name__)
    for name in ("use_liger_kernel", "torch_compile"):
        if getattr(args, name, False):
            raise _refused(name, "False", "True")


def _check_trainer(trainer: DPOTrainer) -> None:
    """Raise ``ValueError`` for what is known once TRL has set up model and accelerator."""
    if trainer._is_vlm:
        raise _refused("processing_class", "a tokenizer", "that of a vision model")
    if trainer.aux_loss_enabled:
        raise _refused(
            "router_aux_loss_coef", "0 for a mixture of experts", str(trainer.router_aux_loss_coef)
        )
    if trainer.is_fsdp_enabled:
        raise _refused("fsdp", "DDP or one process", "FSDP")
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise _refused("deepspeed", "ZeRO stage 0, 1 or 2", "3")
    parallelism = trainer.accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size"):
        if getattr(parallelism, name, 1) > 1:
            raise _refused(name, "1", str(getattr(parallelism, name)))


def _refused(name: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"{name}: expected {expected} with fastdaa.drop_in.trl.DPOTrainer, got {got}; "
        "trl.DPOTrainer serves it"
    )
