"""A Python function as the reward, from a module or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdaa.counted import counted
from fastdaa.validation import shown

RewardFunction = Callable[[list[Any], list[str]], Any]
"""From prompts (as in the data: text or messages) and completions (text) to as many numbers."""
Original = Callable[[Tensor], Any]
"""From the token ids of a prompt to the prompt as it is in the data, or None."""


class FunctionReward:
    """A :class:`~fastdaa.online.types.RewardSource` that calls ``function(prompts, completions)``.

    Completions are text, without the tokens that end them. The answer is a list (or array) of as
    many finite numbers.

    Args:
        function: the function, or where it is: ``module:function`` or ``path/to/file.py:function``.
        original: gives prompts as they are in the data; else the function gets decoded tokens.

    Raises:
        ValueError: there is no such module or function.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, function: str | RewardFunction, original: Original | None = None) -> None:
        self.label = function if isinstance(function, str) else function_name(function)
        self._function = load_function(function) if isinstance(function, str) else function
        self._original = original

    @property
    def fact(self) -> str:
        """What it is, for a run that goes on with it."""
        return self.label

    def score(
        self,
        prompt_ids: Sequence[Tensor],
        completion_ids: Sequence[Tensor],
        texts: Sequence[tuple[str, str]] | None = None,
    ) -> Tensor:
        """``[S]`` fp64 rewards.

        Raises:
            ValueError: no texts, or the function failed or answered nonsense.
        """
        if texts is None:
            raise ValueError(f"reward {self.label}: expected a tokenizer, functions read text")
        prompts: list[Any] = [prompt for prompt, _ in texts]
        if self._original is not None:
            found = [self._original(ids) for ids in prompt_ids]
            prompts = [t if f is None else f for t, f in zip(prompts, found, strict=True)]
        return self.call(prompts, [completion for _, completion in texts])

    def call(self, prompts: list[Any], completions: list[str]) -> Tensor:
        """``[S]`` fp64 rewards of completions as the function gets them.

        Raises:
            ValueError: the function failed or answered nonsense.
        """
        try:
            given = self._function(prompts, completions)
        except Exception as error:
            # Anything may go wrong in somebody else's function.
            raise ValueError(
                f"reward {self.label} failed: {type(error).__name__}: {error}"
            ) from error
        return as_rewards(given, len(completions), f"reward {self.label}")


def as_rewards(given: Any, count: int, where: str) -> Tensor:
    """``given`` as ``[count]`` fp64 on the CPU.

    Raises:
        ValueError: it is something else than so many numbers that are finite in fp32.
    """
    try:
        values = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}: expected a list of {counted(count, 'number')}, got {shown(given)}"
        ) from error
    if values.shape != (count,):
        raise ValueError(
            f"{where}: expected {counted(count, 'number')}, got the shape {list(values.shape)}"
        )
    finite = torch.isfinite(values.float())
    if not bool(finite.all()):
        place = int((~finite).nonzero()[0])
        raise ValueError(
            f"{where}: expected finite numbers, got {float(values[place])} at place {place}"
        )
    return values


def load_function(given: str) -> RewardFunction:
    """The function that ``module:function`` or ``path/to/file.py:function`` names.

    Raises:
        ValueError: it cannot be imported, or is no function.
        FileNotFoundError: there is no such file.
    """
    place, _, name = given.rpartition(":")
    if not place or not name:
        raise ValueError(
            f"reward: expected module:function or path/to/file.py:function, got {given!r}"
        )
    path = Path(place).expanduser()
    if place.endswith(".py") and not path.is_file():
        raise FileNotFoundError(f"reward: expected a Python file, there is no {path}")
    try:
        module = _from_file(path) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ValueError(
            f"reward: {place} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward: expected a function {name!r} in {place}, there is none")
    return function


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"fastdaa_reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the file look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def function_name(function: RewardFunction) -> str:
    """What messages call it."""
    return str(getattr(function, "__qualname__", type(function).__name__))
