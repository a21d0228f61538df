"""Writes the demo's preference pairs, ``pairs.jsonl.gz``: ``python -m fastdaa.demo.make_pairs``.

A made-up author answers every question twice, sometimes wrongly, rudely or at length. The answer
with the higher gold score is chosen; in 10 % of the training pairs the label is flipped, as human
labels are, and the pair says so (``"flipped": true``). Held-out pairs ask in words that no
training pair uses, and their labels are all right. The text is the same on every machine and
Python: only ``random.random()`` is used, whose sequence Python guarantees.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fastdaa.demo import world
from fastdaa.demo.world import Question, gold_score, prompts

T = TypeVar("T")
PAIRS_FILE = Path(__file__).with_name("pairs.jsonl.gz")
SEED, TRAIN_PAIRS, HELD_OUT_PAIRS = 0, 3000, 200
FLIPPED = 0.10
"""Share of training pairs with the wrong label."""


class Author(NamedTuple):
    """How often the answers of the made-up author are as they should be."""

    correct: float = 0.93
    courteous: float = 0.74
    rude: float = 0.16
    rambling: float = 0.20


class Dice:
    """Random choices made of ``random.random()`` alone."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def number(self, low: int, high: int) -> int:
        """From ``low`` to ``high``, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items in random order."""
        left = list(items)
        return [left.pop(int(self._random() * len(left))) for _ in range(count)]


def make_pairs(
    train: int = TRAIN_PAIRS, held_out: int = HELD_OUT_PAIRS, seed: int = SEED
) -> Iterator[dict[str, Any]]:
    """Training pairs, then held-out pairs, as conversational rows.

    Yields:
        ``prompt``, ``chosen`` and ``rejected`` (lists of messages), ``split`` (``"train"`` or
        ``"held_out"``) and ``flipped`` (whether the label is wrong).
    """
    dice = Dice(seed)
    asked = dice.sample(list(prompts()), len(prompts()))
    unseen, seen = asked[:held_out], asked[held_out:]
    by_topic: dict[str, list[str]] = {}
    for prompt in seen:
        by_topic.setdefault(prompts()[prompt].topic, []).append(prompt)
    for index in range(train):
        # Topics in turn, so that topics with few questions are learnt as well as the others.
        turn, topic = divmod(index, len(by_topic))
        group = by_topic[list(by_topic)[topic]]
        yield _pair(group[turn % len(group)], "train", dice.chance(FLIPPED), dice)
    for prompt in unseen:
        yield _pair(prompt, "held_out", False, dice)


def _pair(prompt: str, split: str, flipped: bool, dice: Dice) -> dict[str, Any]:
    question = prompts()[prompt]
    while True:
        one, two = (write_answer(question, Author(), dice) for _ in range(2))
        scores = gold_score(prompt, one), gold_score(prompt, two)
        if scores[0] != scores[1]:
            break
    better, worse = (one, two) if scores[0] > scores[1] else (two, one)
    chosen, rejected = (worse, better) if flipped else (better, worse)
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "split": split,
        "flipped": flipped,
    }


def write_answer(question: Question, author: Author, dice: Dice) -> str:
    """One answer of the author: opening, statement, fillers, closing, most of them optional."""
    value = _value(question, dice.chance(author.correct), dice)
    statement = dice.pick(question.statements).replace("{answer}", value)
    sentences = [statement[0].upper() + statement[1:]]
    if dice.chance(author.rambling):
        sentences += dice.sample(world.FILLERS, dice.number(2, 5))
    openings: Sequence[str] = world.OPENINGS
    closings: Sequence[str] = world.CLOSINGS
    mood = dice.number(0, 99) / 100
    if mood < author.rude:
        openings, closings = world.RUDE_OPENINGS, world.RUDE_CLOSINGS
    elif mood >= author.rude + author.courteous:
        return " ".join(sentences)
    where = dice.pick(("opening", "opening", "opening", "closing", "both"))
    if where != "closing":
        sentences.insert(0, dice.pick(openings))
    if where != "opening":
        sentences.append(dice.pick(closings))
    return " ".join(sentences)


def _value(question: Question, right: bool, dice: Dice) -> str:
    """What the author states; for lists, one member too few, too many or twice is wrong."""
    if not question.count:
        others = [value for value in question.values if value != question.right]
        return question.right if right else dice.pick(others)
    members = dice.sample(question.values, question.count)
    if not right:
        fault = dice.pick(("few", "many", "twice"))
        if fault == "many" or question.count == 2:
            members = dice.sample(question.values, question.count + 1)
        elif fault == "few":
            members.pop()
        else:
            members[-1] = members[0]
    return ", ".join(members[:-1]) + " and " + members[-1]


def as_jsonl(rows: Iterator[dict[str, Any]]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows).encode()


def read_pairs(path: Path = PAIRS_FILE) -> dict[str, list[dict[str, Any]]]:
    """The pairs that ship with the project, by split."""
    splits: dict[str, list[dict[str, Any]]] = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            splits.setdefault(row["split"], []).append(row)
    return splits


def main() -> None:
    """Command line: writes the file, here or elsewhere."""
    parser = argparse.ArgumentParser(description="Write the preference pairs of the demo.")
    parser.add_argument("--output", type=Path, default=PAIRS_FILE)
    output = parser.parse_args().output
    text = as_jsonl(make_pairs())
    # No name and no time in the header: the same text makes the same file with the same zlib.
    with output.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        packed.write(text)
    print(f"{output}: {len(text.splitlines()):,} pairs, {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
