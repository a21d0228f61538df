"""From checked pairs or examples to token ids, in TRL 1.16's conventions, so that losses compare.

Examples are prompts with one completion, see :mod:`fastdaa.data.examples`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastdaa.counted import counted
from fastdaa.data.bad_rows import OnBadRow, handle_bad_row
from fastdaa.data.columns import TokenColumns
from fastdaa.data.encode import Row, encode
from fastdaa.data.errors import BadRow, DataError
from fastdaa.data.examples import checked_examples
from fastdaa.data.fields import (
    ADVANTAGE_FIELDS,
    LABEL_FIELD,
    SEQUENCE_FIELDS,
    SKIP_FIELDS,
    SOURCE_FIELD,
    TOKEN_FIELDS,
)
from fastdaa.data.kinds import CheckedRow
from fastdaa.data.pairs import checked_pairs
from fastdaa.data.readers import Place, Records
from fastdaa.data.reports import SkipReport, TokenizeReport, percentiles
from fastdaa.data.sources import rows_of
from fastdaa.data.truncation import TruncationMode, cut
from fastdaa.data.turns import ANSWERING
from fastdaa.data.unpaired import checked_unpaired
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
    run = _Run("pair", TOKEN_FIELDS, max_length, truncation_mode, num_proc, on_bad_row)
    if not len(dataset):
        raise DataError("dataset: expected at least one pair, got none")
    repeats: list[Place] = []
    checked = checked_pairs(run.noting_sources(dataset), on_bad_row, run.skips)
    checked = _noting_repeats(checked, repeats)
    skip_fields = SKIP_FIELDS if truncation_mode == "keep_end" else ()
    tokens = run.tokenize(dataset, checked, tokenizer, skip_fields)
    if run.report.shortened_prompts:
        logger.warning(
            "In %d of %s the prompt, tokenised alone, is not how prompt and completion "
            "begin (the chat template renders it differently, or tokens merge across the "
            "boundary): the completion begins where they diverge.",
            run.report.shortened_prompts,
            counted(run.report.kept, "pair"),
        )
    if repeats:
        logger.warning(
            "In %d of %s both answers begin with the prompt once more (the first: %s), and it is "
            "learnt with them. Where the answers hold the prompt, the data need no column of it.",
            len(repeats), counted(len(dataset), "pair"), repeats[0],
        )  # fmt: skip
    return tokens, run.report


def _noting_repeats(rows: Iterable[CheckedRow], repeats: list[Place]) -> Iterator[CheckedRow]:
    """The same pairs; the places of those whose answers hold the prompt, too, are noted."""
    for place, pair, extra in rows:
        prompt = pair["prompt"]
        sides = (pair["chosen"], pair["rejected"])
        if prompt and all(side[: len(prompt)] == prompt for side in sides):
            repeats.append(place)
        yield place, pair, extra


def _turns_of_others(completion: str | list[dict[str, Any]]) -> bool:
    """Whether others than the model speak in a completion, such as the user or a tool."""
    return not isinstance(completion, str) and any(
        turn["role"] not in ANSWERING for turn in completion
    )


def _each_answer(rows: Iterable[CheckedRow], report: TokenizeReport) -> Iterator[CheckedRow]:
    """An example for every answer of a conversation, in their order; further ones are counted."""
    for place, example, extra in rows:
        turns = example["prompt"]
        if isinstance(turns, str):
            yield place, example, extra
            continue
        turns = turns + example["completion"]
        ends = [end for end in range(1, len(turns)) if turns[end]["role"] in ANSWERING]
        report.pairs += len(ends) - 1
        for end in ends:
            answer = {"prompt": turns[:end], "completion": [turns[end]]}
            yield place, {**example, **answer}, extra


def tokenize_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
    every_answer: bool = False,
) -> tuple[Dataset, TokenizeReport]:
    """Tokenises prompts with their completions, as :func:`tokenize_pairs` does.

    Args:
        dataset: records of the forms of :mod:`fastdaa.data.examples`; every row is checked.
        tokenizer, max_length, truncation_mode, num_proc, on_bad_row: as there.
        every_answer: answers within a prompt become examples of their own, each with the turns
            before it.

    Returns:
        A dataset with ``prompt_ids`` and ``completion_ids`` (lists of int32), and the report.

    Raises:
        DataError: no chat template for conversations, no EOS token for text, a bad row, or none
            left.
        ValueError: an unknown mode, or a number below 1.
    """
    lengths = (max_length, truncation_mode, num_proc, on_bad_row)
    advice = ", but not with every_answer"
    run = _Run("example", SEQUENCE_FIELDS, *lengths, advice=advice)
    rows = checked_examples(run.noting_sources(dataset), on_bad_row, run.skips)
    if every_answer:
        rows = _each_answer(rows, run.report)
    return run.tokenize(dataset, rows, tokenizer), run.report


def tokenize_unpaired(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[Dataset, TokenizeReport]:
    """Tokenises prompts with labelled completions, as :func:`tokenize_pairs` does.

    Args:
        dataset: records of the forms of :mod:`fastdaa.data.unpaired`; every row is checked.
        tokenizer, max_length, truncation_mode, num_proc, on_bad_row: as there.

    Returns:
        A dataset with ``prompt_ids`` and ``completion_ids`` (lists of int32) and ``label`` (bool),
        and the report.

    Raises:
        DataError: no chat template for conversations, no EOS token for text, a bad row, or none
            left.
        ValueError: an unknown mode, or a number below 1.
    """
    lengths = (max_length, truncation_mode, num_proc, on_bad_row)
    run = _Run("example", SEQUENCE_FIELDS, *lengths, labelled=True)
    rows = checked_unpaired(run.noting_sources(dataset), on_bad_row, run.skips)
    return run.tokenize(dataset, rows, tokenizer), run.report


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, prompt: object, dataset: Dataset, *, needs_eos: bool = True
) -> None:
    """Raise ``DataError`` if the tokenizer lacks what a dataset with this prompt needs.

    Args:
        prompt: text, or the messages of a conversation.
        needs_eos: completions of text are tokenised, which end with EOS.
    """
    if isinstance(prompt, str) and needs_eos and tokenizer.eos_token is None:
        raise DataError(
            "tokenizer: expected an EOS token, which ends every completion of plain text, "
            "got none; set tokenizer.eos_token"
        )
    brings_template = "chat_template_kwargs" in dataset.column_names
    if isinstance(prompt, list) and tokenizer.chat_template is None and not brings_template:
        raise DataError(
            "tokenizer: expected a chat template, since the data are conversations, got none; "
            "set tokenizer.chat_template (a base model has none) or use plain text"
        )


@dataclass
class _Run:
    """The tokenisation of one dataset, and what is counted meanwhile."""

    unit: str
    """What a row is."""
    fields: tuple[str, ...]
    """Columns of token ids: of the prompt, and of each completion."""
    max_length: int | None
    truncation_mode: TruncationMode
    num_proc: int | None
    on_bad_row: OnBadRow
    labelled: bool = False
    """Rows have labels, which are kept."""
    advice: str = ""
    """What can be done about turns of others in completions."""
    report: TokenizeReport = field(default_factory=TokenizeReport)
    skips: SkipReport = field(default_factory=SkipReport)
    advantages: dict[Place, tuple[float, ...]] = field(default_factory=dict)
    """Of the rows that are being tokenised, if they have any."""
    labels: dict[Place, bool] = field(default_factory=dict)
    """The same, where rows are ``labelled``."""
    sources: dict[Place, str] = field(default_factory=dict)
    """The same, of the rows of a mixture."""
    talks: list[Place] = field(default_factory=list)
    """Of rows whose completions hold turns of others than the model."""

    def __post_init__(self) -> None:
        check_choice("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        check_choice("on_bad_row", self.on_bad_row, ("error", "skip"))
        check_positive("max_length", self.max_length)
        check_positive("num_proc", self.num_proc)
        self.report.unit = self.unit

    def noting_sources(self, dataset: Dataset) -> Records:
        """The rows of ``dataset``; the sources of those of a mixture are put under their places."""
        for place, row in rows_of(dataset, "dataset"):
            source = row.pop(SOURCE_FIELD, None)
            if source is not None:
                self.sources[place] = source
                self.report.sources.setdefault(source, [0, 0])[0] += 1
            yield place, row

    def _noting_numbers(self, rows: Iterable[CheckedRow]) -> Iterator[tuple[Place, Row]]:
        """The same rows; their labels and advantages, if any, are put under their places."""
        for place, row, extra in rows:
            if self.labelled:
                self.labels[place] = extra[LABEL_FIELD]
            if any(_turns_of_others(row[name.removesuffix("_ids")]) for name in self.fields[1:]):
                self.talks.append(place)
            numbers: list[Any] = [extra.get(name) for name in ADVANTAGE_FIELDS]
            if any(number is not None for number in numbers):
                if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                    raise DataError(
                        f"{place}: expected {ADVANTAGE_FIELDS} to be two finite numbers, got "
                        f"{numbers}"
                    )
                self.advantages[place] = tuple(float(n) for n in numbers)
            yield place, row

    def tokenize(
        self,
        dataset: Dataset,
        rows: Iterable[CheckedRow],
        tokenizer: PreTrainedTokenizerBase,
        skip_fields: tuple[str, ...] = (),
    ) -> Dataset:
        """The token ids of the good ``rows`` of ``dataset``; what happened is in the report."""
        self.report.pairs = len(dataset)
        columns = TokenColumns(self.fields, skip_fields)
        completions = [name.removesuffix("_ids") for name in self.fields[1:]]
        beginning, begun_twice = [tokenizer.bos_token_id] * 2, 0
        checked = _with_tokenizer_checked(self._noting_numbers(rows), tokenizer, dataset)
        for place, encoded in encode(checked, tokenizer, completions, self.num_proc or 1):
            advantages, source = self.advantages.pop(place, ()), self.sources.pop(place, None)
            label = self.labels.pop(place, None)
            if isinstance(encoded, BadRow):
                handle_bad_row(place, encoded, self.on_bad_row, self.skips)
                continue
            kept = cut(encoded, self.max_length, self.truncation_mode)
            if isinstance(kept, str):
                self.report.drop(kept)
                continue
            columns.add(kept.ids, kept.skips, advantages, label)
            if source is not None:
                self.report.sources[source][1] += 1
            begun_twice += (kept.ids[0] or kept.ids[1])[:2] == beginning
            self.report.truncated += kept.truncated
            self.report.identical += len(kept.ids) > 2 and kept.ids[1] == kept.ids[2]
            self.report.shortened_prompts += encoded.shortened
        self._count(columns)
        if begun_twice:
            logger.warning(
                "In %d of %s the text begins with %r, which the tokenizer adds once more; leave it "
                "out of the data", begun_twice, counted(self.report.kept, self.unit),
                tokenizer.bos_token,
            )  # fmt: skip
        if self.talks:
            logger.warning(
                "In %d of %s an answer holds turns of others than the model (the first: %s), such "
                "as the user or a tool; their words count as the model's%s",
                len(self.talks), counted(self.report.pairs, self.unit), self.talks[0], self.advice,
            )  # fmt: skip
        return columns.to_dataset()

    def _count(self, columns: TokenColumns) -> None:
        report = self.report
        report.dropped.update(self.skips.skipped)
        report.first.update(self.skips.first)
        prompts, *completions = columns.lengths
        report.kept = len(prompts)
        report.prompt_tokens = percentiles(prompts)
        report.completion_tokens = percentiles(size for side in completions for size in side)
        report.total_tokens = sum(map(sum, columns.lengths))
        if not report.kept:
            summary = str(report).splitlines()[0]
            raise DataError(f"dataset: expected at least one {self.unit}, got none ({summary})")


def _with_tokenizer_checked(
    rows: Iterable[tuple[Place, Row]], tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> Iterator[tuple[Place, Row]]:
    """The same rows, which are all of the first one's kind."""
    for number, (place, row) in enumerate(rows):
        if number == 0:
            check_tokenizer(tokenizer, row["prompt"], dataset)
        yield place, row
