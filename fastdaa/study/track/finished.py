"""The same measurements for checkpoints of runs that are over."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdaa.online.generation import end_tokens
from fastdaa.study.track.answers import Subject, answer
from fastdaa.study.track.prompts import PromptSet, held_out_prompts, longest_prompt
from fastdaa.study.track.record import RunRecord
from fastdaa.study.track.settings import TrackSettings
from fastdaa.train.adapter_files import find_adapter, load_causal_lm
from fastdaa.train.backbone import install_head_task
from fastdaa.train.prepare import check_head
from fastdaa.train.quantization import quantization_of
from fastdaa.train.references import ModelReference, check_reference
from fastdaa.train.run_record import read_record

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ADAPTER, _MODEL = "adapter_config.json", "config.json"


class Checkpoint(NamedTuple):
    """A model of a run: of the starting point the folder is None."""

    folder: Path | None
    step: int
    columns: dict[str, Any]
    """What its trainer state says: ``fraction`` and ``final``."""


def find_checkpoints(folders: Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints that ``folders`` are, or hold (an output folder), by step.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a folder without checkpoints, or two of the same step.
    """
    found: dict[int, Checkpoint] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            got = f"{folder} is a file" if folder.exists() else f"there is no {folder}"
            raise FileNotFoundError(f"model: expected a folder, {got}")
        inside = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
        for path in [path for path in inside if _has_model(path)] or [folder]:
            checkpoint = _read(path)
            other = found.setdefault(checkpoint.step, checkpoint)
            if other is not checkpoint:
                raise ValueError(
                    f"model: expected checkpoints of one run, got step {checkpoint.step} in "
                    f"{other.folder} and in {path}; measure runs one by one, with --run names"
                )
    return [found[step] for step in sorted(found)]


def default_reference(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """The base model of an adapter, and its revision as ``from_pretrained`` takes it.

    Raises:
        ValueError: the checkpoint is a whole model, which does not say where it started, or an
            adapter that was trained with another reference.
    """
    assert checkpoint.folder is not None
    path = checkpoint.folder / _ADAPTER
    if not path.is_file():
        raise ValueError(
            f"ref_model: expected the model that the training started from, got none; "
            f"{checkpoint.folder} does not say it"
        )
    run = read_record(checkpoint.folder)
    facts = {} if run is None else run.facts
    if facts.get("reference", facts.get("base model")) != facts.get("base model"):
        raise ValueError(
            f"ref_model: expected the model or adapter that the training started from, got none; "
            f"{checkpoint.folder} was not compared with its base model alone"
        )
    adapter = find_adapter(str(checkpoint.folder))
    assert adapter is not None
    return adapter.base, adapter.base_options


def load_policy(source: str | Path, dtype: str, device: Any, **options: Any) -> nn.Module:
    """A causal language model, or an adapter on its base model, ready to be measured.

    Args:
        options: passed on to ``from_pretrained``, such as ``revision``.

    Raises:
        OSError, ValueError: it cannot be loaded, or was trained on a base that was quantised then.
        ImportError: an adapter, and PEFT is not installed.
    """
    model: Any = load_causal_lm(str(source), trainable=False, dtype=dtype, **options)
    run, quantization = read_record(source), quantization_of(model)
    trained = None if run is None else run.facts.get("quantization")
    if trained not in (None, quantization):
        raise ValueError(
            f"model: expected a policy on the base that it was trained on, {source} was trained on "
            f"one that was quantised when it was loaded ({trained}); measure such runs while they "
            "train, by `fastdaa train` with --track_reward or --track_judge"
        )
    if quantization is None:
        model = model.to(device)
    model = model.eval().requires_grad_(False)
    check_head(model)
    install_head_task(model)
    return model


class FinishedRun:
    """Measures the checkpoints of one run against one reference.

    Args:
        reference: path or hub id of the reference.
        revision: of the reference, as ``from_pretrained`` takes it.
        tokenizer: the policy's.
        pairs: a ``datasets.Dataset`` of pairs that were not trained on.
        more: columns of every row, e.g. ``loss`` and ``beta``.
    """

    def __init__(
        self,
        record: RunRecord,
        reference: str,
        tokenizer: Any,
        pairs: Any,
        settings: TrackSettings,
        *,
        revision: Mapping[str, str] | None = None,
        dtype: str = "auto",
        device: Any = "cpu",
        more: Mapping[str, Any] | None = None,
    ):
        self._record, self._tokenizer, self._settings = record, tokenizer, settings
        self._dtype, self._device, self._more = dtype, device, dict(more or {})
        self._ref_model = load_policy(reference, dtype, device, **(revision or {}))
        self.prompts: PromptSet = held_out_prompts(
            pairs, tokenizer, settings,
            longest=longest_prompt(self._ref_model, settings),
            end_ids=end_tokens(self._ref_model),
        )  # fmt: skip

    def measure(self, checkpoint: Checkpoint, advance: Any = lambda count: None) -> dict[str, Any]:
        """Measure one checkpoint; its row, which is in the table now.

        Args:
            advance: called with a number of prompts when they are done.

        Raises:
            ScorerError: a scorer failed.
            ValueError: the checkpoint cannot be compared with the reference.
        """
        model = self._ref_model
        if checkpoint.folder is not None:
            model = load_policy(checkpoint.folder, self._dtype, self._device)
            check_reference(self._ref_model, model, same_vocabulary=True)
        subject = Subject(model, ModelReference(self._ref_model), self._tokenizer)
        with torch.no_grad():
            samples = answer(subject, self.prompts, self._settings, advance=advance)
        samples.sort(key=lambda sample: sample.prompt.number)
        more = {**checkpoint.columns, **self._more}
        return self._record.add(samples, checkpoint.step, more, strict=True).row


def _has_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_ADAPTER, _MODEL))


def _read(folder: Path) -> Checkpoint:
    if not _has_model(folder):
        raise ValueError(
            f"model: expected a folder with {_MODEL} or {_ADAPTER}, or with checkpoint-* folders "
            f"that have one, {folder} has none"
        )
    state = _trainer_state(folder)
    match = _CHECKPOINT.fullmatch(folder.resolve().name)
    step = int(match[1]) if match else state.get("global_step")
    if step is None:
        raise ValueError(
            f"model: expected a folder named checkpoint-STEP or with a trainer_state.json, "
            f"{folder} does not say its step"
        )
    last = state.get("max_steps")
    columns = {"fraction": step / last, "final": step >= last} if last else {}
    return Checkpoint(folder, step, columns)


def _trainer_state(folder: Path) -> dict[str, Any]:
    path = folder / "trainer_state.json"
    if not path.is_file():
        return {}
    state = json.loads(path.read_text(encoding="utf-8"))
    return state if isinstance(state, dict) else {}
