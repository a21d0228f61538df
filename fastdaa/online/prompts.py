"""The prompts of a run: as tokens for the policy, as in the data for reward sources."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdaa.counted import counted
from fastdaa.data.reports import counted_reason
from fastdaa.data.tokenise_prompts import TokenizedPrompt, tokenize_prompts

logger = logging.getLogger(__name__)
_SAMPLED = 256


def prompts_fact(prompts: Sequence[Tensor]) -> str:
    """The number of prompts and a digest of some, spread over all: which data a run is of.

    Args:
        prompts: ``[n]`` int64 each.
    """
    places = np.unique(np.linspace(0, len(prompts) - 1, _SAMPLED).astype(np.int64))
    digest = hashlib.sha256()
    for place in places:
        ids = np.asarray(prompts[place], dtype=np.int64)
        digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
    return f"{counted(len(prompts), 'prompt')} {digest.hexdigest()[:12]}"


class Ending(NamedTuple):
    """How a chat template closes an answer."""

    end_id: int | None
    """The special token that ends it, if there is one."""
    tail: tuple[int, ...]
    """What the template writes behind that, such as a line break."""


class Prompts:
    """Different prompts, in their order.

    Args:
        prompts: tokenised; repetitions are left out.
    """

    def __init__(self, prompts: Sequence[TokenizedPrompt]) -> None:
        self._texts = {tuple(prompt.ids): prompt.text for prompt in reversed(prompts)}
        unique = dict.fromkeys(tuple(prompt.ids) for prompt in prompts)
        self.ids = [torch.tensor(ids, dtype=torch.int64) for ids in unique]

    def __len__(self) -> int:
        return len(self.ids)

    def original(self, ids: Tensor) -> Any:
        """The prompt as it is in the data, or None for one that is not among these."""
        return self._texts.get(tuple(ids.tolist()))

    @property
    def conversational(self) -> bool:
        """Whether they are lists of messages."""
        return any(isinstance(text, list) for text in self._texts.values())


def read_prompts(
    dataset: Any, tokenizer: Any, name: str, *, max_length: int | None, on_bad_row: Any = "error"
) -> Prompts:
    """Different prompts of a dataset, see :func:`fastdaa.data.tokenise_prompts.tokenize_prompts`.

    Raises:
        DataError: a prompt that cannot be used, or none left.
    """
    found, left_out = tokenize_prompts(
        dataset, tokenizer, max_length=max_length, on_bad_row=on_bad_row
    )
    prompts = Prompts(found)
    reasons = [f"left out {counted_reason(count, reason)}" for reason, count in left_out.items()]
    repeated = len(found) - len(prompts)
    reasons += [f"and {counted(repeated, 'repetition')}"] if repeated else []
    logger.info("%s: %s", name, ", ".join([counted(len(prompts), "different prompt"), *reasons]))
    return prompts


def chat_ending(tokenizer: Any) -> Ending:
    """How the chat template of a tokenizer closes an answer, seen on a short conversation.

    Raises:
        ValueError: the template does not take a question and its answer.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        rendered = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)
    except Exception as error:
        # A template is a program and can fail in any way.
        raise ValueError(
            f"chat_template: expected one that takes a question and its answer, got {error}"
        ) from error
    ids = rendered["input_ids"]
    special = special_ids(tokenizer) - {tokenizer.unk_token_id}
    answer = tokenizer(turns[1]["content"], add_special_tokens=False)["input_ids"]
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] in special:
            return Ending(ids[place], tuple(ids[place + 1 :]))
        if ids[place] in answer:
            break
    return Ending(None, ())


def special_ids(tokenizer: Any) -> set[int]:
    """All special tokens, also those that have no name, such as Llama 3's ``<|eot_id|>``."""
    return {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
