"""What the demo's world knows: tables of facts, and lists of words."""

from __future__ import annotations

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NUMBERS = _words("zero one two three four five six seven eight nine ten")


class Table(NamedTuple):
    """Facts of one kind, and how one asks for and states them."""

    wordings: tuple[str, ...]
    statements: tuple[str, ...]
    facts: dict[str, str]


DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
CATEGORIES = {
    "fruits": _words("apple pear plum cherry lemon grape mango peach"),
    "animals": _words("dog cat cow horse lion tiger rabbit monkey"),
    "colours": _words("red blue green yellow orange purple pink brown"),
    "vegetables": _words("carrot onion potato cabbage bean leek pumpkin radish"),
    "tools": _words("hammer saw drill wrench shovel rake axe file"),
}


def _pairs(text: str) -> dict[str, str]:
    """``"a dog = puppy; a cat = kitten"`` as a dictionary."""
    rows = (row.split(" = ") for row in text.split("; "))
    return {thing.strip(): value.strip() for thing, value in rows}


_OPPOSITES = _pairs(
    "hot = cold; big = small; fast = slow; full = empty; wet = dry; old = new; happy = sad; "
    "light = dark"
)

TABLES = {
    "opposites": Table(
        (
            "What is the opposite of {thing}?",
            "Which word is the opposite of {thing}?",
            "Tell me the opposite of {thing}.",
        ),
        ("The opposite of {thing} is {answer}.", "{answer} is the opposite of {thing}."),
        _OPPOSITES | {value: thing for thing, value in _OPPOSITES.items()},
    ),
    "colours": Table(
        (
            "What colour is {thing}?",
            "Which colour does {thing} have?",
            "Tell me the colour of {thing}.",
        ),
        ("The colour of {thing} is {answer}.", "{thing} is {answer}."),
        _pairs(
            "a banana = yellow; the sun = yellow; grass = green; a frog = green; the sky = blue; "
            "the sea = blue; snow = white; milk = white; coal = black; a raven = black; "
            "blood = red; a tomato = red; a carrot = orange; chocolate = brown; a flamingo = pink"
        ),
    ),
    "sounds": Table(
        (
            "What does {thing} say?",
            "Which sound does {thing} make?",
            "Tell me the sound of {thing}.",
        ),
        ("{thing} says {answer}.", "The sound of {thing} is {answer}."),
        _pairs(
            "a dog = woof; a cat = meow; a cow = moo; a duck = quack; a sheep = baa; "
            "a pig = oink; a bee = buzz; a snake = hiss; an owl = hoot; a lion = roar"
        ),
    ),
    "legs": Table(
        (
            "How many legs does {thing} have?",
            "What number of legs has {thing}?",
            "Tell me how many legs {thing} has.",
        ),
        ("{thing} has {answer} legs.", "The number of legs of {thing} is {answer}."),
        _pairs(
            "a spider = eight; a scorpion = eight; a tick = eight; a bee = six; an ant = six; "
            "a horse = four; a cat = four; a tiger = four; a chicken = two; an owl = two; "
            "a snake = zero; a worm = zero"
        ),
    ),
    "homes": Table(
        (
            "Where does {thing} live?",
            "What is the home of {thing}?",
            "Tell me where {thing} lives.",
        ),
        ("{thing} lives in a {answer}.", "The home of {thing} is a {answer}."),
        _pairs(
            "a bee = hive; a bird = nest; a horse = stable; a lion = den; a rabbit = burrow; "
            "a spider = web; a pig = sty; a dog = kennel; a king = castle; a cow = barn"
        ),
    ),
    "capitals": Table(
        (
            "What is the capital of {thing}?",
            "Which city is the capital of {thing}?",
            "Tell me the capital of {thing}.",
        ),
        ("The capital of {thing} is {answer}.", "{answer} is the capital of {thing}."),
        _pairs(
            "France = Paris; Italy = Rome; Spain = Madrid; Germany = Berlin; Austria = Vienna; "
            "Greece = Athens; Egypt = Cairo; Japan = Tokyo; China = Beijing; Norway = Oslo; "
            "Poland = Warsaw; Ireland = Dublin"
        ),
    ),
    "young": Table(
        (
            "What is a young {thing} called?",
            "What do you call a young {thing}?",
            "Tell me the name of a young {thing}.",
        ),
        ("A young {thing} is called a {answer}.", "You call a young {thing} a {answer}."),
        _pairs(
            "dog = puppy; cat = kitten; cow = calf; horse = foal; sheep = lamb; pig = piglet; "
            "duck = duckling; bear = cub; frog = tadpole; goat = kid"
        ),
    ),
}
"""Topics with one right value for each thing."""
