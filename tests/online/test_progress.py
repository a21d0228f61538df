"""The line of an iteration."""

from __future__ import annotations

import pytest

from fastdaa.online.progress import Progress

LOGS = {
    "objective/raw_scores": -0.023771,
    "objective/scores": -0.158,
    "objective/kl": 1.25,
    "policy/clipfrac": 0.031,
    "epoch": 1.0,
}


def test_a_line_shows_the_reward_in_its_own_unit(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(8, 2, shown=True)
    progress.row(3, LOGS)
    progress.close()
    # As in the table at the end; scores in units of their running deviation are only logged.
    assert capsys.readouterr().out == "iteration 3/8  reward -0.02377  KL 1.250  clipped 3.1%\n"


def test_an_estimate_that_rounds_to_nothing_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(2, 0, shown=True)
    progress.row(1, {"objective/kl": -0.00048})
    progress.close()
    assert capsys.readouterr().out == "iteration 1/2  KL 0.000\n"


def test_nothing_is_shown_where_nothing_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(8, 0, shown=False)
    progress.row(1, LOGS)
    progress.close()
    assert capsys.readouterr() == ("", "")
