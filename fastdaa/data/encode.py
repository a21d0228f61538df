"""Text and conversations to token ids: chunks of rows, in one or several processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.data.errors import BadRow
from fastdaa.data.validate import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Row = Mapping[str, Any]
"""``prompt`` and completions, all text or all lists of messages; in conversations also ``tools``
(JSON text) and ``chat_template_kwargs``, where there are some."""
Encoded = tuple[str, "Tokenized | BadRow"]
_CHUNK = 256
_worker_tokenizer: PreTrainedTokenizerBase | None = None


class Tokenized(NamedTuple):
    """Token ids of one row: the prompt that all completions share, and the completions."""

    prompt: Ids
    completions: tuple[Ids, ...]
    shortened: bool = False
    """Whether the end of the prompt, tokenised alone, is not part of the sequences."""


def encode(
    rows: Iterable[tuple[str, Row]],
    tokenizer: PreTrainedTokenizerBase,
    fields: Sequence[str],
    num_proc: int = 1,
) -> Iterator[Encoded]:
    """Tokenises rows in their order; one that the chat template refuses comes as ``BadRow``.

    Args:
        rows: each with its place.
        fields: of the completions, in the order in which they come.
    """
    work = iter(rows)
    chunks = iter(lambda: list(islice(work, _CHUNK)), [])
    if num_proc == 1:
        for chunk in chunks:
            yield from _encode_chunk(chunk, tokenizer, fields)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, spawn, _start_worker, (tokenizer,)) as pool:
        # So many chunks at a time that nobody waits, and the rows are never all copied at once.
        while wave := list(islice(chunks, 8 * num_proc)):
            for encoded in pool.map(partial(_encode_in_worker, fields=fields), wave):
                yield from encoded


def encode_prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """The prompt of a row as it is when an answer is asked for; a chat template may raise."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        options = _template_options(row)
        return _apply_template(tokenizer, [prompt], add_generation_prompt=True, **options)[0]
    ids: Ids = tokenizer(prompt, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def split_sequences(prompt: Ids, *sequences: Ids) -> Tokenized:
    """Splits tokenised sequences where any of them leaves the tokenised prompt."""
    split = min(common_prefix(prompt, sequence) for sequence in sequences)
    completions = tuple(sequence[split:] for sequence in sequences)
    return Tokenized(prompt[:split], completions, split < len(prompt))


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker_tokenizer
    # The processes are the parallelism; threads of the tokenizer on top would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer


def _encode_in_worker(chunk: list[tuple[str, Row]], fields: Sequence[str]) -> list[Encoded]:
    assert _worker_tokenizer is not None
    return _encode_chunk(chunk, _worker_tokenizer, fields)


def _encode_chunk(
    chunk: list[tuple[str, Row]], tokenizer: PreTrainedTokenizerBase, fields: Sequence[str]
) -> list[Encoded]:
    places, rows = [place for place, _ in chunk], [row for _, row in chunk]
    encode_all = _encode_texts if isinstance(rows[0]["prompt"], str) else _encode_chats
    return list(zip(places, encode_all(rows, tokenizer, fields), strict=True))


def _encode_texts(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Sequence[str]
) -> Sequence[Tokenized]:
    eos = str(tokenizer.eos_token)
    texts = [row["prompt"] for row in rows]
    for field in fields:
        for row in rows:
            completion = row[field]
            ending = "" if completion.endswith(eos) else eos
            texts.append(row["prompt"] + completion + ending)
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return _split_all(ids, len(rows))


def _encode_chats(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Sequence[str]
) -> Sequence[Tokenized | BadRow]:
    """One call of the template for all rows with the same tools and options, in any order."""
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        key = json.dumps([row.get("tools"), row.get("chat_template_kwargs")], sort_keys=True)
        groups.setdefault(key, []).append(index)
    encoded: list[Tokenized | BadRow | None] = [None] * len(rows)
    for members in groups.values():
        results = _encode_like_chats([rows[index] for index in members], tokenizer, fields)
        for index, result in zip(members, results, strict=True):
            encoded[index] = result
    return [result for result in encoded if result is not None]


def _encode_like_chats(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, fields: Sequence[str]
) -> Sequence[Tokenized | BadRow]:
    options = _template_options(rows[0])
    prompts = [row["prompt"] for row in rows]
    whole = [row["prompt"] + row[field] for field in fields for row in rows]
    try:
        prompt_ids = _apply_template(tokenizer, prompts, add_generation_prompt=True, **options)
        ids = _apply_template(tokenizer, whole, **options)
    except Exception as error:
        # A template can fail in any way (it is a program); find the row that it fails on.
        if len(rows) == 1:
            what = f"{type(error).__name__}: {error}"
            problem = f"expected a conversation that the chat template accepts, got {what}"
            return [BadRow("chat template failed", problem)]
        return [_encode_like_chats([row], tokenizer, fields)[0] for row in rows]
    split = _split_all([*prompt_ids, *ids], len(rows))
    calling = [any(t.get("tool_calls") for field in fields for t in row[field]) for row in rows]
    # One is enough: some templates write the calls of a turn only where it has no content.
    with_calls = [row for row, calls in zip(rows, calling, strict=True) if calls]
    if not with_calls or any(_shows_calls(row, tokenizer, fields, options) for row in with_calls):
        return split
    problem = "expected a chat template with tool calls, got one that leaves those of an answer out"
    unseen = BadRow("tool calls left out", problem)
    return [unseen if calls else row for calls, row in zip(calling, split, strict=True)]


def _shows_calls(
    row: Row, tokenizer: PreTrainedTokenizerBase, fields: Sequence[str], options: Mapping[str, Any]
) -> bool:
    """Whether the template renders a row otherwise than without its tool calls."""
    whole = [row["prompt"] + row[field] for field in fields]
    bare = [
        [{"content": "", **{k: v for k, v in turn.items() if k != "tool_calls"}} for turn in turns]
        for turns in whole
    ]
    try:
        rendered = _apply_template(tokenizer, whole, **options)
        return rendered != _apply_template(tokenizer, bare, **options)
    except Exception:
        return True  # it misses them


def _split_all(ids: list[Ids], count: int) -> Sequence[Tokenized]:
    """``count`` prompts, followed by as many sequences for each field."""
    columns = [ids[start : start + count] for start in range(0, len(ids), count)]
    return list(map(split_sequences, *columns))


def _template_options(row: Row) -> dict[str, Any]:
    options = dict(row.get("chat_template_kwargs") or {})
    tools = row.get("tools")
    options.setdefault("tools", json.loads(tools) if tools else None)
    return options


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **options: Any
) -> list[Ids]:
    read = [list(map(_with_arguments, turns)) for turns in conversations]
    if read != conversations:
        # A template may take text alone.
        with contextlib.suppress(Exception):
            if not any(_is_written_raw(turns, tokenizer, options) for turns in read):
                return _render(tokenizer, read, **options)
    return _render(tokenizer, conversations, **options)


