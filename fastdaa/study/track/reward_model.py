"""A reward model from a path: a sequence classifier with one output."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fastdaa.study.track.scoring import Sample, ScorerError, Scores, finite_numbers

logger = logging.getLogger(__name__)


class RewardModel:
    """Scores prompt and answer together, with the model's own tokenizer and chat template.

    A conversation is rendered by the model's chat template with the answer as the assistant's last
    message; text is prompt and answer joined. The value is the model's single output. Inputs
    beyond the model's length are cut at their end, which is logged once.

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

        self.label = path
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(path))
            model = load_classifier(path, dtype="auto")
        except Exception as error:
            raise ScorerError(
                f"reward: expected module:function, path/to/file.py:function, or a sequence "
                f"classifier with its tokenizer; {path} cannot be loaded: {_first_line(error)}"
            ) from error
        if model.config.num_labels != 1:
            raise ScorerError(
                f"reward: expected a model with 1 output, {path} has {model.config.num_labels}"
            )
        self._model = model.to(device).eval().requires_grad_(False)
        self._batch_size = batch_size
        self._warned = False
        self._longest = _longest(self._tokenizer, model.config)
        self._prepare_padding()

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        texts = [self._render(sample) for sample in samples]
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        values = [0.0] * len(texts)
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            for place, value in zip(places, self._score([texts[p] for p in places]), strict=True):
                values[place] = value
        return Scores(finite_numbers(values, len(samples), f"reward model {self.label}"), {})

    @torch.no_grad()
    def _score(self, texts: list[str]) -> list[float]:
        # A chat template has written its special tokens already.
        plain = self._tokenizer.chat_template is None
        encoded = self._tokenizer(texts, add_special_tokens=plain, verbose=False)["input_ids"]
        if self._longest is not None and any(len(ids) > self._longest for ids in encoded):
            if not self._warned:
                logger.warning("reward model: cutting inputs to %d tokens", self._longest)
            self._warned = True
            encoded = [ids[: self._longest] for ids in encoded]
        batch = self._tokenizer.pad({"input_ids": encoded}, return_tensors="pt")
        inputs = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        values: list[float] = self._model(**inputs).logits[:, 0].float().tolist()
        return values

    def _render(self, sample: Sample) -> str:
        prompt, template = sample.prompt.text, self._tokenizer.chat_template
        if isinstance(prompt, str):
            if template is None:
                return prompt + sample.answer
            prompt = [{"role": "user", "content": prompt}]
        elif template is None:
            raise ScorerError(
                f"reward model {self.label}: expected a chat template in its tokenizer, since the "
                "prompts are conversations, got none"
            )
        messages = [*prompt, {"role": "assistant", "content": sample.answer}]
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:
            # A template is a program and can fail in any way.
            raise ScorerError(
                f"reward model {self.label}: its chat template failed: {_first_line(error)}"
            ) from error

    def _prepare_padding(self) -> None:
        """Padding that the model recognises: it reads the value at the last token before it."""
        tokenizer, config = self._tokenizer, self._model.config
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise ScorerError(
                    f"reward model {self.label}: expected a tokenizer with a pad or EOS token"
                )
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "right"
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = tokenizer.pad_token_id
        if config.pad_token_id != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)


def _longest(tokenizer: Any, config: Any) -> int | None:
    known = [tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    # Tokenizers without a limit have an astronomic one.
    sane = [int(limit) for limit in known if limit is not None and 0 < limit < 1_000_000]
    return min(sane, default=None)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
