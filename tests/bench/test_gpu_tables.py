"""Targets, scaling and tables of the GPU check, by rows whose verdicts are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fastdaa.benchmarks.contenders import ALL
from fastdaa.benchmarks.contenders.fastdaa import Fastdaa
from fastdaa.benchmarks.gpu import questions as asked
from fastdaa.benchmarks.gpu.answers import Answers
from fastdaa.benchmarks.gpu.limits import other_limits
from fastdaa.benchmarks.gpu.report import as_lines, sections, table
from fastdaa.benchmarks.gpu.scaling import Point, fit_line, growth
from fastdaa.benchmarks.gpu.targets import TARGETS, judge
from fastdaa.benchmarks.reading import Result

MIB, GIB = 1 << 20, 1 << 30
H200 = asked.SIZES["gpu"].case
U = 10.9e-3
TARGET = {target.path: target for target in TARGETS}


def row(path: str, name: str, seconds: float, **values: Any) -> dict[str, Any]:
    """A right row of a contender on the case of a path, 44 ms of floor a 4U and so on."""
    changes = {n: values.pop(n) for n in ("tokens", "head") if n in values}
    case = asked.case_of(path, replace(H200, **changes))
    products = TARGET[path].products
    return {
        "kind": "loss" if case.is_loss else "head", "case": case.id, "case_params": case.params,
        "contender": name, "status": "ok", "seconds": {"median": seconds},
        "floor_seconds": products * U, "peak_bytes": 32 * MIB, "machine": {"device": "H200"},
        **values,
    }  # fmt: skip


def result(*words: Any, **values: Any) -> Result:
    return Result(row(*words, **values))


def test_the_targets_are_those_of_the_design() -> None:
    assert [(t.path, t.products, t.over_floor, t.against_trl) for t in TARGETS] == [
        ("score", 1, 1.08, 1.10), ("frozen", 2, 1.15, 1.45), ("single_pass", 3, 1.12, 1.30),
        ("recompute", 4, 1.10, 1.03),
    ]  # fmt: skip
    assert (H200.tokens, H200.vocab, H200.hidden, H200.dtype) == (8192, 128256, 4096, "bfloat16")


@pytest.mark.parametrize(
    ("seconds", "trl", "peak", "verdict"),
    [
        (1.09 * 4 * U, 1.2 * 4 * U, GIB, "met"),
        (1.11 * 4 * U, 1.2 * 4 * U, GIB, "missed: time"),
        (1.09 * 4 * U, 1.1 * 4 * U, GIB, "missed: TRL"),
        (1.09 * 4 * U, 1.2 * 4 * U, 2 * GIB, "missed: memory"),
        (1.11 * 4 * U, 1.1 * 4 * U, 2 * GIB, "missed: time, TRL, memory"),
        (1.09 * 4 * U, None, GIB, "not measured: TRL"),
        (1.11 * 4 * U, None, GIB, "missed: time"),
    ],
)
def test_verdicts(seconds: float, trl: float | None, peak: int, verdict: str) -> None:
    ours = result("recompute", "fastdaa-recompute", seconds, peak_bytes=peak)
    theirs = None if trl is None else result("recompute", "trl", trl)
    assert judge(TARGET["recompute"], [ours], theirs).verdict == verdict


def test_an_engine_that_keeps_to_the_memory_serves_before_a_faster_one() -> None:
    fast = result("score", "fastdaa-score", 1.01 * U, peak_bytes=512 * MIB)
    small = result("score", "fastdaa-score-fused", 1.05 * U, peak_bytes=MIB)
    trl = result("score", "trl", 1.5 * U)
    judged = judge(TARGET["score"], [fast, small], trl)
    assert judged.result is small and judged.met
    assert judge(TARGET["score"], [fast], trl).verdict == "missed: memory"


def test_rows_of_other_code_answer_nothing() -> None:
    """A contender that fails by now, and is left out, would be shown as it was."""
    then, now = ({"device": "H200", "commit": commit} for commit in ("old", "new"))
    old = row("score", "fastdaa-score", 1.01 * U, machine=then, time="2026-01-01")
    new = row("recompute", "fastdaa-recompute", 4.2 * U, machine=now, time="2026-01-02")
    answers = Answers([new, old], "gpu", "cuda")
    assert answers.of("score", "fastdaa-score") is None and answers.left_out == 1
    assert answers.of("recompute", "fastdaa-recompute") is not None
    text = "\n".join(as_lines(sections(answers)))
    assert "Rows of other code or versions, left out here: 1." in text and "commit new" in text


def test_a_driver_that_was_not_told_leaves_no_row_out() -> None:
    """nvidia-smi has a time limit, and every part asks it; a changed tree is another matter."""
    machine = {"device": "H200", "driver": "580.1", "commit": "abc", "changes": None}
    first = row("score", "fastdaa-score", U, machine=machine, time="1")
    late = row("frozen", "fastdaa-frozen", U, machine={**machine, "driver": None}, time="2")
    assert Answers([first, late], "gpu", "cuda").left_out == 0
    changed = row("frozen", "fastdaa-frozen", U, machine={**machine, "changes": "f00"}, time="2")
    assert Answers([first, changed], "gpu", "cuda").left_out == 1


def test_wrong_and_failed_rows_meet_nothing() -> None:
    wrong = result("score", "fastdaa-score", U, status="wrong", reason="logps: off")
    judged = judge(TARGET["score"], [wrong], None)
    assert judged.result is None
    assert judged.verdict == "not measured: fastdaa-score wrong: logps: off"
    assert judge(TARGET["score"], [], None).verdict == "not measured: no row"
    absent = Result({**row("score", "trl", U), "status": "absent", "seconds": None})
    ours = result("score", "fastdaa-score", U)
    assert judge(TARGET["score"], [ours], absent).verdict == "not measured: TRL"


def points(*pairs: tuple[int, float], extra: int = 100) -> list[Point]:
    return [Point(tokens, seconds, extra) for tokens, seconds in pairs]


def test_a_line_with_a_start_is_linear_and_a_square_is_not() -> None:
    line = fit_line(points(*((n, 2e-3 + 3e-6 * n) for n in (512, 2048, 8192, 65536))))
    assert line.linear and line.deviation == pytest.approx(0.0, abs=1e-9)
    assert (line.start, line.slope) == (pytest.approx(2e-3), pytest.approx(3e-6))
    square = fit_line(points(*((n, 1e-9 * n**2) for n in (512, 2048, 8192))))
    assert not square.linear
    constant = fit_line(points((512, 1.0), (2048, 1.0), (8192, 1.0)))
    assert constant.slope == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="at least three"):
        fit_line(points((512, 1.0), (8192, 2.0)))


def test_memory_is_flat_from_a_number_of_tokens_on() -> None:
    given = [Point(512, 1, 10), Point(8192, 1, 1000), Point(16384, 1, 1050), Point(65536, 1, 1090)]
    flat = growth(given, 8192)
    assert flat.flat and flat.factor == pytest.approx(1.09)
    grows = growth([Point(8192, 1, 1000), Point(65536, 1, 1000 + 16384 * 57344)], 8192)
    assert not grows.flat and grows.bytes_a_token == 16384
    assert grows.words(4096).startswith("not flat: [N, D] tensors, 4.0 D bytes a token")
    assert grows.words(1024).startswith("NOT flat: more than [N, D] tensors, 16.0 D bytes")
    with pytest.raises(ValueError, match="two or more"):
        growth(given[:2], 8192)
    # A sum of the weight's size from the second number of tokens on is not a matter of tokens.
    bytes_held = {8192: 2569, 32768: 5277, 65536: 6045}
    stepped = growth([Point(n, 1, held * MIB) for n, held in bytes_held.items()], 8192)
    assert stepped.words(4096) == "not flat: [N, D] tensors, 6.0 D bytes a token (x 2.35)"


def test_the_report_holds_every_table() -> None:
    rows = [
        row("recompute", "floor-4u", 4 * U, family="floor"),
        row("recompute", "fastdaa-recompute", 1.3 * 4 * U),
        row("recompute", "fastdaa-recompute-triton", 1.08 * 4 * U),
        row("recompute", "fastdaa-recompute-280mib", 1.5 * 4 * U, peak_bytes=301 * MIB),
        row("recompute", "trl", 1.2 * 4 * U, peak_bytes=int(3.4 * GIB)),
        row("score", "fastdaa-score-fused", 0, status="failed", reason="ptxas"),
        *(row("recompute", "fastdaa-recompute", n * 6e-6, tokens=n) for n in (512, 2048, 65536)),
        row("frozen", "fastdaa-frozen", 2.4 * U, head="gemma2-2b"),
    ]
    text = "\n".join(as_lines(sections(Answers(rows, "gpu", "cuda"))))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if "|" in line}
    best = [cell.strip() for cell in lines["recompute (triton)"].strip("| ").split(" | ")]
    assert best == [
        "recompute (triton)", "1.08 x 4U", "at most 1.10", "1.11 x", "at least 1.03",
        "32.0 MiB", "at most 1.10 GiB", "met",
    ]  # fmt: skip
    assert "not measured: fastdaa-score-fused failed: ptxas" in text
    assert "recompute: triton is the fastest; torch takes 1.20 times as long" in text
    assert "| 301 MiB" in text and "| missed" in text
    assert "4U 43.6 ms" in text and "3.40 GiB" in text
    assert "linear: " in text and "flat (x 1.00)" in text
    assert "256000, softcap 30" in text


def _scaled(path: str, name: str, bytes_at: dict[int, int]) -> list[dict[str, Any]]:
    sizes = (512, 2048, 8192, 32768, 65536)
    return [
        row(path, name, n * 1.1 * U / 8192, tokens=n, peak_bytes=bytes_at.get(n, 30 * MIB))
        for n in sizes
    ]  # fmt: skip


def _verdicts(rows: list[dict[str, Any]], path: str) -> dict[tuple[str, str], str]:
    found = other_limits(Answers(rows, "gpu", "cuda"))
    return {(v.part, v.question.split()[0]): v.verdict for v in found if path in v.subject}


def test_the_other_limits_have_verdicts_too() -> None:
    less = [row("score", name, 2 * U, peak_bytes=299 * MIB) for name in asked.less("score")]
    rows = [*less, *_scaled("score", "fastdaa-score-triton", {})]
    assert _verdicts(rows, "score") == {
        ("paths", "at"): "met", ("scaling", "time"): "met", ("scaling", "memory"): "met",
    }  # fmt: skip
    grown = _scaled("score", "fastdaa-score-triton", {65536: 34 * MIB})
    less[0]["peak_bytes"] = 301 * MIB
    assert _verdicts([*less, *grown], "score") == {
        ("paths", "at"): "missed", ("scaling", "time"): "met", ("scaling", "memory"): "missed",
    }  # fmt: skip


def test_limits_of_what_was_not_measured_are_open() -> None:
    first, *_ = (row("score", name, 2 * U) for name in asked.less("score"))
    rows = [first, *_scaled("score", "fastdaa-score", {})[:-1]]
    assert _verdicts(rows, "score") == {
        ("paths", "at"): "not measured: fastdaa-score-triton-280mib",
        ("scaling", "time"): "not measured: N = 65536",
        ("scaling", "memory"): "not measured: N = 65536",
    }  # fmt: skip
    assert _verdicts(rows, "frozen")["scaling", "time"].startswith("not measured: N = 512, ")
    assert _verdicts(rows, "recompute")["accuracy", "sums"] == "not measured: no row"


@pytest.mark.parametrize(
    ("total", "dw", "verdict"),
    [(9e-4, 1.6e-3, "met"), (1.1e-3, 1.6e-3, "missed: sum"), (1e-4, 1.7e-3, "missed: dW")],
)
def test_accuracy_is_a_limit(total: float, dw: float, verdict: str) -> None:
    def accuracy(name: str, **errors: float) -> dict[str, Any]:
        return {**row("recompute", name, U), "kind": "accuracy", "case": "c", "error": errors}

    rows = [
        accuracy("pytorch", sequence_max=3e-1, dh=1.6e-3, dw=1.6e-3),
        accuracy("fastdaa-recompute", sequence=1e-5, sequence_max=total, dh=1.6e-3, dw=dw),
    ]
    assert _verdicts(rows, "recompute, c") == {("accuracy", "sums"): verdict}


def test_a_table_has_columns_of_one_width() -> None:
    lines = table(["a", "long heading"], [["wide cell", "1"]])
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ------------ |"


@pytest.mark.parametrize("part", asked.PARTS)
@pytest.mark.parametrize("size", tuple(asked.SIZES))
def test_every_question_has_contenders_that_apply(part: str, size: str) -> None:
    known = {contender.name: contender for contender in ALL}
    found = asked.questions(part, size)
    assert len({q.case.id for q in found}) == len(found)
    for question in found:
        for name in question.contenders:
            assert known[name].applies(question.case), (question.case.id, name)


def test_all_engines_of_all_paths_are_asked() -> None:
    names = {name for q in asked.questions("paths", "gpu") for name in q.contenders}
    ours = {c.name for c in ALL if isinstance(c, Fastdaa) and c.max_bytes is None}
    assert ours <= names
    scaling = {q.case.tokens for q in asked.questions("scaling", "gpu")}
    assert scaling | {H200.tokens} == {512, 2048, 8192, 32768, 65536}
    heads = {(q.case.vocab, q.case.softcap) for q in asked.questions("vocabularies", "gpu")}
    assert heads == {(50304, None), (151936, None), (256000, 30.0)}


def test_unknown_questions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'heads'"):
        asked.questions("heads", "gpu")
    with pytest.raises(ValueError, match=r"got 'nobody'"):
        asked.contender("nobody", "cpu")
