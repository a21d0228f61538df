"""Prompts, and prompts with their completions, to token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.data.encode import Ids, _apply_template, encode_pairs
from fastdaa.data.examples import checked_examples
from fastdaa.data.readers import Place
from fastdaa.data.reports import SkipReport, TokenizeReport, percentiles
from fastdaa.data.sources import OnBadRow, handle_bad_row, rows_of
from fastdaa.data.tokenise import NO_COMPLETION, PROMPT_TOO_LONG, TruncationMode
from fastdaa.data.validate import BadRow, DataError
from fastdaa.validation import check_choice, check_positive

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

SEQUENCE_FIELDS = ("prompt_ids", "completion_ids")


class TokenizedPrompt(NamedTuple):
    """A prompt that a policy can be asked."""

    ids: Ids
    """Its tokens, ending where an answer begins."""
    text: str | list[dict[str, Any]]
    """As in the data: text, or the messages of a conversation."""


def tokenize_examples(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = 1024,
    truncation_mode: TruncationMode = "keep_start",
    num_proc: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[Dataset, TokenizeReport]:
    """Tokenises prompts with their completions, as :func:`fastdaa.data.tokenize_pairs` does.

    Args:
        dataset: records of the forms of :mod:`fastdaa.data.examples`; every row is checked.
        tokenizer, max_length, truncation_mode, num_proc, on_bad_row: as there.

    Returns:
        A dataset with ``prompt_ids`` and ``completion_ids`` (lists of int32), and the report.

    Raises:
        DataError: no chat template for conversations, no EOS token for text, a bad row, or none
            left.
        ValueError: an unknown mode, or a number below 1.
    """
    check_choice("truncation_mode", truncation_mode, ("keep_start", "keep_end"))
    check_choice("on_bad_row", on_bad_row, ("error", "skip"))
    check_positive("max_length", max_length)
    check_positive("num_proc", num_proc)
    report, skips = TokenizeReport(pairs=len(dataset)), SkipReport()
    columns: dict[str, list[Ids]] = {field: [] for field in SEQUENCE_FIELDS}
    for place, encoded in encode_pairs(
        _as_pairs(dataset, tokenizer, on_bad_row, skips), tokenizer, num_proc or 1
    ):
        if isinstance(encoded, BadRow):
            handle_bad_row(place, encoded, on_bad_row, skips)
            continue
        cut = _cut(encoded.prompt, encoded.chosen, max_length, truncation_mode)
        if isinstance(cut, str):
            report.drop(cut)
            continue
        whole = len(encoded.prompt) + len(encoded.chosen)
        report.truncated += sum(map(len, cut)) < whole
        report.shortened_prompts += encoded.shortened
        for field, ids in zip(SEQUENCE_FIELDS, cut, strict=True):
            columns[field].append(ids)
    report.dropped.update(skips.skipped)
    report.first.update(skips.first)
    prompts, completions = ([len(ids) for ids in columns[field]] for field in SEQUENCE_FIELDS)
    report.kept = len(prompts)
    report.prompt_tokens, report.completion_tokens = percentiles(prompts), percentiles(completions)
    report.total_tokens = sum(prompts) + sum(completions)
    if not report.kept:
        summary = str(report).splitlines()[0]
        raise DataError(f"dataset: expected at least one example to train on, got none ({summary})")
    return _token_dataset(columns), report


def tokenize_prompts(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> tuple[list[TokenizedPrompt], Counter[str]]:
    """Tokenises prompts as they are at the moment when an answer is asked for.

    Args:
        dataset: records with prompts, see :func:`fastdaa.data.examples.load_examples`.
        tokenizer: the policy's.
        max_length: prompts of more tokens are left out and counted.

    Returns:
        The prompts, and how many were left out, by reason.

    Raises:
        DataError: no chat template for conversations, a bad row, or no prompt left.
    """
    skips = SkipReport()
    prompts: list[TokenizedPrompt] = []
    for place, example in checked_examples(rows_of(dataset, "dataset"), on_bad_row, skips, True):
        _check_tokenizer(example["prompt"], tokenizer, needs_eos=False)
        try:
            ids = _prompt_ids(example, tokenizer)
        except Exception as error:
            # A template can fail in any way: it is a program.
            what = f"expected a prompt that the chat template accepts, got {error}"
            handle_bad_row(place, BadRow("chat template failed", what), on_bad_row, skips)
            continue
        if max_length is not None and len(ids) > max_length:
            skips.skip(f"prompts of more than {max_length} tokens", place)
        elif not ids:
            skips.skip("prompts without a token", place)
        else:
            prompts.append(TokenizedPrompt(ids, example["prompt"]))
    skips.kept = len(prompts)
    if not prompts:
        raise DataError(f"dataset: expected at least one prompt, got none ({skips})")
    return prompts, skips.skipped


def _as_pairs(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    on_bad_row: OnBadRow,
    skips: SkipReport,
) -> Iterator[tuple[Place, dict[str, Any], None]]:
    """Examples as the encoder of pairs takes them: both sides are the completion."""
    for place, example in checked_examples(rows_of(dataset, "dataset"), on_bad_row, skips, False):
        _check_tokenizer(example["prompt"], tokenizer, needs_eos=True)
        side = example.pop("completion")
        yield place, {**example, "chosen": side, "rejected": side}, None


def _check_tokenizer(
    prompt: str | list[Any], tokenizer: PreTrainedTokenizerBase, needs_eos: bool
) -> None:
    if isinstance(prompt, list) and tokenizer.chat_template is None:
        raise DataError(
            "tokenizer: expected a chat template, since the data are conversations, got none"
        )
    if isinstance(prompt, str) and needs_eos and tokenizer.eos_token is None:
        raise DataError("tokenizer: expected an EOS token to end completions with, got none")


def _prompt_ids(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Ids:
    prompt = example["prompt"]
    if isinstance(prompt, str):
        ids: Ids = tokenizer(prompt, return_attention_mask=False, verbose=False)["input_ids"]
        return ids
    options = dict(example.get("chat_template_kwargs") or {})
    tools = example.get("tools")
    options.setdefault("tools", json.loads(tools) if tools else None)
    return _apply_template(tokenizer, [prompt], add_generation_prompt=True, **options)[0]


def _cut(
    prompt: Ids, completion: Ids, max_length: int | None, mode: TruncationMode
) -> tuple[Ids, Ids] | str:
    """Prompt and completion within ``max_length``, or the reason to drop them."""
    if max_length is not None and mode == "keep_start" and len(prompt) >= max_length:
        return PROMPT_TOO_LONG
    if not completion:
        return NO_COMPLETION
    if max_length is None:
        return prompt, completion
    if mode == "keep_start":
        return prompt, completion[: max_length - len(prompt)]
    over = max(0, len(prompt) + len(completion) - max_length)
    unseen = min(len(prompt), over)
    return prompt[unseen:], completion[over - unseen :]


def _token_dataset(columns: dict[str, list[Ids]]) -> Dataset:
    import datasets

    ids = datasets.List(datasets.Value("int32"))
    features = datasets.Features(dict.fromkeys(SEQUENCE_FIELDS, ids))
    return datasets.Dataset.from_dict(columns, features=features)
