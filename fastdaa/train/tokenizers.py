"""The tokenizer that belongs to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdaa.train.adapter_files import tokenizer_source
from fastdaa.train.prepare import each

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(source: str, name: str = "model", **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or of the base of an adapter that has none of its own.

    Args:
        source: folder or hub id of the model.
        name: of the option that names it.
        options: passed on to ``AutoTokenizer.from_pretrained``.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        source = tokenizer_source(source)
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        raise OSError(f"{name}: expected a tokenizer in {source!r}, got: {error}") from error
    return tokenizer


def tokenizer_for(given: Any, model: Any, *datasets: Any) -> Any:
    """The tokenizer that was given, or that of a model given by name, where data are text.

    Args:
        model: as the trainers take it.
        datasets: checked ones, dictionaries of them, or None.

    Raises:
        OSError: the model has none.
    """
    if given is not None or not isinstance(model, str):
        return given
    text: list[str] = []

    def look(dataset: Any, name: str) -> None:
        if "prompt_ids" not in dataset.column_names:
            text.append(name)

    for dataset in datasets:
        each(dataset, look, "dataset")
    return load_tokenizer(model) if text else None
