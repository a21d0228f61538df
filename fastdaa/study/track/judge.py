"""An external program that compares the policy's answers with the reference answers.

It is started once a measurement. On its standard input it gets JSON lines

    {"id": 0, "prompt": ..., "first": "an answer", "second": "another"}

and writes for each, in any order, a line

    {"id": 0, "winner": "first"}            # or "second" or "tie"

Every pair is asked twice, in both orders, so that a preference for a place cancels.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

from fastdaa.counted import counted
from fastdaa.study.track.scoring import Sample, ScorerError, Scores
from fastdaa.validation import check_positive

_POINTS = {"first": 1.0, "second": 0.0, "tie": 0.5}


class JudgeCommand:
    """The win-rate of the policy's answers against the chosen ones of the data.

    A sample's value is the mean of its two verdicts: 1 for a win, 1/2 for a tie, 0 for a loss.
    Columns: ``judge_first_rate``, the share of all verdicts for the first place (ties 1/2; 0.5
    without position bias), and ``judge_consistency``, the share of prompts with the same verdict
    in both orders.

    Args:
        command: as in a shell, but without one: words, quotes, no pipes.
        timeout: seconds that a measurement may take.

    Raises:
        ScorerError: there is no such program.
    """

    column = "win_rate"

    def __init__(self, command: str, timeout: float = 600.0):
        check_positive("judge_timeout", timeout)
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise ScorerError(f"judge: expected a command, got {command!r}: {error}") from None
        if not self._words or shutil.which(self._words[0]) is None:
            program = self._words[0] if self._words else command
            raise ScorerError(f"judge: expected a program to run, there is no {program!r}")
        self.label = command
        self._timeout = timeout

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        questions: list[dict[str, Any]] = []
        for sample in samples:
            answers = (sample.answer, sample.prompt.reference)
            for first, second in (answers, answers[::-1]):
                questions.append({
                    "id": len(questions), "prompt": sample.prompt.text,
                    "first": first, "second": second,
                })  # fmt: skip
        text = "".join(json.dumps(question) + "\n" for question in questions)
        for_first = read_verdicts(self._run(text), len(questions))
        wins, losses = for_first[::2], for_first[1::2]
        values = [(win + 1.0 - loss) / 2 for win, loss in zip(wins, losses, strict=True)]
        agree = [win == 1.0 - loss for win, loss in zip(wins, losses, strict=True)]
        return Scores(
            values,
            {
                "judge_first_rate": sum(for_first) / len(for_first),
                "judge_consistency": sum(agree) / len(agree),
            },
        )

    def _run(self, text: str) -> str:
        """What the program writes. In a session of its own, Ctrl-C does not reach it."""
        try:
            process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True, encoding="utf-8", start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ScorerError(f"judge: {self.label} cannot be started: {error}") from error
        try:
            output, errors = process.communicate(text, timeout=self._timeout)
        except subprocess.TimeoutExpired:
            raise ScorerError(
                f"judge: expected an answer within {self._timeout:g} s, got none"
            ) from None
        except UnicodeDecodeError as error:
            raise ScorerError(f"judge: expected UTF-8, got {error}") from None
        finally:
            _end(process)
        if process.returncode != 0:
            last = (errors.strip().splitlines() or ["nothing on stderr"])[-1]
            raise ScorerError(f"judge: exit code {process.returncode}: {last}")
        return output


def read_verdicts(output: str, count: int) -> list[float]:
    """For each of ``count`` questions 1 where the first answer won, 0 where the second, else 1/2.

    Raises:
        ScorerError: a line that is no verdict, or questions without exactly one.
    """
    verdicts: dict[int, float] = {}
    for number, line in enumerate(output.splitlines(), 1):
        if not line.strip():
            continue
        place, points = _read_line(line, f"judge: line {number} of its output", count)
        if place in verdicts:
            raise ScorerError(f"judge: expected one verdict for each id, got two for {place}")
        verdicts[place] = points
    missing = [place for place in range(count) if place not in verdicts]
    if missing:
        raise ScorerError(
            f"judge: expected {counted(count, 'verdict')}, got {len(verdicts)}; the first "
            f"without one has the id {missing[0]}"
        )
    return [verdicts[place] for place in range(count)]


def _read_line(line: str, where: str, count: int) -> tuple[int, float]:
    expected = 'expected {"id": number, "winner": "first", "second" or "tie"}'
    try:
        verdict: Any = json.loads(line)
    except ValueError:
        verdict = None
    if not isinstance(verdict, dict):
        raise ScorerError(f"{where}: {expected}, got {line[:80]!r}")
    place, winner = verdict.get("id"), verdict.get("winner")
    if not isinstance(winner, str) or winner not in _POINTS:
        raise ScorerError(f"{where}: {expected}, got the winner {winner!r}")
    if not isinstance(place, int) or isinstance(place, bool) or not 0 <= place < count:
        raise ScorerError(f"{where}: expected an id from 0 to {count - 1}, got {place!r}")
    return place, _POINTS[winner]


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of the program behind, whether it ended by itself or not."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError, ValueError):
                pipe.close()
