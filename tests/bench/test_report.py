"""The page: it needs no other file, says what the rows say, and gives no speed-up to wrong rows."""

from __future__ import annotations

import errno
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fastdaa.benchmarks.reading import Result
from fastdaa.benchmarks.report import headlines as said
from fastdaa.benchmarks.report.drawing import draw
from fastdaa.benchmarks.report.figures import bars
from fastdaa.benchmarks.report.palette import COLOURS
from fastdaa.cli import main

MACHINE = {"device": "2 CPU cores, test", "torch": "2.13.0", "commit": "abc1234", "dirty": True}
FAST_AND_WRONG = 0.0007


def row(kind: str, contender: str, tokens: int = 512, **changes: Any) -> dict[str, Any]:
    median = changes.pop("median", 0.1)
    return {
        "kind": kind,
        "case": f"small-logps-n{tokens}",
        "case_params": {"model": "small", "N": tokens, "work": "logps", "dtype": "float32"},
        "contender": contender,
        "version": "1.0",
        "status": "ok",
        "reason": None,
        "error": {"logps": 1e-6, "dh": 2e-6, "dw": 3e-6, "limit": {"dh": 1e-5, "dw": 1e-5}},
        "seconds": {"median": median, "p10": median, "p90": median},
        "peak_bytes": tokens * 1000,
        "floor_seconds": 0.05,
        "speedup_over_reference": 0.1 / median,
        "seed": 0,
        "threads": 2,
        "machine": MACHINE,
        "time": "2026-11-20T12:00:00+00:00",
        "command": "fastdaa bench <head> --output rows.jsonl",
        **changes,
    }


def wrong(kind: str, contender: str = "liger-dpo", **changes: Any) -> dict[str, Any]:
    reason = "dh: error 0.5 beyond the limit 1e-05"
    fast = {"status": "wrong", "reason": reason, "median": FAST_AND_WRONG}
    return row(kind, contender, **fast | changes)


def step(contender: str, rate: float, **changes: Any) -> dict[str, Any]:
    params = {"workload": "short-chat", "model": "llama-13m", "tuning": "full", "loss": "dpo"}
    return row(
        "step",
        contender,
        case="short-chat/llama-13m/full",
        case_params={**params, "batch": 4, "lengths": "prompts 60, completions 110"},
        median=4 / rate,
        pairs_per_second=rate,
        **changes,
    )


CURVES = {
    "head": ("time", "peak-memory", "relative-gradient-error"),
    "memory": ("peak-memory", "time"),
    "accuracy": ("relative-gradient-error",),
}
ROWS = [
    *(
        row(kind, contender, tokens, median=seconds * tokens / 512)
        for kind in CURVES
        for tokens in (512, 1024)
        for contender, seconds in (("pytorch", 0.1), ("trl", 0.08), ("fastdaa-single-pass", 0.06))
    ),
    wrong("head"),
    row("head", "quack", status="absent", reason="quack is not <installed>", seconds=None),
    step("trl", 1.0),
    step("trl-sorted", 2.0),
    step("fastdaa-prefix_shared", 3.0),
    step("fastdaa-prefix_shared-cached", 9.0),
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def page_of(tmp_path: Path, rows: list[dict[str, Any]]) -> str:
    file = write(tmp_path / "rows.jsonl", rows)
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "out")]) == 0
    return (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def words_of(page: str) -> str:
    """What a reader sees."""
    visible = re.sub(r"<style>.*?</style>|<defs>.*?</defs>", " ", page, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", visible)).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    page_of(folder, ROWS)
    return folder / "out"


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def test_needs_no_other_file(page: str) -> None:
    for found in re.findall(r"(?:src|href|action|data)\s*=\s*[\"']([^\"']*)", page):
        assert found.startswith("#"), found
    assert not re.search(r"<(script|link|iframe|img|object|embed|base)\b", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)


def test_every_reference_inside_the_page_leads_somewhere(page: str) -> None:
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers)), "two elements of one name"
    used = {*re.findall(r'href="#([^"]+)"', page), *re.findall(r"url\(#([^)]+)\)", page)}
    assert used <= set(identifiers)


def test_follows_the_theme(page: str) -> None:
    assert "prefers-color-scheme: dark" in page
    body = page.partition("</style>")[2]
    assert not [c for pair in COLOURS.values() for c in pair if c in body], "a fixed colour"
    assert 'name="viewport"' in page


def test_tables_scroll_in_their_own_box(page: str) -> None:
    assert page.count("<table") == page.count('<div class="box" tabindex="0"><table')


