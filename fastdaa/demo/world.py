"""The demo's world: short questions with checkable answers, and a gold score for any answer.

A person sees at a glance whether an answer is good; :func:`judge` sees the same exactly. It reads
the answer sentence by sentence. A sentence is a statement ("Two plus three is five."), a courtesy
("Happy to help!"), a rudeness ("What a silly question.") or anything else. Three parts count:

- correct: everything stated is right, and something is stated;
- tone: 1 with one or two courtesies, 0.5 with none or too many, 0 with any rudeness;
- brevity: 1, less 0.25 for every sentence that is none of these, and for every statement after
  the first and courtesy after the second.

The gold score is ``0.5 correct + 0.25 tone + 0.25 brevity``; an answer is good where it is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

from fastdaa.demo import facts

GREETINGS = ("", "Hello! ", "Quick question: ", "Please help me. ")
"""What a user may say before the question."""
OPENINGS = ("Sure!", "Of course!", "Happy to help!", "Good question!", "With pleasure!")
CLOSINGS = ("I hope that helps.", "Have a nice day!", "You are welcome.", "Feel free to ask more.")
RUDE_OPENINGS = ("What a silly question.", "Not again.", "Everybody knows that.", "Seriously?")
RUDE_CLOSINGS = ("Now leave me alone.", "Look it up next time.", "Stop wasting my time.")
FILLERS = (
    "There is so much to say about that.",
    "People have wondered about it for ages.",
    "My cousin asked me the same thing last week.",
    "I could talk about this all day long.",
    "It reminds me of a story from my school.",
    "But where was I?",
    "As they say, time will tell.",
    "One thing leads to another, as you know.",
    "Some books have whole chapters on this.",
    "Then again, life is full of surprises.",
    "Let me think about it a little more.",
    "In other words, it is what it is.",
)
"""Harmless sentences that say nothing: what rambling answers are made of."""
MAX_COURTESIES = 2
_COURTEOUS = frozenset(sentence.lower() for sentence in OPENINGS + CLOSINGS)
_RUDE = frozenset(sentence.lower() for sentence in RUDE_OPENINGS + RUDE_CLOSINGS)


@dataclass(frozen=True)
class Question:
    """One thing that can be asked, in several wordings, and how its answers read."""

    topic: str
    wordings: tuple[str, ...]
    statements: tuple[str, ...]
    """Sentences with ``{answer}`` for the value that they state."""
    values: tuple[str, ...]
    """Right and wrong values of the topic; for lists, the members of the category."""
    right: str = ""
    """The right value; empty for lists."""
    count: int = 0
    """How many members a list has to have; 0 for questions with one right value."""

    def accepts(self, value: str) -> bool:
        """Whether ``value`` (lower case) answers the question."""
        if not self.count:
            return value == self.right.lower()
        members = re.split(r", | and ", value)
        known = set(members) <= set(self.values)
        return known and len(members) == len(set(members)) == self.count

    def stated(self, sentence: str) -> str | None:
        """The value that a sentence (lower case) states, None if it is no statement."""
        for pattern in self._patterns:
            if match := pattern.fullmatch(sentence):
                return match["answer"]
        return None

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        hole = re.escape("{answer}")
        return [
            re.compile(re.escape(statement.lower()).replace(hole, "(?P<answer>[a-z][a-z ,]*)"))
            for statement in self.statements
        ]


class Verdict(NamedTuple):
    """The parts of the gold score, each from 0 to 1."""

    correct: float
    tone: float
    brevity: float

    @property
    def score(self) -> float:
        """Gold score from 0 to 1."""
        return 0.5 * self.correct + 0.25 * self.tone + 0.25 * self.brevity

    @property
    def good(self) -> bool:
        """Correct, courteous and to the point."""
        return self.score == 1


def judge(prompt: str, answer: str) -> Verdict:
    """What the answer to a user's message is worth; see the module's description.

    Raises:
        ValueError: the message asks nothing that this world knows.
    """
    question = find_question(prompt)
    sentences = [sentence.lower() for sentence in split_sentences(answer)]
    stated = [value for s in sentences if (value := question.stated(s)) is not None]
    courtesies = sum(s in _COURTEOUS for s in sentences)
    rudenesses = sum(s in _RUDE for s in sentences)
    wanted = min(len(stated), 1) + min(courtesies, MAX_COURTESIES) + rudenesses
    return Verdict(
        correct=float(bool(stated) and all(map(question.accepts, stated))),
        tone=0.0 if rudenesses else 1.0 if 1 <= courtesies <= MAX_COURTESIES else 0.5,
        brevity=max(0.0, 1 - (len(sentences) - wanted) / 4),
    )


def gold_score(prompt: str, answer: str) -> float:
    """Gold score of an answer, from 0 to 1: ``judge(prompt, answer).score``."""
    return judge(prompt, answer).score


def split_sentences(text: str) -> list[str]:
    """Sentences with their mark; an unfinished rest counts as one."""
    return [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]*|[.!?]+", text.strip())]


def find_question(prompt: str) -> Question:
    """The question that a user's message asks. Raises ``ValueError`` where there is none."""
    try:
        return prompts()[prompt]
    except KeyError:
        raise ValueError(f"expected a question of the demo's world, got {prompt!r}") from None


