"""What a figure needs, in words for a study's folder and for a table of one's own."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """What has to be there for a figure to be drawn."""

    command: str
    """The command that makes it."""
    rows: str = ""
    """What the rows of ``points.jsonl`` have to have."""
    file: str = "points.jsonl"

    def of_study(self) -> str:
        """For a study's folder: the file, and the command that writes it."""
        rows = f" with {self.rows}" if self.rows else ""
        return f"{self.file}{rows}, by `{self.command}`"

    def of_table(self) -> str:
        """For a table of one's own, which no command of the study completes."""
        return f"rows with {self.rows}" if self.rows else self.of_study()