def test_says_what_the_rows_say(page: str) -> None:
    words = words_of(page)
    for expected in (
        # The step is compared with references computed in the step on both sides.
        "fastdaa trains 3.00 times as many pairs a second as TRL's DPOTrainer as it comes (1 "
        "case), and 1.50 times as many as TRL at its best (the case in which trl-sorted was run as "
        "well).",
        "fastdaa is the fastest right contender in 2 of 2 cases; in the median it is 1.33 times "
        "as fast as the fastest peer of the case.",
        "Largest error of a log-probability, in nats: 1.0e-06 for fastdaa and 1.0e-06 for plain "
        "PyTorch.",
        "Largest relative error of a gradient: 3.0e-06 for fastdaa and 3.0e-06 for plain PyTorch.",
        "1 is WRONG: liger-dpo.",
        "abc1234 with uncommitted changes",
        "2.13.0",
        "fastdaa bench <head> --output rows.jsonl",
        "quack is not <installed>",
        "2 CPU cores, test, 2 threads used",
    ):
        assert expected in words, expected


def test_explains_its_words(page: str) -> None:
    terms = {html.unescape(term) for term in re.findall(r"<dt>(.*?)</dt>", page)}
    assert {"U", "floor", "peak memory", "WRONG", "speed-up", "flat, peaked"} <= terms


@pytest.mark.parametrize("kind", ["head", "loss", "step", "memory", "accuracy"])
def test_a_row_without_numbers_is_still_a_row(tmp_path: Path, kind: str) -> None:
    """Of another version, say."""
    least = {"kind": kind, "case": "a", "contender": "somebody", "status": "ok"}
    assert "somebody" in words_of(page_of(tmp_path, [least]))


def test_contenders_of_two_runs_are_compared_by_their_own_references() -> None:
    """The machine was twice as slow in the second run, where ours was timed."""
    rows = [
        row("head", "pytorch", median=0.1, run="a", speedup_over_reference=1.0),
        row("head", "trl", median=0.1, run="a", speedup_over_reference=1.0),
        row("head", "fastdaa-recompute", median=0.16, run="b", speedup_over_reference=1.25),
    ]
    first = said.headlines("head", map(Result, rows))[0]
    assert "is 1.25 times as fast as the fastest peer" in first.text and first.tone == "good"


def test_a_picture_alone_says_what_it_shows() -> None:
    """Files have no caption of a page around them."""
    picture = bars("a", "title", "details", [Result(row("head", "trl"))], lambda r: 1.0, str)
    assert picture is not None
    size = picture.figure.get_size_inches().tolist()
    plain, told = (png_height(picture.png(origin)) for origin in ("", "a device; " * 20))
    assert told > plain > 200 * size[1]
    assert picture.figure.get_size_inches().tolist() == size, "for the page it is as it was"
    assert not picture.figure.texts


def png_height(content: bytes) -> int:
    return int.from_bytes(content[20:24], "big")


def test_pictures_are_drawn(folder: Path, page: str) -> None:
    names = {file.name for file in (folder / "figures").glob("*.png")}
    cases = {f"{kind}_small-logps-n{n}.png" for kind in CURVES for n in (512, 1024)}
    curves = {f"{kind}_{name}_0.png" for kind, names in CURVES.items() for name in names}
    assert names == cases | curves | {"step_short-chat-llama-13m-full-dpo-4-pairs.png"}
    assert page.count("<figure>") == len(names)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (folder / "figures").glob("*"))
    assert not list(folder.rglob("*.part"))


def test_the_same_rows_give_the_same_page(tmp_path: Path) -> None:
    rows = [row("head", "pytorch"), row("head", "fastdaa-recompute")]
    assert page_of(tmp_path, rows) == page_of(tmp_path, rows)


@pytest.mark.parametrize("kind", ["head", "loss", "memory", "step"])
def test_wrong_rows_have_no_speedup_anywhere(tmp_path: Path, kind: str) -> None:
    """The wrong row is the fastest by far, and claims a speed-up of 143."""
    make = {"step": lambda: [step("trl", 1.0), step("fastdaa-x", 900.0, status="wrong")]}
    rows = make[kind]() if kind == "step" else [row(kind, "pytorch"), wrong(kind, "fastdaa-x")]
    words = words_of(page_of(tmp_path, rows))
    assert "WRONG" in words
    for claim in ("143", "142", "900 x", "900 times", "71.4", "0.014"):
        assert claim not in words, claim
    assert "fastdaa is the fastest" not in words and "times as many" not in words
    results = [Result(r) for r in rows]
    assert [line for line in said.headlines(kind, results) if line.tone == "good"] == []


