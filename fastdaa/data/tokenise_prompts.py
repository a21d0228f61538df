"""Prompts to token ids, as they are when an answer is asked for."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.counted import counted
from fastdaa.data.bad_rows import OnBadRow, handle_bad_row
from fastdaa.data.encode import Ids, encode_prompt
from fastdaa.data.errors import BadRow, DataError
from fastdaa.data.examples import checked_examples
from fastdaa.data.reports import SkipReport
from fastdaa.data.sources import rows_of
from fastdaa.data.tokenise import check_tokenizer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


class TokenizedPrompt(NamedTuple):
    """A prompt that a policy can be asked."""

    ids: Ids
    """Its tokens, ending where an answer begins."""
    text: str | list[dict[str, Any]]
    """As in the data: text, or the messages of a conversation."""


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[TokenizedPrompt], Counter[str]]:
    """Tokenises prompts as they are at the moment when an answer is asked for.

    Args:
        dataset: records with prompts, see :mod:`fastdaa.data.examples`.
        tokenizer: the policy's.
        max_length: prompts of more tokens are left out and counted.

    Returns:
        The prompts, and how many were left out, by reason.

    Raises:
        DataError: no chat template for conversations, a bad row, or no prompt left.
    """
    skips = SkipReport()
    prompts: list[TokenizedPrompt] = []
    rows = rows_of(dataset, "dataset")
    for place, example, _ in checked_examples(rows, on_bad_row, skips, prompts_only=True):
        check_tokenizer(tokenizer, example["prompt"], dataset, needs_eos=False)
        try:
            ids = encode_prompt(example, tokenizer)
        except Exception as error:
            # A template can fail in any way: it is a program.
            what = f"expected a prompt that the chat template accepts, got {error}"
            handle_bad_row(place, BadRow("chat template failed", what), on_bad_row, skips)
            continue
        if max_length is not None and len(ids) > max_length:
            skips.skip(f"prompts of more than {counted(max_length, 'token')}", place)
        elif not ids:
            skips.skip("prompts without a token", place)
        else:
            prompts.append(TokenizedPrompt(ids, example["prompt"]))
    skips.kept = len(prompts)
    if not prompts:
        raise DataError(f"dataset: expected at least one prompt, got none ({skips})")
    return prompts, skips.skipped
