"""Rewards by a sequence classifier with one output: one of ours, or any of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdaa.online.packs import make_packs
from fastdaa.online.prompts import Ending, special_ids
from fastdaa.online.reward_functions import FunctionReward, Original, as_rewards
from fastdaa.online.types import RewardSource
from fastdaa.train.adapter_files import tokenizer_source
from fastdaa.train.attention import enable_segments
from fastdaa.train.backbone import install_head_task, run_head_task
from fastdaa.train.reward_models import check_reward_model, last_tokens, load_classifier
from fastdaa.train.reward_text import reward_ids
from fastdaa.train.run_record import read_record, weights_fact
from fastdaa.train.support import supports_segments
from fastdaa.validation import check_positive


class ModelReward:
    """A :class:`~fastdaa.online.types.RewardSource` that reads a model at the last token.

    Where the model has the policy's tokenizer it gets the very tokens of prompt and completion, EOS
    included, packed without padding; behind a conversation's EOS comes what its chat template
    writes there, as in the pairs that it was trained on. Else it reads what
    :func:`~fastdaa.train.reward_text.reward_ids` says of their text.

    Args:
        model: a sequence classifier with a linear ``score`` of one output.
        tokenizer: its own, where it is not the policy's; None for the policy's tokens.
        original: gives prompts as they are in the data, for chat templates.
        ending: how the policy's chat template closes an answer; None for plain text.
        end_ids: tokens of the policy that end an answer, for a model with another tokenizer; None
            where all answers count as ended.
        joined: that tokenizer's chat template is for conversations alone.
        tokens_per_pack: tokens of one forward.

    Raises:
        ValueError: a model that is none, or cannot take packed rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        original: Original | None = None,
        *,
        ending: Ending | None = None,
        end_ids: Iterable[int] | None = None,
        joined: bool = False,
        tokens_per_pack: int = 8192,
    ) -> None:
        check_positive("tokens_per_pack", tokens_per_pack)
        check_reward_model(model)
        support = supports_segments(model, probe=True)
        if not support.ok:
            raise ValueError(f"model: expected one for packed rows, but {support.reason}")
        enable_segments(model)
        install_head_task(model)
        self._model: Any = model.eval().requires_grad_(False)
        self._tokenizer, self._original = tokenizer, original
        self._tokens_per_pack, self._ending = tokens_per_pack, ending
        self._end_ids, self._joined = None if end_ids is None else frozenset(end_ids), joined
        self.fact = weights_fact(model)

    @torch.no_grad()
    def score(
        self,
        prompt_ids: Sequence[Tensor],
        completion_ids: Sequence[Tensor],
        texts: Sequence[tuple[str, str]] | None = None,
    ) -> Tensor:
        """``[S]`` fp32 rewards.

        Raises:
            ValueError: a model with a tokenizer of its own and no texts.
        """
        if self._tokenizer is not None:
            prompt_ids, completion_ids = self._encode(prompt_ids, completion_ids, texts)
        elif self._ending is not None and self._ending.tail:
            tail = torch.tensor(self._ending.tail)
            completion_ids = [
                torch.cat([ids, tail]) if int(ids[-1]) == self._ending.end_id else ids
                for ids in completion_ids
            ]
        rewards = torch.empty(len(prompt_ids))
        device = self._model.device
        for sequences, pack in make_packs(
            prompt_ids, completion_ids, tokens_per_pack=self._tokens_per_pack, device=device
        ):
            last = last_tokens(pack)

            def read(hidden_states: Tensor, last: Tensor = last) -> Tensor:
                return self._model.score(hidden_states[0].index_select(0, last))[:, 0]

            rewards[sequences] = run_head_task(self._model, pack, read).result.float().cpu()
        return as_rewards(rewards, len(prompt_ids), "reward model").float()

    def _encode(
        self,
        prompt_ids: Sequence[Tensor],
        completion_ids: Sequence[Tensor],
        texts: Sequence[tuple[str, str]] | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Tokens of the model's own: all but the last stand for a prompt, as packs have them."""
        if texts is None:
            raise ValueError("reward: expected a tokenizer of the policy, to give the model text")
        rows = []
        for ids, answer, (prompt, completion) in zip(
            prompt_ids, completion_ids, texts, strict=True
        ):
            given = prompt if self._original is None else self._original(ids) or prompt
            finished = self._end_ids is None or int(answer[-1]) in self._end_ids
            row = reward_ids(
                self._tokenizer, given, completion, finished=finished, joined=self._joined
            )
            rows.append(torch.tensor(row, dtype=torch.int64))
        return [row[:-1] for row in rows], [row[-1:] for row in rows]


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers turn the same text into the same ids, as far as can be told.

    A padding token of its own, as reward models get one, does not count.
    """
    names = {str(t.pad_token) for t in (first, second)}
    return _vocabulary(first, names) == _vocabulary(second, names)


def _vocabulary(tokenizer: Any, without: set[str]) -> dict[str, int]:
    return {token: id for token, id in tokenizer.get_vocab().items() if token not in without}


def load_reward(
    given: str,
    tokenizer: Any,
    original: Original | None = None,
    *,
    ending: Ending | None = None,
    device: Any = "cpu",
    dtype: Any = torch.float32,
    **options: Any,
) -> RewardSource:
    """The reward that ``given`` names: a function where it has a colon, else a model.

    Args:
        given: ``module:function``, ``path/to/file.py:function``, a folder or a hub id.
        tokenizer: the policy's.
        original: gives prompts as they are in the data.
        ending: how the policy's chat template closes an answer; None for plain text.
        device, dtype: of a model.
        options: passed on to ``from_pretrained``.

    Raises:
        ValueError, OSError: there is none.
    """
    if ":" in given:
        return FunctionReward(given, original)
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(tokenizer_source(given), **options)
    shared = same_tokenizer(own, tokenizer) and own.chat_template == tokenizer.chat_template
    try:
        model = load_classifier(given, dtype=dtype, **options)
        return ModelReward(
            model.to(device), None if shared else own, original, ending=ending,
            end_ids=special_ids(tokenizer), joined=read_record(given) is not None,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"reward: {str(error).removeprefix('model: ')}") from error
