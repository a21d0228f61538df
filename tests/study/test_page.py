"""The page: one file, nothing from elsewhere, missing parts named, any table welcome."""

from __future__ import annotations

import base64
import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastdaa.cli import main
from fastdaa.study.claims import Judged
from fastdaa.study.correlate import CorrelateSettings, correlate_table
from fastdaa.study.figures.fitted import fits
from fastdaa.study.fit import FitSettings, fit_table
from fastdaa.study.page import Page, PageFigure, PageTable, render_page
from fastdaa.study.report import FIGURES, build_report
from fastdaa.study.results import read_results
from fastdaa.study.table import Table
from fastdaa.study.wording import number

synthetic = runpy.run_path(str(Path(__file__).with_name("synthetic_study.py")))


class Reader(HTMLParser):
    """Addresses that a browser would load, open elements, and the text."""

    VOID = ("meta", "link", "img", "source", "br", "input")

    def __init__(self, page: str):
        super().__init__()
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.alts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action", "poster") and value:
                self.addresses.append(value)
            if name == "alt" and value:
                self.alts.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_self_contained(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    assert reader.addresses
    for address in reader.addresses:
        assert address.startswith(("#", "data:image/svg+xml;base64,")), address[:80]
        if address.startswith("data:"):
            svg = base64.b64decode(address.split(",", 1)[1]).decode()
            loaded = re.findall(r'(?:href|src)="([^"]*)"', svg)
            assert all(target.startswith("#") for target in loaded)
    assert "<script" not in page
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study in which only a sweep, the fits, the correlations and the tree were done."""
    folder = tmp_path_factory.mktemp("study")
    rows = synthetic["study_rows"](presets=("H",), seeds=1, regularised=False)
    synthetic["write_rows"](folder, rows)
    fits = fit_table(Table(rows), FitSettings(repeats=100))
    (folder / "fits.json").write_text(json.dumps(fits))
    correlations = correlate_table(Table(rows), CorrelateSettings(repeats=100))
    (folder / "correlations.json").write_text(json.dumps(correlations))
    (folder / "tree.json").write_text(json.dumps(synthetic["tree_content"]()))
    settings = {
        "settings": {"seeds": [0, 1], "runs": []},
        "steps": {"tree": {"seconds": 12.3, "settings": {}, "result": "18 trainings"}},
        "failed": {"tilt": "ValueError: no reward model"},
        "seconds": 345.6,
        "workers": 2,
        "versions": {"fastdaa": "9.8.7", "torch": "2.13.0"},
        "commit": "abc1234",
        "cores": 2,
        "machine": "Some CPU",
    }
    (folder / "study.json").write_text(json.dumps(settings))
    build_report(folder, command="fastdaa study report study_output")
    return folder


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    return (study / "index.html").read_text(encoding="utf-8")


def test_one_seed_is_said(page: str) -> None:
    assert "One seed is one world: these verdicts have no error bars." in page


def test_nothing_is_loaded_from_elsewhere(page: str) -> None:
    assert_self_contained(page)


def test_figures_lie_beside_the_page(study: Path, page: str) -> None:
    names = {path.stem for path in (study / "figures").glob("*.png")}
    assert {"hump-H", "tree", "fits-H", "beta-kl"} <= names
    assert all(f'<section id="{name}">' in page for name in names)
    assert not list(study.rglob("*.partial"))


def test_each_figure_has_a_narrow_twin_and_words(page: str) -> None:
    reader = Reader(page)
    assert page.count("<picture>") == page.count('media="(max-width: 640px)"') == len(reader.alts)
    assert all(len(alt) > 40 for alt in reader.alts)


def test_missing_parts_are_named(page: str) -> None:
    listed = page.partition('<section id="missing">')[2].partition("</section>")[0]
    assert "<h2>Not run</h2>" in listed
    for part in ("tilt.jsonl", "estimators.json"):
        assert part in listed
    assert "tree.json" not in listed


def test_claims_table(page: str) -> None:
    table = page.partition('<table class="claims">')[2].partition("</table>")[0]
    assert "Paper&#x27;s claim" in table or "Paper's claim" in table
    assert "What we measured" in table and "Reproduced or not" in table
    assert {"✓ reproduced", "✗ not reproduced"} <= set(re.findall(r">([✓✗◐] [a-z ]+)<", table))


@pytest.mark.parametrize(
    "fact",
    ["fastdaa 9.8.7, torch 2.13.0", "abc1234", "2, 2 workers of one thread", "346, all steps",
     "fastdaa study report study_output", "Some CPU", "ValueError: no reward model",
     "18 trainings, 12 s", "0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2"],
)  # fmt: skip
def test_facts(page: str, fact: str) -> None:
    facts = Reader(page.partition('<section id="facts">')[2].partition("</section>")[0]).text
    assert fact in facts


def test_tables_scroll_in_their_own_box(page: str) -> None:
    assert page.count("<table") == page.count('<div class="scroll" role="region"')
    assert ".scroll { overflow-x: auto;" in page
    assert "prefers-color-scheme: dark" in page
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_numbers(page: str) -> None:
    numbers = page.partition('<section id="numbers">')[2].partition("</section>")[0]
    for title in (
        *("Ends of training, preset H", "Fitted laws", "Correlations with quality"),
        *("Tree problem", "known solutions"),
    ):
        assert title in numbers


@pytest.mark.parametrize("preset", ["fast", "H"])
def test_a_glimpse_begins_with_what_it_is_and_judges_nothing(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdaa.study.report.FIGURES", ())
    rows = synthetic["study_rows"](presets=("H",), seeds=1, regularised=False)
    synthetic["write_rows"](tmp_path, [row | {"preset": preset} for row in rows])
    page = build_report(tmp_path).read_text(encoding="utf-8")
    glimpse = preset == "fast"
    first = Reader(page.partition("<header>")[2].partition("</p>")[0] + "</p>").text
    assert ("these numbers mean nothing" in first) == glimpse
    assert ("reproduced" not in page.partition("</style>")[2]) == glimpse
    assert ('id="claims"' not in page) == ("Claim “" not in page) == glimpse


def test_text_is_escaped() -> None:
    evil = '<script>alert("x")</script>'
    page = render_page(
        Page(
            title=evil,
            lead=evil,
            claims=[Judged("a", evil, evil, "partly")],
            figures=[PageFigure("a", evil, evil, "<svg/>", "<svg/>")],
            tables=[PageTable(evil, evil, [evil], [[evil]])],
            missing={evil: evil},
            facts={evil: evil},
        )
    )
    assert_self_contained(page)


OWN = [
    {"run": f"run {name}", "checkpoint": 10 * k, "kl": 0.3 * k,
     "score": 0.5 + 0.1 * k - 0.012 * k * k}
    for name in ("<a>", "b")
    for k in range(1, 9)
]  # fmt: skip


def test_own_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "track.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in OWN))
    assert main(["study", "report", str(table)]) == 0
    written = tmp_path / "track_report" / "index.html"
    assert str(written) in capsys.readouterr().out
    page = written.read_text(encoding="utf-8")
    assert_self_contained(page)
    text = Reader(page).text
    assert "run <a> is best at √KL 1.10 with 0.708" in text
    assert "Not in this table" in text
    assert "gold" not in text.lower().partition("not in this table")[0]
    # No world and no tree: the papers' claims are not at stake.
    assert 'id="claims"' not in page
    assert {path.stem for path in written.parent.glob("figures/*.png")} == {"hump", "paths", "fits"}


def test_a_single_run(tmp_path: Path) -> None:
    """The main use of tracking: one run, one beta, one seed, few checkpoints."""
    rows = [
        {"run": "mine", "checkpoint": step, "kl": 0.01 * step, "score": 0.17, "score_stderr": 0.01,
         "loss": "dpo", "beta": 0.1, "seed": 42}
        for step in (0, 2, 4)
    ]  # fmt: skip
    table = tmp_path / "track.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = build_report(table).read_text(encoding="utf-8")
    assert_self_contained(page)
    text = Reader(page).text
    assert (
        "1 run with 3 checkpoints (DPO; beta 0.1). No checkpoint scores more than the start" in text
    )
    # No advice that would not help, and code as code.
    assert "Which law fits : needs at least 6 points away from the reference, got 2." in text
    assert "fastdaa study fit" not in text and "points.jsonl" not in text
    assert "`" not in text and "<code>fastdaa study world</code>" in page


def test_csv_and_output(tmp_path: Path) -> None:
    table = tmp_path / "mine.csv"
    lines = ["run,checkpoint,kl,score"] + [f"a,{k},{k}.5,{k % 3}" for k in range(1, 5)]
    table.write_text("\n".join(lines))
    assert build_report(table, tmp_path / "there") == tmp_path / "there" / "index.html"


@pytest.mark.parametrize(
    ("options", "renewed"),
    [
        (["--where", "loss=dpo"], True),
        (["--score", "win_rate"], True),
        (["--final_only"], False),
        (["--score", "gold"], False),
    ],
    ids=["part", "other score", "ends", "same score"],
)
def test_fits_of_other_rows_are_not_shown(
    study: Path, tmp_path: Path, options: list[str], renewed: bool
) -> None:
    (tmp_path / "points.jsonl").write_bytes((study / "points.jsonl").read_bytes())
    for action in ("fit", "correlate"):
        assert main(["study", action, str(tmp_path), "--bootstrap", "100", *options]) == 0
    results = read_results([tmp_path])
    assert results.renewed == (("fits.json", "correlations.json") if renewed else ())
    assert {fit.series for fit in fits(results)} == {"DPO", "IPO", "SLiC"}
    assert {entry["y"] for entry in results.correlations["quality"]} <= {"score", "gold"}


def test_the_page_says_what_it_computed_anew(study: Path, tmp_path: Path) -> None:
    lines = (study / "points.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "points.jsonl").write_text("".join(lines[:-40]))
    assert main(["study", "fit", str(tmp_path), "--bootstrap", "100"]) == 0
    (tmp_path / "points.jsonl").write_text("".join(lines))  # the sweep went on
    page = build_report(tmp_path).read_text()
    assert "what fits.json has of other rows, or of another score" in page


def test_tree_alone(tmp_path: Path) -> None:
    (tmp_path / "tree.json").write_text(json.dumps(synthetic["tree_content"]()))
    page = build_report(tmp_path).read_text(encoding="utf-8")
    assert_self_contained(page)
    assert 'id="tree"' in page and "points.jsonl" in page


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, FileNotFoundError, "expected points.jsonl, fits.json"),
        ({"points.jsonl": "{}\n"}, ValueError, r"points.jsonl:1: expected a value for run"),
        ({"tree.json": "[1]"}, ValueError, r"tree.json: expected a JSON object, got list"),
        ({"tilt.jsonl": "{}\nnope\n"}, ValueError, r"tilt.jsonl:2: expected one JSON object"),
    ],
    ids=["empty folder", "bad row", "no object", "bad line"],
)
def test_bad_input(
    tmp_path: Path, files: dict[str, str], error: type[Exception], words: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words):
        build_report(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "report", str(tmp_path / "none")]) == 2
    assert "expected a study's folder or a table, got" in capsys.readouterr().err


def test_figure_modules_are_known() -> None:
    folder = Path(__file__).resolve().parents[2] / "fastdaa" / "study" / "figures"
    others = {"__init__", "style", "end_labels", "course", "needs"}
    assert {path.stem for path in folder.glob("*.py")} - others == set(FIGURES)


def test_a_folder_that_cannot_be_made_is_named_before_the_work(study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"output: expected a folder, {tmp_path / 'file'}"):
        build_report(study, tmp_path / "file")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "n/a"), (0.0, "0.00"), (-0.0, "0.00"), (-3e-8, "0.00"), (0.5, "0.50"),
        (0.0054, "0.0054"), (-0.0004, "-0.0004"), (0.99999, "1.00"), (9999.5, "9999.50"),
        (1134914.445, "1,134,914"), (-29871.7, "-29,872"),
    ],
)  # fmt: skip
def test_numbers_of_any_scale_say_something(value, shown):
    assert number(value) == shown
    if value is not None and value > 0:
        assert number(value, sign=True) == f"+{shown}"