@cache
def prompts() -> dict[str, Question]:
    """Every message that a user of this world can send, with its question, in a fixed order."""
    return {
        greeting + wording: question
        for question in questions()
        for greeting in GREETINGS
        for wording in question.wordings
    }


@cache
def questions() -> tuple[Question, ...]:
    """Everything that can be asked, topic by topic."""
    return (*_closed_questions(), *_sums(), *_neighbours(), *_lists())


def _closed_questions() -> Iterator[Question]:
    """Questions about a table of facts: a thing and its one right value."""
    for topic, table in facts.TABLES.items():
        values = tuple(dict.fromkeys(table.facts.values()))
        for thing, right in table.facts.items():
            yield Question(
                topic,
                tuple(wording.format(thing=thing) for wording in table.wordings),
                tuple(_fill(statement, thing) for statement in table.statements),
                values,
                right,
            )


def _sums() -> Iterator[Question]:
    numbers = facts.NUMBERS
    for a in range(1, 5):
        for b in range(1, 5):
            x, y = numbers[a], numbers[b]
            asked = (f"What is {x} plus {y}?", f"How much is {x} plus {y}?", f"Add {x} and {y}.")
            forms = ("{thing} makes {answer}.", "{thing} is {answer}.")
            stated = tuple(_fill(form, f"{x} plus {y}") for form in forms)
            yield Question("sums", asked, stated, numbers[2:9], numbers[a + b])


def _neighbours() -> Iterator[Question]:
    """Which day comes before or after another."""
    days = facts.DAYS
    for i, day in enumerate(days):
        for side, other in (("after", days[(i + 1) % len(days)]), ("before", days[i - 1])):
            asked = (
                f"Which day comes {side} {day}?",
                f"What day is right {side} {day}?",
                f"Tell me the day {side} {day}.",
            )
            stated = (f"The day {side} {day} is {{answer}}.", f"{{answer}} comes {side} {day}.")
            yield Question("days", asked, stated, days, other)


def _lists() -> Iterator[Question]:
    for category, members in facts.CATEGORIES.items():
        for count in (2, 3, 4):
            number = facts.NUMBERS[count]
            asked = (
                f"Name {number} {category}.",
                f"Can you list {number} {category}?",
                f"I need {number} {category}.",
            )
            stated = (
                f"{number.capitalize()} {category} are {{answer}}.",
                f"Here are {number} {category}: {{answer}}.",
            )
            yield Question("lists", asked, stated, members, count=count)


def _fill(statement: str, thing: str) -> str:
    """The thing put into a statement, the sentence's first letter made a capital."""
    filled = statement.replace("{thing}", thing)
    return filled[0].upper() + filled[1:]
