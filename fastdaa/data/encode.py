"""Text and conversations to token ids: chunks of pairs, in one or several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdaa.data.validate import BadRow, common_prefix, is_conversational

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
Checked = tuple[str, dict[str, Any], Any]
"""Place, normalised pair, and anything else, which is not looked at."""
Encoded = tuple[str, "TokenizedPair | BadRow"]
_CHUNK = 256
_worker_tokenizer: PreTrainedTokenizerBase | None = None


class TokenizedPair(NamedTuple):
    """Token ids of one pair: the prompt that both completions share, and the completions."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    shortened: bool = False
    """Whether the end of the prompt, tokenised alone, is not part of the sequences."""


def encode_pairs(
    pairs: Iterable[Checked], tokenizer: PreTrainedTokenizerBase, num_proc: int = 1
) -> Iterator[Encoded]:
    """Tokenises pairs in their order; a pair that the chat template refuses comes as ``BadRow``."""
    rows = ((place, pair) for place, pair, _ in pairs)
    chunks = iter(lambda: list(islice(rows, _CHUNK)), [])
    if num_proc == 1:
        for chunk in chunks:
            yield from _encode_chunk(chunk, tokenizer)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_proc, spawn, _start_worker, (tokenizer,)) as pool:
        # So many chunks at a time that nobody waits, and the rows are never all copied at once.
        while wave := list(islice(chunks, 8 * num_proc)):
            for encoded in pool.map(_encode_in_worker, wave):
                yield from encoded


def split_sequences(prompt: Ids, chosen: Ids, rejected: Ids) -> TokenizedPair:
    """Splits two tokenised sequences where either leaves the tokenised prompt."""
    split = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
    shortened = split < len(prompt)
    return TokenizedPair(prompt[:split], chosen[split:], rejected[split:], shortened)


def _start_worker(tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker_tokenizer
    # The processes are the parallelism; threads of the tokenizer on top would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer = tokenizer


def _encode_in_worker(chunk: list[tuple[str, dict[str, Any]]]) -> list[Encoded]:
    assert _worker_tokenizer is not None
    return _encode_chunk(chunk, _worker_tokenizer)


def _encode_chunk(
    chunk: list[tuple[str, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase
) -> list[Encoded]:
    places, pairs = [place for place, _ in chunk], [pair for _, pair in chunk]
    encode = _encode_chats if is_conversational(pairs[0]) else _encode_texts
    return list(zip(places, encode(pairs, tokenizer), strict=True))


def _encode_texts(
    pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Sequence[TokenizedPair]:
    eos = str(tokenizer.eos_token)
    texts = [pair["prompt"] for pair in pairs]
    for side in ("chosen", "rejected"):
        for pair in pairs:
            completion = pair[side]
            ending = "" if completion.endswith(eos) else eos
            texts.append(pair["prompt"] + completion + ending)
    ids = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    size = len(pairs)
    return list(map(split_sequences, ids[:size], ids[size : 2 * size], ids[2 * size :]))


def _encode_chats(
    pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Sequence[TokenizedPair | BadRow]:
    """One call of the template for all pairs with the same tools and options, in any order."""
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        key = json.dumps([pair.get("tools"), pair.get("chat_template_kwargs")], sort_keys=True)
        groups.setdefault(key, []).append(index)
    encoded: list[TokenizedPair | BadRow | None] = [None] * len(pairs)
    for members in groups.values():
        results = _encode_like_chats([pairs[index] for index in members], tokenizer)
        for index, result in zip(members, results, strict=True):
            encoded[index] = result
    return [result for result in encoded if result is not None]


def _encode_like_chats(
    pairs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> Sequence[TokenizedPair | BadRow]:
    options = dict(pairs[0].get("chat_template_kwargs") or {})
    tools = pairs[0].get("tools")
    options.setdefault("tools", json.loads(tools) if tools else None)
    prompts = [pair["prompt"] for pair in pairs]
    whole = [pair["prompt"] + pair[side] for side in ("chosen", "rejected") for pair in pairs]
    try:
        prompt_ids = _apply_template(tokenizer, prompts, add_generation_prompt=True, **options)
        ids = _apply_template(tokenizer, whole, **options)
    except Exception as error:
        # A template can fail in any way (it is a program); find the pair that it fails on.
        if len(pairs) == 1:
            what = f"{type(error).__name__}: {error}"
            problem = f"expected a conversation that the chat template accepts, got {what}"
            return [BadRow("chat template failed", problem)]
        return [_encode_like_chats([pair], tokenizer)[0] for pair in pairs]
    return list(map(split_sequences, prompt_ids, ids[: len(pairs)], ids[len(pairs) :]))


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **options: Any
) -> list[Ids]:
    quick = {"return_attention_mask": False, "verbose": False}
    rendered: Any = tokenizer.apply_chat_template(
        conversations, tokenize=True, return_dict=True, tokenizer_kwargs=quick, **options
    )
    return rendered["input_ids"]
