"""What the training commands say about paths, hub ids and the output folder before any work."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from word_files import write_checkpoint

from fastdaa.cli import doctor
from fastdaa.cli.paths import check_model, check_paths


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def check(model: Path, tmp_path: Path) -> Any:
    """``check(output_dir, resume=None, **options)``: the checkpoint to resume from."""
    data = tmp_path / "pairs.jsonl"
    data.touch()

    def run(output_dir: Path, resume: str | None = None, **options: Any) -> str | None:
        given = {"model": str(model), "dataset": [str(data)], "eval_dataset": None, **options}
        return check_paths(SimpleNamespace(**given), str(output_dir), resume)  # type: ignore[arg-type]

    return run


def checkpoint(folder: Path, step: int) -> Path:
    return write_checkpoint(folder / f"checkpoint-{step}", json.dumps({"global_step": step}))


def test_weights_that_cannot_be_read_are_not_said_to_be_missing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model / "model.safetensors"
    weights.touch()
    check_model("model", str(model))
    # Tests may run as root, who reads everything.
    monkeypatch.setattr("fastdaa.cli.paths.os.access", lambda path, _: path != weights)
    with pytest.raises(PermissionError, match=f"model: expected files that can .*, {weights} can"):
        check_model("model", str(model))


def test_a_new_run_keeps_out_of_the_folder_of_another(check: Any, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    last = checkpoint(out, 4)
    (out / "checkpoint-9").mkdir()  # half of one
    message = f"without checkpoints for a new run, {out} holds checkpoint-4 of an earlier one"
    for resume in (None, "false"):
        with pytest.raises(ValueError, match=message):
            check(out, resume)
    assert check(out, "true") == check(out, str(last)) == str(last)
    # Continued in another folder, it is that folder which has to be free.
    assert check(elsewhere, str(last)) == str(last)
    checkpoint(elsewhere, 2)
    with pytest.raises(ValueError, match=f"{elsewhere} holds checkpoint-2"):
        check(elsewhere, str(last))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.bin"]
)
def test_a_finished_model_is_not_written_over(check: Any, tmp_path: Path, name: str) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    (out / "training_args.bin").touch()
    (out / "model_card.md").touch()
    assert check(out) is None
    (out / name).touch()
    message = f"without a model for a new run, {out} holds {name} of an earlier one"
    for resume in (None, "true", str(checkpoint(elsewhere, 2))):
        with pytest.raises(ValueError, match=message):
            check(out, resume)
    # A run that goes on may.
    last = checkpoint(out, 4)
    assert check(out, "true") == check(out, str(last)) == str(last)


def test_half_checkpoints_are_in_nobodys_way(check: Any, tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-9").mkdir(parents=True)
    assert check(tmp_path / "out") is None


def test_the_model_is_not_written_over(check: Any, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another folder than that of model"):
        check(model.parent / "model")
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "config.json").touch()
    with pytest.raises(ValueError, match="another folder than that of ref_model"):
        check(reference, ref_model=str(reference))


def test_an_adapter_would_be_loaded_in_place_of_the_model(check: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "adapter_config.json").touch()
    assert check(out, use_peft=True) is None
    for options in ({}, {"use_peft": False}):
        with pytest.raises(ValueError, match="expected a folder without an adapter"):
            check(out, **options)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("/proc/x", "No such file or directory", id="not even root"),
        pytest.param("a" * 300, "File name too long", id="too long"),
        pytest.param("file/below", "Not a directory", id="below a file"),
    ],
)
def test_output_dir_that_cannot_be_written(
    check: Any, tmp_path: Path, name: str, reason: str
) -> None:
    (tmp_path / "file").touch()
    if reason == "Not a directory":
        reason = "is a file"
    with pytest.raises(OSError, match=f"^output_dir: expected a folder.*{reason}"):
        check(tmp_path / name)


def test_nothing_is_left_where_only_asked(check: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert check(tmp_path / "new" / "folder") is None
    assert sorted(tmp_path.iterdir()) == before


class Hub:
    """Stands for the hub: answers, or raises what transformers would."""

    def __init__(self, **outcomes: type[Exception] | None) -> None:
        self.outcomes, self.asked = outcomes, list[str]()

    def __call__(self, source: str, file: str, revision: str | None = None) -> str:
        self.asked.append(file)
        outcome = self.outcomes[file.removesuffix(".json")]
        if outcome is None:
            return file
        try:
            raise outcome(f"no {file}")
        except Exception as cause:
            raise OSError(f"{source} has no {file}.\nMore about it.") from cause


@pytest.mark.parametrize(
    ("hub", "asked"),
    [
        pytest.param(Hub(config=None), ["config.json"], id="model"),
        pytest.param(
            Hub(config=EntryNotFoundError, adapter_config=None),
            ["config.json", "adapter_config.json"], id="adapter",
        ),
    ],
)  # fmt: skip
def test_models_on_the_hub(monkeypatch: pytest.MonkeyPatch, hub: Hub, asked: list[str]) -> None:
    monkeypatch.setattr("transformers.utils.cached_file", hub)
    check_model("model", "owner/name")
    assert hub.asked == asked


@pytest.mark.parametrize("option", ["model", "ref_model"])
@pytest.mark.parametrize(
    ("hub", "asked"),
    [
        # The hub cannot be reached: one patient attempt is enough.
        pytest.param(Hub(config=ConnectionError), ["config.json"], id="unreachable"),
        pytest.param(Hub(config=LocalEntryNotFoundError), ["config.json"], id="offline"),
        pytest.param(
            Hub(config=EntryNotFoundError, adapter_config=EntryNotFoundError),
            ["config.json", "adapter_config.json"], id="no model",
        ),
    ],
)  # fmt: skip
def test_neither_folder_nor_hub_id(
    check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub, asked: list[str],
    option: str,
) -> None:  # fmt: skip
    hub.asked.clear()
    monkeypatch.setattr("transformers.utils.cached_file", hub)
    with pytest.raises(OSError) as error:
        check(tmp_path / "out", **{option: "nix"})
    assert str(error.value) == (
        f"{option}: expected a local folder or a hub id, there is no folder 'nix', and asking the "
        f"hub: nix has no {asked[-1]}."
    )
    assert hub.asked == asked


def test_doctor_names_the_option(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    monkeypatch.setattr("transformers.utils.cached_file", Hub(config=ConnectionError))
    with pytest.raises(OSError, match="model: expected a local folder or a hub id"):
        doctor.empty_model("nix")
    with pytest.raises(ValueError, match=f"model: expected a causal language model, got '{model}'"):
        doctor.empty_model(str(model))
