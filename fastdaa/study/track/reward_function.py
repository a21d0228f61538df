"""A Python function as the measure of quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdaa.online.reward_functions import FunctionReward
from fastdaa.online.reward_functions import RewardFunction as Function
from fastdaa.study.track.scoring import Sample, Scorer, ScorerError, Scores


class RewardFunction:
    """Calls ``function(prompts, completions)``.

    ``prompts`` are as in the data, text or lists of messages; ``completions`` are text, without the
    tokens that end them. The answer is a list (or array) of as many finite numbers.

    Args:
        function: the function, or where it is: ``module:function`` or ``path/to/file.py:function``.

    Raises:
        ScorerError: there is no such file, module or function.
    """

    column = "reward"

    def __init__(self, function: str | Function):
        try:
            self._reward = FunctionReward(function)
        except (ValueError, OSError) as error:
            raise ScorerError(str(error)) from error
        self.label = self._reward.label

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        prompts = [sample.prompt.text for sample in samples]
        try:
            rewards = self._reward.call(prompts, [sample.answer for sample in samples])
        except ValueError as error:
            raise ScorerError(str(error)) from error
        return Scores(rewards.tolist(), {})


def reward_scorer(given: str, *, device: Any, batch_size: int) -> Scorer:
    """The reward that ``given`` names: a function where it has a colon, else a reward model.

    Raises:
        ScorerError: there is none.
    """
    if ":" in given:
        return RewardFunction(given)
    from fastdaa.study.track.reward_model import RewardModel

    return RewardModel(given, device=device, batch_size=batch_size)
