"""A reward model from a path: a sequence classifier with one output."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from fastdaa.study.track.scoring import Sample, ScorerError, Scores
from fastdaa.train.reward_text import first_line, reward_ids

logger = logging.getLogger(__name__)


class RewardModel:
    """Scores prompt and answer together, with the model's own tokenizer and chat template.

    It reads what :func:`~fastdaa.train.reward_text.reward_ids` says; one that this library has
    trained has seen text prompts joined with their answers. The value is the model's single output.
    Inputs beyond the model's length are cut at their end, which is logged once.

    Args:
        path: folder or hub id of a ``AutoModelForSequenceClassification`` with one label.
        device: where it runs, in the dtype that it is stored in.
        batch_size: samples of a forward.

    Raises:
        ScorerError: it cannot be loaded, or has more than one label.
    """

    column = "reward"

    def __init__(self, path: str, *, device: Any = "cpu", batch_size: int = 16):
        from transformers import AutoTokenizer

        from fastdaa.train.adapter_files import tokenizer_source
        from fastdaa.train.reward_models import load_classifier
        from fastdaa.train.run_record import read_record

        self.label = path
        self._joined = read_record(path) is not None
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(path))
            model = load_classifier(path, dtype="auto")
        except Exception as error:
            raise ScorerError(
                f"reward: expected module:function, path/to/file.py:function, or a sequence "
                f"classifier with its tokenizer; {path} cannot be loaded: {first_line(error)}"
            ) from error
        if model.config.num_labels != 1:
            raise ScorerError(
                f"reward: expected a model with 1 output, {path} has {model.config.num_labels}"
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._batch_size = batch_size
        self._warned = False
        self._longest = _longest(self._tokenizer, model.config)

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        rows = [self._encode(sample) for sample in samples]
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        values = [0.0] * len(rows)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            for place, value in zip(places, self._score([rows[p] for p in places]), strict=True):
                values[place] = value
        if not all(map(math.isfinite, values)):
            raise ScorerError(f"reward model {self.label}: expected finite numbers, got others")
        return Scores(values, {})

    def _encode(self, sample: Sample) -> list[int]:
        """Token ids of prompt and answer."""
        try:
            ids = reward_ids(
                self._tokenizer, sample.prompt.text, sample.answer, finished=sample.finished,
                joined=self._joined,
            )  # fmt: skip
        except ValueError as error:
            raise ScorerError(f"reward model {self.label}: {error}") from error
        if self._longest is not None and len(ids) > self._longest:
            if not self._warned:
                logger.warning("reward model: cutting inputs to %d tokens", self._longest)
            self._warned = True
        return ids[: self._longest]

    @torch.no_grad()
    def _score(self, rows: list[list[int]]) -> list[float]:
        config = self._model.config.get_text_config()
        pad = config.pad_token_id
        if pad is None:
            # Causal models read the last token that is not padding, so no row may end with it.
            pad = min(set(range(len(rows) + 1)) - {row[-1] for row in rows})
        ids = torch.full((len(rows), max(map(len, rows))), pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
            mask[place, : len(row)] = 1
        device, before = self._model.device, config.pad_token_id
        config.pad_token_id = pad
        try:
            output = self._model(input_ids=ids.to(device), attention_mask=mask.to(device))
        finally:
            config.pad_token_id = before
        values: list[float] = output.logits[:, 0].float().tolist()
        return values


def _longest(tokenizer: Any, config: Any) -> int | None:
    known = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    # Tokenizers without a limit have an astronomic one.
    sane = [int(limit) for limit in known if limit is not None and 0 < limit < 1_000_000]
    return min(sane, default=None)
