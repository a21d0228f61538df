"""``fastdaa study world`` and ``fastdaa study estimators``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdaa.cli.study import run
from fastdaa.cli.study_actions import world as world_action
from fastdaa.cli.study_actions.world import response_name
from fastdaa.study import presets, sft, tilt
from fastdaa.study.world import make_world


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = replace(presets.PRESETS["H"], sft_samples=2000, sft_epochs=1, pairs=256)
    monkeypatch.setitem(presets.PRESETS, "H", quick)
    # The actions set it for their own process.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def test_world_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["world", "--size", "d12", "--no_curves", "--output_dir", str(tmp_path)]
    assert run(options) == 0
    shown = capsys.readouterr().out
    assert "55,987 responses a prompt" in shown
    assert "Reference: entropy" in shown
    assert [path.name[:11] for path in (tmp_path / "world").iterdir()] == ["H-0-d12-s0-"]
    assert not (tmp_path / tilt.TILT_FILE).exists()


def test_names_of_responses() -> None:
    world = make_world("H", 0)
    assert response_name(world, 0) == "(empty)"
    assert response_name(world, world.language.responses - 1) == " ".join(["B3"] * 6)
    assert response_name(world, 7 + 6 * 4 + 2) == "B2 A3"


def test_interrupted_world_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "fine_tune", stop)
    assert run(["world", "--output_dir", str(tmp_path)]) == 130
    assert "To continue:" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_estimators_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["estimators", "--size", "d12", "--samples", "16", "--repeats", "4"]
    assert run([*options, "--output_dir", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "estimators.json").read_text())
    assert len(content["policies"]) == 3
    assert "exact KL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["world", "--preset", "X"], "preset: expected one of H, M", id="preset"),
        pytest.param(["world", "--size", "d1"], "size: expected one of d12", id="size"),
        pytest.param(["estimators", "--repeats", "1"], "2 repeats or more", id="repeats"),
    ],
)
def test_bad_options(tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run([*options, "--output_dir", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "shown", "computed"),
    [
        ([], "World H", {"H", "M", "P1.5V10", "P1.5V3"}),
        (["--preset", "M"], "World M", {"M"}),
    ],
    ids=["all", "one"],
)
def test_a_preset_of_its_own_has_its_curves_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], shown: str, computed: set[str],
) -> None:  # fmt: skip
    asked: list[str] = []

    def run_tilt(*args: object, settings: list[presets.Preset], **options: object) -> None:
        asked.extend(preset.name for preset in settings)

    monkeypatch.setattr(tilt, "run_tilt", run_tilt)
    monkeypatch.setattr(world_action, "show", lambda console, *world: print("World", *world))
    assert run(["world", "--output_dir", str(tmp_path), *options]) == 0
    assert shown in capsys.readouterr().out
    assert set(asked) == computed