def test_a_wrong_row_of_ours_is_the_bad_news() -> None:
    line = said.verdict([Result(wrong("head", "fastdaa-recompute"))])
    assert line.tone == "bad" and "WRONG: fastdaa-recompute" in line.text


def test_wrong_rows_are_in_no_curve() -> None:
    rows = [wrong("head", "liger-dpo", tokens=tokens) for tokens in (512, 1024)]
    assert draw("head", [Result(r) for r in rows]) == []


def test_defeats_are_said() -> None:
    rows = [row("head", "trl", median=0.05), row("head", "fastdaa-recompute", median=0.1)]
    first, second = said.headlines("head", [Result(r) for r in rows])[:2]
    assert "fastest right contender in 0 of 1 case" in first.text
    assert "takes 2.00 times as long as the fastest peer" in first.text
    assert "trl is 2.00 times as fast" in second.text
    assert (first.tone, second.tone) == ("bad", "bad")


def test_cases_of_one_title_are_told_apart() -> None:
    rows = []
    for dtype in ("float32", "bfloat16"):
        for name, median in (("trl", 0.05), ("fastdaa-recompute", 0.1)):
            given = row("head", name, median=median, case=dtype)
            given["case_params"] = given["case_params"] | {"dtype": dtype}
            rows.append(given)
    text = said.headlines("head", map(Result, rows))[1].text
    assert "gradients, float32 (trl" in text and "gradients, bfloat16 (trl" in text
    alone = said.headlines("head", map(Result, rows[:2]))[1].text
    assert "gradients (trl" in alone


def test_trl_at_its_best_counts_only_cases_in_which_a_variant_was_run() -> None:
    both = [step("trl", 1.0), step("trl-sorted", 2.0), step("fastdaa", 6.0)]
    plain = [
        step(name, rate) | {"case": "other"} for name, rate in (("trl", 1.0), ("fastdaa", 8.0))
    ]
    first = said.headlines("step", map(Result, [*both, *plain]))[0].text
    assert "6.00 to 8.00 times as many pairs a second" in first and "it comes (2 cases)" in first
    assert "3.00 times as many as TRL at its best (the case in which trl-sorted was run" in first
    assert "at its best" not in said.headlines("step", map(Result, plain))[0].text


def test_the_floor_is_no_peer() -> None:
    rows = [row("head", "floor-3u", median=0.01), row("head", "fastdaa-recompute")]
    assert said.headlines("head", [Result(r) for r in rows]) == []


def test_comparisons_of_versions_have_a_section(tmp_path: Path) -> None:
    compared = {
        "kind": "compare",
        "of": "head",
        "case": "small",
        "contender": "fastdaa-recompute",
        "status": "ok",
        "base": "v1 (abc1234)",
        "new": "working tree (def5678)",
        "base_seconds": 0.1,
        "new_seconds": 0.15,
        "base_peak_bytes": None,
        "new_peak_bytes": None,
        "ratio": 1.5,
        "ratio_low": 1.4,
        "ratio_high": 1.6,
        "verdict": "slower",
    }
    words = words_of(page_of(tmp_path, [compared]))
    assert "v1 (abc1234) / working tree (def5678)" in words
    assert "1.50 x 1.40 - 1.60" in words and "slower" in words


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"kind": "head"', "rows.jsonl:2: expected a JSON object"),
        ('{"kind": "head", "case": "a"}', "rows.jsonl:2: expected a JSON object with contender"),
        ("[1, 2]", "rows.jsonl:2: expected a JSON object"),
    ],
)
def test_a_broken_line_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("head", "pytorch")) + "\n" + line + "\n", encoding="utf-8")
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "words"), [("no.jsonl", "expected a file of rows"), ("", "one row")]
)
def test_nothing_to_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    file = tmp_path / (name or "empty.jsonl")
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err


def test_a_file_named_twice_counts_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("head", "pytorch")) + "\n", encoding="utf-8")
    assert main(["bench", "report", str(file), str(file), "--output", str(tmp_path / "out")]) == 0
    assert "(1 row," in capsys.readouterr().out


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("head", "pytorch")) + "\n", encoding="utf-8")
    assert main(["bench", "report", str(file), "--output", str(file)]) == 2
    assert f"--output: expected a folder, {file} is a file" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("head", "pytorch")) + "\n", encoding="utf-8")
    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert f"No space left on device: '{tmp_path / 'out'}" in said
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_a_file_that_breaks_off_is_reported_with_one_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    whole = json.dumps(row("head", "pytorch"))
    file.write_text(f"{whole}\n{whole[:-30]}", encoding="utf-8")
    assert main(["bench", "report", str(file), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "(1 row," in said.out
    assert said.err == f"{file}:2: the file breaks off in this row; left out\n"