def _is_written_raw(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> bool:
    """Whether the template writes arguments of calls as Python does: ``{'city': ...``."""
    calls = [call for turn in turns for call in turn.get("tool_calls") or ()]
    objects = [call.get("function", call).get("arguments") for call in calls]
    written: Any = objects and tokenizer.apply_chat_template(turns, tokenize=False, **options)
    return any(isinstance(given, dict) and given and str(given) in written for given in objects)


def _with_arguments(turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have objects as arguments where they had JSON text, as OpenAI's have.

    Most chat templates write an object, and would write text once more as JSON.
    """
    if not turn.get("tool_calls"):
        return turn
    calls = []
    for call in turn["tool_calls"]:
        function: Any = call.get("function", call) if isinstance(call, Mapping) else {}
        with contextlib.suppress(TypeError, ValueError):
            arguments = json.loads(function.get("arguments"))
            if isinstance(arguments, dict):
                function = {**function, "arguments": arguments}
                call = {**call, "function": function} if "function" in call else function
        calls.append(call)
    return {**turn, "tool_calls": calls}


def _render(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **options: Any
) -> list[Ids]:
    if any(isinstance(turn.get("content"), list) for turns in conversations for turn in turns):
        conversations = [_readable(turns, tokenizer, options) for turns in conversations]
    quick = {"return_attention_mask": False, "verbose": False}
    rendered: Any = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, tokenizer_kwargs=quick, **options
    )
    return rendered["input_ids"]


def _readable(
    turns: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Blocks of text as one text, a line each, where the template knows no blocks.

    Such a template would write them as Python does: ``[{'type': 'text', 'text': ...``.
    """
    blocks = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    written: Any = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    if not any(str(content) in written for content in blocks):
        return turns
    return [
        {**turn, "content": "\n".join(block["text"] for block in turn["content"])}
        if isinstance(turn.get("content"), list)
        else turn
        for turn in turns
    ]
