"""What a model and its reference must be like for their numbers on the same pairs to mean much."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig

from fastdaa.data.fields import TOKEN_FIELDS
from fastdaa.train.finite import all_finite
from fastdaa.train.quantization import quantization_of, stored_quantization
from fastdaa.train.run_record import read_record

logger = logging.getLogger(__name__)
_ROWS_AT_ONCE = 4096
_OTHER_HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
_SHOWN = 3


def check_head(name: str, source: str, **options: Any) -> None:
    """Raise ``ValueError`` for a model without an LM head: loading would make a random one.

    Args:
        name: of the option.
        source: a whole model: a folder or hub id, of which only the configuration is read.
        options: of ``from_pretrained``, such as ``revision``.
    """
    config, _ = PretrainedConfig.get_config_dict(source, **options)
    stored = config.get("architectures") or []
    other = [kind for kind in stored if any(head in kind for head in _OTHER_HEADS)]
    if other:
        raise ValueError(f"{name}: expected a causal language model, {source} is a {other[0]}")


def check_stored(name: str, source: str, asked: str | None, **options: Any) -> None:
    """Raise ``ValueError`` for a whole model of few bits, of which only the configuration is read.

    Args:
        name: of the option.
        source: a whole model: a folder or hub id.
        asked: the option that quantises it.
        options: of ``from_pretrained``, such as ``revision``.
    """
    stored = stored_quantization(source, **options)
    if asked is not None or stored is not None:
        what = f"{source} ({stored})" if stored else f"{source} with {asked}"
        raise ValueError(
            f"{name}: expected an adapter on a quantised base, or a model that is not quantised, "
            f"got {what}; transformers' Trainer takes no quantised model alone"
        )


def check_finite(name: str, model: nn.Module) -> None:
    """Raise ``ValueError`` for a model whose weights are not finite.

    Args:
        name: of the option, for the message.
        model: as it was loaded.
    """
    if not all_finite(model):
        raise ValueError(
            f"{name}: expected finite weights, got some that are infinite or not a number"
        )


def warn_of_quantization(model: nn.Module, adapter: str) -> None:
    """Say where an adapter is measured on another base than it was trained on."""
    run = read_record(adapter)
    if run is None:
        return
    before, now = run.facts.get("quantization"), quantization_of(model)
    if before != now:
        logger.warning(
            "model: the adapter %s was trained on a base that was %s, and is measured on one that "
            "is %s; --load_in_4bit and its like quantise it",
            adapter, before or "not quantised", now or "not quantised",
        )  # fmt: skip


def tokens_in(dataset: Any, fields: Sequence[str] = TOKEN_FIELDS) -> np.ndarray:
    """The token ids that occur in columns of tokenised data, ``[ids]`` int64, ascending."""
    import pyarrow.compute

    found = [np.empty(0, dtype=np.int64)]
    for table in dataset.with_format("arrow", columns=list(fields)).iter(_ROWS_AT_ONCE):
        for field in fields:
            ids = pyarrow.compute.unique(pyarrow.compute.list_flatten(table[field]))
            found.append(ids.to_numpy(zero_copy_only=False).astype(np.int64))
        found = [np.unique(np.concatenate(found))]
    return found[0]


def check_same_tokens(ids: np.ndarray, tokenizer: Any, ref_tokenizer: Any, ref_rows: int) -> None:
    """Raise ``ValueError`` where a reference would read other tokens in the same pairs.

    Special tokens may have other names: fine-tuning often renames some that were not used.

    Args:
        ids: that occur in the pairs, ``[ids]`` int64.
        tokenizer: of the model.
        ref_tokenizer: of the reference, if it has one.
        ref_rows: of the reference's embedding.
    """
    if len(ids) and ids[-1] >= ref_rows:
        raise ValueError(
            f"ref_model: expected token ids below {ref_rows}, the rows of its embedding, got "
            f"{ids[-1]} in the pairs; model and reference have different vocabularies"
        )
    if ref_tokenizer is None:
        return
    names, ref_names = (
        {index: token for token, index in known.get_vocab().items()}
        for known in (tokenizer, ref_tokenizer)
    )
    special = tokenizer.added_tokens_decoder.keys() | ref_tokenizer.added_tokens_decoder.keys()
    both = names.keys() & ref_names.keys() - special
    other = [i for i in ids.tolist() if i in both and names[i] != ref_names[i]]
    if other:
        first = ", ".join(f"{i} is {names[i]!r}, not {ref_names[i]!r}" for i in other[:_SHOWN])
        raise ValueError(
            f"ref_model: expected a tokenizer with the tokens of the model's, got other ones "
            f"for {len(other)} of the {len(ids)} in the pairs ({first}); its log-probs would be of "
            "another text"
        )
