"""A Python function as the measure of quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdaa.online.reward_functions import RewardFunction as Function
from fastdaa.online.reward_functions import function_name, load_function
from fastdaa.study.track.scoring import Sample, Scorer, ScorerError, Scores, finite_numbers


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
        self.label = function if isinstance(function, str) else function_name(function)
        try:
            self._function = load_function(function) if isinstance(function, str) else function
        except (ValueError, OSError) as error:
            raise ScorerError(str(error)) from error

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        prompts = [sample.prompt.text for sample in samples]
        try:
            given = self._function(prompts, [sample.answer for sample in samples])
        except Exception as error:
            # Anything may go wrong in somebody else's function.
            raise ScorerError(
                f"reward function {self.label} failed: {type(error).__name__}: {error}"
            ) from error
        return Scores(finite_numbers(given, len(samples), f"reward function {self.label}"), {})


def reward_scorer(given: str, *, device: Any, batch_size: int) -> Scorer:
    """The reward that ``given`` names: a function where it has a colon, else a reward model.

    Raises:
        ScorerError: there is none.
    """
    if ":" in given:
        return RewardFunction(given)
    from fastdaa.study.track.reward_model import RewardModel

    return RewardModel(given, device=device, batch_size=batch_size)
