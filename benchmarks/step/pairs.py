"""Tokenised pairs for every contender: generated lengths or real text, in two orders."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastdaa.benchmarks.step.cases import Case, Workload, log_normal

FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>")
ORDERS = ("given", "sorted")
_TOKENIZER_SIZE = 16000
_BYTES = 256


class PairLengths(NamedTuple):
    """Tokens of one pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def widest(self) -> int:
        """Of its two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


def prepare(case: Case, folder: str, seed: int) -> dict[str, list[PairLengths]]:
    """Write tokenizer and pairs into ``folder``; the lengths of the pairs in both orders.

    Both orders begin with the same warm-up batches and hold the same pairs after them, so that
    contenders fed sorted pairs do the same work in total. Token ids are made here, once: every
    trainer is given the same ones, and no trainer truncates.

    Raises:
        fastdaa.data.DataError: a data file that cannot be found or read, or with a bad row.
        ValueError: a file without a pair that fits, or a model whose vocabulary is no text's.
    """
    from datasets import Dataset

    need = case.batch * (case.steps + case.warmup)
    if case.workload.data is None:
        rows = generated(case.workload, need, case.model.vocab, seed)
        _plain_tokenizer().save_pretrained(folder)
    else:
        rows = _from_file(case.workload, need, min(case.model.vocab, _TOKENIZER_SIZE), folder)
    lengths = [PairLengths(*(len(row[field]) for field in FIELDS)) for row in rows]
    orders = {
        "given": list(range(need)),
        "sorted": sorted_order(lengths, case.batch, case.warmup, seed),
    }
    for name, order in orders.items():
        # The trainers' own loader reads these; writing them is not worth a progress bar.
        with _quiet():
            Dataset.from_list([rows[i] for i in order]).save_to_disk(f"{folder}/{name}")
    found = {name: [lengths[i] for i in order] for name, order in orders.items()}
    Path(folder, "lengths.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def generated(workload: Workload, count: int, vocab: int, seed: int) -> list[dict[str, Any]]:
    """Random tokens in log-normal lengths. Only the lengths matter to the speed of these
    contenders; none of them skips work for unlikely tokens."""
    assert workload.prompt is not None and workload.completion is not None
    numbers = random.Random(f"{workload.name} {seed}")
    rows = []
    for _ in range(count):
        sizes = [
            log_normal(lengths, numbers.gauss(0.0, 1.0))
            for lengths in (workload.prompt, workload.completion, workload.completion)
        ]
        prompt = min(sizes[0], workload.max_length - 1)
        left = workload.max_length - prompt
        sizes = [prompt, min(sizes[1], left), min(sizes[2], left)]
        rows.append(
            {
                field: [numbers.randrange(len(SPECIAL), vocab) for _ in range(size)]
                for field, size in zip(FIELDS, sizes, strict=True)
            }
        )
    return rows


def sorted_order(
    lengths: Sequence[PairLengths], batch: int, warmup: int, seed: int = 0
) -> list[int]:
    """Warm-up batches as they are; then batches of similar length, in a random order of batches."""
    kept = list(range(batch * warmup))
    rest = sorted(range(batch * warmup, len(lengths)), key=lambda row: lengths[row].widest)
    batches = [rest[i : i + batch] for i in range(0, len(rest), batch)]
    random.Random(seed).shuffle(batches)
    return kept + [row for members in batches for row in members]


def describe(lengths: Sequence[PairLengths], batch: int) -> dict[str, Any]:
    """What a reader needs to judge a factor: medians, 90th percentiles and shares of tokens."""
    prompts = sorted(pair.prompt for pair in lengths)
    completions = sorted(n for pair in lengths for n in (pair.chosen, pair.rejected))
    batches = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    padded = sum(2 * len(b) * max(pair.widest for pair in b) for b in batches)
    stored = sum(sum(pair) for pair in lengths)
    repeated = sum(prompts)
    return {
        "pairs": len(lengths),
        "prompt_tokens": {"median": _rank(prompts, 0.5), "p90": _rank(prompts, 0.9)},
        "completion_tokens": {"median": _rank(completions, 0.5), "p90": _rank(completions, 0.9)},
        "padding_share": round(1 - (stored + repeated) / padded, 4),
        "repeated_prompt_share": round(repeated / (stored + repeated), 4),
    }


def in_words(stats: dict[str, Any]) -> str:
    """One line of :func:`describe`."""
    prompt, completion = stats["prompt_tokens"], stats["completion_tokens"]
    return (
        f"{stats['pairs']} pairs, prompt median {prompt['median']} (p90 {prompt['p90']}), "
        f"completion median {completion['median']} (p90 {completion['p90']}) tokens, "
        f"{stats['padding_share']:.0%} padding in given order"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _rank(ordered: Sequence[int], share: float) -> int:
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]


def _from_file(workload: Workload, need: int, vocab: int, folder: str) -> list[dict[str, Any]]:
    """The first pairs of the file whose prompt leaves room for a completion, repeated if few."""
    from fastdaa.data import load_pairs, tokenize_pairs

    assert workload.data is not None
    pairs = load_pairs(workload.data)
    least = len(SPECIAL) + _BYTES
    if vocab < least:
        raise ValueError(
            f"--model: expected a vocabulary of at least {least} for text, got one of {vocab}"
        )
    tokenizer = _trained_tokenizer(pairs, vocab)
    tokenizer.save_pretrained(folder)
    tokens, _ = tokenize_pairs(pairs, tokenizer, max_length=workload.max_length)
    rows = tokens.to_list()
    return [rows[i % len(rows)] for i in range(need)]


def _plain_tokenizer() -> Any:
    """Special tokens only: pairs come as token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(SPECIAL)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=SPECIAL[0], pad_token=SPECIAL[3]
    )


def _trained_tokenizer(pairs: Any, size: int) -> Any:
    """Byte-level BPE learned on the pairs themselves, with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(_texts(pairs), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[0], pad_token=SPECIAL[3]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _texts(pairs: Any) -> Any:
    for row in pairs:
        for field in ("prompt", "chosen", "rejected"):
            value = row[field]
            if isinstance(value, str):
                yield value
            else:
                yield from (str(message["content"]) for message in value)
