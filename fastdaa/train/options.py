"""Options that several configurations have: their choices, help texts and checks, written once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from fastdaa.paths import PATHS
from fastdaa.train.segment_backends import BACKENDS
from fastdaa.validation import check_choice, shown

ATTENTION_CHOICES = ("auto", *BACKENDS)
# The path `score` gives no gradient, so nothing could be trained with it.
IMPL_CHOICES = tuple(path for path in PATHS if path != "score")
# `fused` gives no gradient either.
ENGINE_CHOICES = ("auto", "torch", "triton")


@dataclass
class PackOptions:
    """How packed rows are computed; see :class:`fastdaa.train.PreferenceConfig`."""

    attention: str = field(
        default="auto",
        metadata={"help": "Attention kernel for packed rows.", "choices": ATTENTION_CHOICES},
    )
    tokens_per_pack: int | None = field(
        default=None,
        metadata={"help": "Most tokens of one forward pass. Default: a whole batch at once."},
    )

    def check_packs(self) -> None:
        """Raise ``ValueError`` for a value of these that cannot be used."""
        check_choice("attention", self.attention, ATTENTION_CHOICES)
        check_count("tokens_per_pack", self.tokens_per_pack, optional=True)


@dataclass
class HeadOptions:
    """How the LM head is gone through; see :class:`fastdaa.train.PreferenceConfig`."""

    impl: str = field(
        default="auto",
        metadata={
            "help": "How the LM head is computed; auto: planned for the device.",
            "choices": IMPL_CHOICES,
        },
    )
    head_engine: str = field(
        default="auto",
        metadata={
            "help": "What computes tiles of logits: torch, or triton (kernels for CUDA); auto: "
            "triton on GPUs whose kernels agree with fp64, else torch.",
            "choices": ENGINE_CHOICES,
        },
    )
    head_max_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Bytes that the head may take beyond its inputs and gradients. Default: what "
            "the device has room for."
        },
    )

    def check_head(self) -> None:
        """Raise ``ValueError`` for a value of these that cannot be used."""
        check_choice("impl", self.impl, IMPL_CHOICES)
        check_choice("head_engine", self.head_engine, ENGINE_CHOICES)
        check_count("head_max_bytes", self.head_max_bytes, optional=True)


def check_count(name: str, value: object, *, optional: bool = False) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer above 0, or None where it is optional."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer above 0, got {shown(value)}")


def read_mapping(name: str, given: Any, what: str, example: str) -> dict[str, Any]:
    """A mapping from JSON text or a mapping; None is an empty one.

    Args:
        name: of the option.
        what: it maps, for the message.
        example: of the text.

    Raises:
        ValueError: text that is no JSON.
        TypeError: no mapping.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: expected a JSON object such as '{example}', got {shown(given)} ({error})"
            ) from error
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise TypeError(f"{name}: expected a mapping of {what}, got {shown(given)}")
    return given
