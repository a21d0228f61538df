"""What the drop-in trainers have in common: while TRL's ``__init__`` runs, its head is ours."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar

from torch import nn
from transformers import Trainer
from trl.trainer.utils import hash_module

from fastdaa.drop_in.trl.head import add_head
from fastdaa.drop_in.trl.refusals import check_arguments, check_trainer
from fastdaa.train.sharding import keep_results_wide
from fastdaa.train.zero3 import gathered, holds_cut
from fastdaa.validation import check_positive


class OnHead(Trainer):
    """Mixin before a trainer of TRL, whose token log-probs then come from fastdaa's head.

    TRL's trainers ask their models for token log-probs and statistics, through a forward that TRL's
    function ``add_fused_lm_head`` adds to a model; everything else they make of those. Only
    ``__init__`` is overridden: while TRL's own runs, names of its module stand for other functions,
    and are put back before it returns. ``add_fused_lm_head`` adds fastdaa's head
    (:func:`fastdaa.drop_in.trl.head.add_head`). Where TRL precomputes reference log-probs,
    ``hash_module``, which names their cache, gives another name, so that policy and reference are
    never scored by two different heads.

    Where ``U = 2 x scored tokens x vocabulary x hidden size`` FLOP, the head takes 1U without
    gradient, 2U frozen, as under LoRA (TRL's takes 3U), and 3U trained, whatever the loss of
    log-probs (TRL's takes 4U): the gradients of the logits wait for it (:mod:`fastdaa.kept_logps`),
    as many as fit in memory; the others are made again, up to 4U. 4U with
    ``activation_offloading``, which would send them to the host. What waits is freed by the
    backward pass of its batch, so gradient accumulation holds that of one batch at a time.

    Args:
        args, kwargs: those of TRL's trainer.
        head_max_bytes: memory that a call of the head may take, as ``max_bytes`` of
            :func:`fastdaa.plan_head`. None for the default.

    Raises:
        TypeError: ``head_max_bytes`` is no integer.
        ValueError: one that is not above 0; what this head does not serve
            (:mod:`fastdaa.drop_in.trl.refusals`; a head with further layers); and whatever TRL
            refuses.
        RuntimeError: TRL did not ask for a head.
    """

    trl_class: ClassVar[type]
    """The trainer of TRL that follows in the bases."""
    precomputes_reference: ClassVar[bool] = False
    """Whether TRL's trainer can write reference log-probs to a cache."""

    def __init__(self, *args: Any, head_max_bytes: int | None = None, **kwargs: Any) -> None:
        name = self.trl_class.__name__
        self.check_given(inspect.signature(super().__init__).bind(*args, **kwargs).arguments)
        if head_max_bytes is not None and (
            isinstance(head_max_bytes, bool) or not isinstance(head_max_bytes, int)
        ):
            raise TypeError(f"head_max_bytes: expected an integer or None, got {head_max_bytes!r}")
        check_positive("head_max_bytes", head_max_bytes)
        heads = 0

        def add_checked(model: Any, **options: Any) -> None:
            nonlocal heads
            if not heads:
                check_trainer(name, self)
                keep_results_wide(self.accelerator)
            # Its hooks would offload what is kept.
            keep = not getattr(self.args, "activation_offloading", False)
            bonus = self.has_entropy_bonus()
            add_head(model, keep=keep, bonus=bonus, max_bytes=head_max_bytes, **options)
            heads += 1

        functions: dict[str, Callable[..., Any]] = {"add_fused_lm_head": add_checked}
        if self.precomputes_reference:
            functions["hash_module"] = _hash_module
        with _names_in(sys.modules[self.trl_class.__module__], functions):
            super().__init__(*args, **kwargs)
        if not heads:
            raise RuntimeError(
                f"expected trl.{name} to call add_fused_lm_head, got no call: this TRL is not the "
                "one that fastdaa.drop_in.trl was written for"
            )

    def has_entropy_bonus(self) -> bool:
        """Whether the loss has a gradient of the entropy."""
        return False

    @classmethod
    def check_given(cls, given: dict[str, Any]) -> None:
        """Raise ``ValueError`` for arguments of TRL's trainer that this head does not serve."""
        check_arguments(cls.trl_class.__name__, given)


@contextlib.contextmanager
def _names_in(module: ModuleType, functions: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Other functions under names of a module, for a while."""
    originals = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


def _hash_module(module: nn.Module) -> str:
    # TRL's own head rounds half-precision logits: its log-probs of the same weights are others.
    return f"fastdaa-{_hash_weights(module)}"


def _hash_weights(module: nn.Module) -> str:
    if not holds_cut(module):
        return hash_module(module)
    # TRL would hash empty tensors, which are those of every model.
    parts = hashlib.sha256()
    for weight in module.parameters():
        with gathered([weight]):
            parts.update(hash_module(nn.ParameterList([weight])).encode())
    return parts.hexdigest()
