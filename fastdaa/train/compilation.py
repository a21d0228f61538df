"""``--torch_compile``: the backbone is compiled once, for batches of all lengths.

accelerate would compile the whole forward. That holds a new head task in every step, and the
lengths of the segments as numbers of the host, so that every batch would be compiled anew. Here
only the backbone is, with dynamic shapes. Attention over segments stays outside of its graphs, and
so does the head, whose operations are no chain of small ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import AttentionInterface

from fastdaa.train.attention import ATTENTION_NAME, attention_forward
from fastdaa.train.backbone import BACKBONE_CALL, causal_lm

MODES = ("default", "max-autotune-no-cudagraphs")
"""Of ``torch.compile``. The others record a CUDA graph of every length, and every batch has its
own."""


class CompiledBackbone:
    """Calls a backbone through ``torch.compile``.

    What goes through it is compiled at its first call, for gradients and without them. A copy (of
    the model that holds it) compiles for itself.

    Args:
        backend: of ``torch.compile``.
        mode: one of ``MODES``, or None for the default.
    """

    def __init__(self, backend: str, mode: str | None = None):
        self.backend, self.mode = backend, mode
        self._of: nn.Module | None = None
        self._compiled: Any = None

    def __call__(self, backbone: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """``backbone(**inputs)``."""
        if self._of is not backbone:
            mode = None if self.backend != "inductor" else self.mode
            self._of = backbone
            self._compiled = torch.compile(backbone, backend=self.backend, mode=mode, dynamic=True)
        if "segments" in inputs:
            inputs = {**inputs, "segments": _Unseen(inputs["segments"])}
        return self._compiled(**inputs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.backend, self.mode)


class _Unseen(Mapping[str, Any]):
    """A mapping into which the compiler does not look: it would compile for its very numbers."""

    def __init__(self, mapping: Mapping[str, Any]):
        self._mapping = mapping

    def __getitem__(self, key: str) -> Any:
        return self._mapping[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)


def take_over_compilation(args: Any, accelerator: Accelerator) -> tuple[str, str | None] | None:
    """Backend and mode with which a run is compiled, which accelerate then does not; None for none.

    Args:
        args: the settings; without ``torch_compile`` there, those of ``accelerate launch`` count.
    """
    plugin = accelerator.state.dynamo_plugin
    asked = plugin.backend != DynamoBackend.NO
    backend, mode = plugin.backend.value.lower(), plugin.mode
    plugin.backend = DynamoBackend.NO
    if args.torch_compile:
        return args.torch_compile_backend, args.torch_compile_mode
    return (backend, mode) if asked else None


def compile_backbone(model: nn.Module, settings: tuple[str, str | None] | None) -> None:
    """Have head tasks of a model run on a compiled backbone; with None no longer."""
    core = causal_lm(model)
    if settings is None:
        vars(core).pop(BACKBONE_CALL, None)
        return
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(attention_forward))
    vars(core)[BACKBONE_CALL] = CompiledBackbone(*settings)
