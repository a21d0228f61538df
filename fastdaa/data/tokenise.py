"""From checked pairs to token ids, in TRL 1.16's conventions, so that losses compare."""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from fastdaa.data.collate import ADVANTAGE_FIELDS, SKIP_FIELDS, TOKEN_FIELDS
from fastdaa.data.encode import Checked, Ids, TokenizedPair, encode_pairs
from fastdaa.data.reports import SkipReport, TokenizeReport, percentiles
from fastdaa.data.sources import OnBadRow, check_records, handle_bad_row, rows_of
from fastdaa.data.validate import BadRow, DataError
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
TruncationMode = Literal["keep_start", "keep_end"]
PROMPT_TOO_LONG = "prompts of max_length tokens or more"
NO_COMPLETION = "completions without a token of their own"


class CutPair(NamedTuple):
    """A :class:`TokenizedPair` within ``max_length``, as rows of the dataset."""

    ids: tuple[Ids, Ids, Ids]
    skips: tuple[int, int]
    """Leading prompt tokens that the chosen and the rejected completion do not see."""
    truncated: int
    """Sequences that lost a token: 0, 1 or 2."""


def tokenize_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[Dataset, TokenizeReport]:
    """Tokenises preference pairs as TRL 1.16's ``DPOTrainer`` does.

    Prompt and completion are tokenised together, the prompt with the generation prompt of the
    chat template; a completion begins where either joint sequence leaves the tokenised prompt.
    Plain text gets the EOS token unless it ends with it; conversations get what the template
    writes.

    Args:
        dataset: pairs as :func:`fastdaa.data.load_pairs` returns them, or any dataset with such
            columns; every row is checked.
        tokenizer: the model's tokenizer. Fast tokenizers use all cores already.
        max_length: longest sequence of prompt and completion, in tokens; ``None`` for no limit.
        truncation_mode: ``"keep_start"`` keeps the first tokens of every sequence and drops pairs
            whose prompt alone fills it; ``"keep_end"`` keeps the last.
        num_proc: processes; 2 or more pay off for slow chat templates. A script that asks for
            them needs the ``if __name__ == "__main__":`` guard.
        on_bad_row: ``"error"`` stops at the first row that cannot be used, ``"skip"`` counts them.

    Returns:
        A dataset in memory (nothing is written to disk) with the columns ``prompt_ids``,
        ``chosen_ids`` and ``rejected_ids`` (lists of int32), and with ``keep_end`` also
        ``chosen_skip`` and ``rejected_skip`` (see :class:`~fastdaa.data.PairCollator`), and
        ``chosen_advantage`` and ``rejected_advantage`` if the pairs have them; and the report.

    Raises:
        DataError: no chat template for conversations, no EOS token for text, a bad row, or no
            pair left.
        ValueError: an unknown mode, or a number below 1.
    """
    check_choice("truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    check_choice("on_bad_row", on_bad_row, ("error", "skip"))
    check_positive("max_length", max_length)
    check_positive("num_proc", num_proc)
    _check_tokenizer(dataset, tokenizer)
    report = TokenizeReport(pairs=len(dataset))
    skips = SkipReport()
    checked = check_records(rows_of(dataset, "dataset"), on_bad_row, skips)
    columns = _Columns(keep_end=truncation_mode == "keep_end")
    advantages: dict[str, tuple[float, ...]] = {}
    checked = _remember_advantages(checked, advantages)
    for place, encoded in encode_pairs(checked, tokenizer, num_proc or 1):
        numbers = advantages.pop(place, ())
        if isinstance(encoded, BadRow):
            handle_bad_row(place, encoded, on_bad_row, skips)
            continue
        cut = _cut(encoded, max_length, truncation_mode)
        if isinstance(cut, str):
            report.drop(cut)
            continue
        columns.add(cut.ids, cut.skips, numbers)
        report.truncated += cut.truncated
        report.identical += cut.ids[1] == cut.ids[2]
        report.shortened_prompts += encoded.shortened
    return _finish(columns, report, skips)


def _remember_advantages(
    checked: Iterator[Checked], advantages: dict[str, tuple[float, ...]]
) -> Iterator[Checked]:
    """The same rows; their advantages, if they have any, are put under their places."""
    for place, pair, extra in checked:
        numbers = [extra.get(field) for field in ADVANTAGE_FIELDS]
        if any(number is not None for number in numbers):
            if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                raise DataError(
                    f"{place}: expected {ADVANTAGE_FIELDS} to be two finite numbers, got {numbers}"
                )
            advantages[place] = tuple(float(n) for n in numbers)
        yield place, pair, extra


def _finish(
    columns: _Columns, report: TokenizeReport, skips: SkipReport
) -> tuple[Dataset, TokenizeReport]:
    report.dropped.update(skips.skipped)
    report.first.update(skips.first)
    prompt, chosen, rejected = columns.lengths
    report.kept = len(prompt)
    report.prompt_tokens = percentiles(prompt)
    report.completion_tokens = percentiles([*chosen, *rejected])
    report.total_tokens = sum(prompt) + sum(chosen) + sum(rejected)
    if not report.kept:
        summary = str(report).splitlines()[0]
        raise DataError(f"dataset: expected at least one pair to train on, got none ({summary})")
    if report.shortened_prompts:
        logger.warning(
            "In %d of %d pairs the prompt, tokenised alone, is not how prompt and completion "
            "begin (the chat template renders it differently, or tokens merge across the "
            "boundary): the completion begins where they diverge.",
            report.shortened_prompts,
            report.kept,
        )
    return columns.to_dataset(), report


def _cut(pair: TokenizedPair, max_length: int | None, mode: TruncationMode) -> CutPair | str:
    """The pair within ``max_length``, or the reason to drop it."""
    prompt, chosen, rejected, _ = pair
    if max_length is not None and mode == "keep_start" and len(prompt) >= max_length:
        return PROMPT_TOO_LONG
    if not chosen or not rejected:
        return NO_COMPLETION
    if max_length is None:
        return CutPair((prompt, chosen, rejected), (0, 0), 0)
    over = [max(0, len(prompt) + len(side) - max_length) for side in (chosen, rejected)]
    truncated = sum(map(bool, over))
    if mode == "keep_start":
        room = max_length - len(prompt)
        return CutPair((prompt, chosen[:room], rejected[:room]), (0, 0), truncated)
    unseen = [min(len(prompt), tokens) for tokens in over]
    shared = min(unseen)
    chosen, rejected = chosen[over[0] - unseen[0] :], rejected[over[1] - unseen[1] :]
    skips = (unseen[0] - shared, unseen[1] - shared)
    return CutPair((prompt[shared:], chosen, rejected), skips, truncated)


class _Columns:
    """The columns of the tokenised dataset while they grow."""

    def __init__(self, keep_end: bool) -> None:
        self.keep_end = keep_end
        self.tokens = [array("i") for _ in TOKEN_FIELDS]
        self.lengths: list[list[int]] = [[] for _ in TOKEN_FIELDS]
        self.skips = [array("i") for _ in SKIP_FIELDS]
        self.advantages = [array("d") for _ in ADVANTAGE_FIELDS]

    def add(
        self, ids: Sequence[Ids], skips: tuple[int, int], advantages: tuple[float, ...]
    ) -> None:
        for tokens, lengths, side in zip(self.tokens, self.lengths, ids, strict=True):
            tokens.extend(side)
            lengths.append(len(side))
        for column, skip in zip(self.skips, skips, strict=True):
            column.append(skip)
        # Nothing where a row has none; `to_dataset` sees whether all rows had them.
        for numbers, number in zip(self.advantages, advantages, strict=False):
            numbers.append(number)

    def to_dataset(self) -> Dataset:
        import datasets
        import pyarrow

        table: dict[str, Any] = {}
        for field, tokens, lengths in zip(TOKEN_FIELDS, self.tokens, self.lengths, strict=True):
            ends = np.concatenate([[0], np.cumsum(lengths)])
            values = pyarrow.array(np.asarray(tokens))
            table[field] = _list_chunks(ends, values)
        if self.keep_end:
            for field, skips in zip(SKIP_FIELDS, self.skips, strict=True):
                table[field] = pyarrow.array(np.asarray(skips))
        given = len(self.advantages[0])
        if given not in (0, len(self.lengths[0])):
            raise DataError(
                f"dataset: expected {ADVANTAGE_FIELDS} in all rows or in none, got them in {given} "
                f"of {len(self.lengths[0])}"
            )
        if given:
            for field, numbers in zip(ADVANTAGE_FIELDS, self.advantages, strict=True):
                table[field] = pyarrow.array(np.asarray(numbers))
        return datasets.Dataset(datasets.table.InMemoryTable(pyarrow.table(table)))


def _list_chunks(ends: np.ndarray, values: Any, limit: int = 2**30) -> Any:
    """Lists of ``values`` in chunks that 32-bit offsets can address."""
    import pyarrow

    chunks, start = [], 0
    while start < len(ends) - 1:
        stop = max(int(np.searchsorted(ends, ends[start] + limit, side="right")) - 1, start + 1)
        offsets = pyarrow.array((ends[start : stop + 1] - ends[start]).astype(np.int32))
        part = values.slice(int(ends[start]), int(ends[stop] - ends[start]))
        chunks.append(pyarrow.ListArray.from_arrays(offsets, part))
        start = stop
    return pyarrow.chunked_array(chunks)


def _check_tokenizer(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    if not len(dataset):
        raise DataError("dataset: expected at least one pair, got none")
    chosen = dataset[0].get("chosen")
    if isinstance(chosen, str) and tokenizer.eos_token is None:
        raise DataError(
            "tokenizer: expected an EOS token, which ends every completion of plain text, "
            "got none; set tokenizer.eos_token"
        )
    brings_template = "chat_template_kwargs" in dataset.column_names
    if isinstance(chosen, list) and tokenizer.chat_template is None and not brings_template:
        raise DataError(
            "tokenizer: expected a chat template, since the pairs are conversations, got none; "
            "set tokenizer.chat_template (a base model has none) or use pairs of plain text"
        )
