"""A bar over the iterations and one line a logged row, on a terminal or in a log file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm

from fastdaa.train.shown import shown_as

# Key, name in a line, format.
_LINE = (
    ("objective/raw_scores", "reward", ".4g"),
    ("objective/kl", "KL", ".3f"),
    ("policy/token_entropy", "entropy/token", ".3f"),
    ("loss/policy", "policy loss", ".4f"),
    ("loss/value", "value loss", ".4f"),
    ("policy/clipfrac", "clipped", ".1%"),
    ("rollout_tokens_per_second", "rollout tokens/s", ",.0f"),
    ("update_tokens_per_second", "update tokens/s", ",.0f"),
)


class Progress:
    """Shows how far a run is, and in which phase of an iteration.

    The bar is on stderr, only on a terminal; lines are on stdout.

    Args:
        shown: False for nothing at all.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        # None: no bar where stderr is no terminal.
        self._bar = tqdm(
            total=total, initial=done, desc="iterations", dynamic_ncols=True,
            disable=None if shown else True,
        )  # fmt: skip
        self._shown, self._total = shown, total

    def phase(self, name: str) -> None:
        """What is done now."""
        self._bar.set_postfix_str(name)

    def row(self, iteration: int, logs: Mapping[str, Any]) -> None:
        """A line for the metrics of an iteration."""
        cells = [
            f"{name} {shown_as(key, logs[key], spec)}"
            for key, name, spec in _LINE
            if isinstance(logs.get(key), int | float)
        ]
        self.say(f"iteration {iteration}/{self._total}  " + "  ".join(cells))

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._shown:
            tqdm.write(text, file=sys.stdout)

    def advance(self) -> None:
        """One more iteration is finished."""
        self._bar.update(1)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()
