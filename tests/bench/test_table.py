"""The terminal table: rankings, red rows, and no speed-up for what is wrong."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fastdaa.benchmarks import wording
from fastdaa.benchmarks.columns import verdict
from fastdaa.benchmarks.mixed_runs import mixed_runs
from fastdaa.benchmarks.reading import Result, best, case_title, latest, ranked
from fastdaa.benchmarks.table import notes, show


def row(contender: str, status: str = "ok", **changes: Any) -> dict[str, Any]:
    """A row of the head's benchmark; seconds may be given as their median."""
    median = changes.pop("median", 0.1)
    return {
        "kind": "head",
        "case": "small-logps",
        "case_params": {"model": "small", "N": 512, "work": "logps", "head_grad": True},
        "contender": contender,
        "version": "1.0",
        "status": status,
        "reason": None,
        "error": {"dh": 1e-6, "limit": {"dh": 1e-5}},
        "seconds": {"median": median, "p10": 0.9 * median, "p90": 1.1 * median},
        "peak_bytes": 3 * 2**20,
        "floor_seconds": 0.05,
        "expected_seconds": None,
        "speedup_over_reference": 2.0,
        "threads": 1,
        "machine": {"device": "1 CPU cores, test"},
        **changes,
    }


def shown(rows: list[dict[str, Any]], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    show(rows, console=console)
    return console.file.getvalue()


def test_holds_what_was_measured() -> None:
    text = shown([row("pytorch"), row("fastdaa-recompute", median=0.0512)])
    for words in ("51.2 ms", "46.1 - 56.3 ms", "1.02 x", "3.00 MiB", "2.00 x", "1 thread used"):
        assert words in text, words
    assert text.index("fastdaa-recompute") < text.index("pytorch")


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    text = shown([row("fastdaa-prefix_shared-sorted-and-a-long-name")], width=40)
    assert "fastdaa-prefix_shared-sorted-and-a-long-name" in text
    assert "2.00 x" in text


def test_wrong_is_red_and_has_no_speedup() -> None:
    rows = [row("pytorch"), row("liger", "wrong", reason="dh: error 0.5 beyond 1e-05", median=0.01)]
    text = shown(rows)
    (line,) = [line for line in text.splitlines() if "liger" in line and "10.0 ms" in line]
    assert "WRONG" in line and "\x1b[1;31m" in line
    assert "2.00 x" not in line and "0.200 x" not in line
    assert text.index("pytorch") < text.index("liger"), "it is not ranked by its time"
    assert "liger is WRONG: dh: error 0.5 beyond 1e-05" in text


def test_absent_and_failed_are_listed_with_reasons() -> None:
    text = shown([row("pytorch"), row("quack", "absent", reason="quack is not installed")])
    assert "quack absent: quack is not installed" in text
    failed = row("a", "failed", reason="OutOfMemoryError")
    lines = notes([Result(failed), Result(row("a", case="another"))])
    assert lines == ["a failed: OutOfMemoryError [small-logps]"]


def test_a_reason_that_holds_everywhere_is_said_once() -> None:
    rows = [row("cce", "absent", case=case, reason="CUDA only") for case in ("a", "b")]
    assert notes(map(Result, rows)) == ["cce absent: CUDA only"]


def test_nobody_ran() -> None:
    """All that were asked for are absent: no table, but the reasons."""
    text = shown([row("cce", "absent", reason="CUDA only"), row("quack", "skipped", reason="no")])
    assert "cce absent: CUDA only" in text and "quack skipped: no" in text


def test_the_number_of_timed_calls_is_shown() -> None:
    text = shown([row("pytorch", seconds={"median": 0.1, "p10": 0.1, "p90": 0.1, "n": 17})])
    assert " 17 " in text


def test_times_of_several_runs_are_said_not_to_compare() -> None:
    rows = [
        row("pytorch", run="a", time="01:00"), row("trl", run="b", time="02:00"),
        row("floor-3u", run="b", family="floor"), row("cce", "failed", run="b"),
        row("pytorch", run="a", time="01:00", kind="memory"),
        row("trl", run="b", time="02:00", kind="memory"),
    ]  # fmt: skip
    (line,) = mixed_runs(map(Result, rows))
    assert line.startswith(
        "small-logps: timed in 2 runs (pytorch at 01:00; trl at 02:00), so times do not compare"
    )
    assert line in shown(rows, width=300)
    assert mixed_runs(map(Result, [row("pytorch", run="a"), row("trl", run="a")])) == []


def test_no_rows() -> None:
    assert "nothing was measured" in shown([])


@pytest.mark.parametrize("status", ["wrong", "failed", "absent", "skipped"])
def test_only_right_rows_have_a_speedup(status: str) -> None:
    """Even where the row itself claims one."""
    result = Result(row("x", status))
    assert result.speedup is None
    assert result.over_floor is None
    assert best([result]) is None
    assert verdict(result) == ("WRONG" if status == "wrong" else status)


def test_newest_row_counts() -> None:
    (result,) = latest([row("x", median=1.0), row("x", median=2.0)])
    assert result.median == 2.0
    assert len(latest([row("x", threads=1), row("x", threads=2)])) == 2


def test_steps_rank_by_pairs_a_second() -> None:
    """Sorted batches differ in size: their median says little."""
    step = {"kind": "step", "case": "chat", "case_params": {"loss": "ipo", "batch": 4}}
    slow = row("a", median=0.1, pairs_per_second=1.0, **step)
    quick = row("b", median=0.2, pairs_per_second=2.0, **step)
    assert [result.contender for result in ranked(map(Result, [slow, quick]))] == ["b", "a"]
    assert Result(quick).case == "chat/ipo/4 pairs"


def test_errors_as_share_of_the_limit() -> None:
    error = {"dh": 2e-6, "dw": 3e-5, "limit": {"dh": 1e-5, "dw": 1e-5}}
    assert Result(row("x", error=error)).share_of_limit == pytest.approx(3.0)
    # JSON has no NaN: rows spell it out.
    broken = {"dh": "nan", "dw": 1e-7, "limit": {"dh": 1e-5, "dw": 1e-5}}
    assert Result(row("x", "wrong", error=broken)).share_of_limit == float("inf")
    assert "not finite" in shown([row("x", "wrong", error=broken)])


def test_title_of_a_case_without_parameters_is_its_id() -> None:
    assert case_title(Result(row("x", case_params=None))) == "small-logps"


def test_steps_with_other_losses_have_other_titles() -> None:
    params = {"workload": "data", "model": "llama-13m", "tuning": "full"}
    titles = [
        case_title(Result(row("x", kind="step", case_params={**params, "loss": loss})))
        for loss in ("dpo", "ipo")
    ]
    assert titles == [f"data, llama-13m, all weights, {loss} loss" for loss in ("DPO", "IPO")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (wording.duration(0.0), "0 µs"),
        (wording.duration(1.234e-5), "12.3 µs"),
        (wording.duration(0.0999), "99.9 ms"),
        (wording.duration(1.0), "1.00 s"),
        (wording.duration(90.0), "1.50 min"),
        (wording.duration(None), "-"),
        (wording.duration_range(0.9, 1.1), "900 - 1,100 ms"),
        (wording.size(0), "0 B"),
        (wording.size(1536), "1.50 KiB"),
        (wording.size(-(2**30)), "-1.00 GiB"),
        (wording.ratio(0.5), "0.5 x"),
        (wording.ratio(1234.5), "1,234 x"),
        (wording.error(3.14e-7), "3.1e-07"),
        (wording.error(0), "0"),
        (wording.three_digits(9.996), "10.0"),
        (wording.three_digits(99.96), "100"),
        (wording.join(["a"]), "a"),
        (wording.join(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_wording(words: str, expected: str) -> None:
    assert words == expected
