"""A Python function as the measure of quality."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdaa.study.track.scoring import Sample, Scorer, ScorerError, Scores, finite_numbers

Function = Callable[[list[Any], list[str]], Any]


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
        self.label = function if isinstance(function, str) else _name(function)
        self._function = _load(function) if isinstance(function, str) else function

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


def _name(function: Function) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))


def _load(given: str) -> Function:
    place, _, name = given.rpartition(":")
    if not place or not name:
        raise ScorerError(
            "reward: expected module:function or path/to/file.py:function, got " + repr(given)
        )
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except ScorerError:
        raise
    except Exception as error:
        raise ScorerError(
            f"reward: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ScorerError(f"reward: expected a function {name!r} in {place}, there is none")
    return function


def _from_file(path: Path) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise ScorerError(f"reward: expected a Python file, there is no {path}")
    spec = importlib.util.spec_from_file_location(f"fastdaa_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the file look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
