"""What travels between rollouts, rewards and updates, and the two interfaces of the outside.

Sizes: ``S`` sequences, ``N`` completion tokens of all of them. Nothing is padded: a quantity of
every token is ``[N]``, sequence by sequence, and ``lengths [S]`` cuts it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdaa.counted import counted


class Completions(NamedTuple):
    """What a policy wrote."""

    completion_ids: list[Tensor]
    """``S`` tensors ``[n]`` int64 on the CPU, at least one token each; EOS included if it came."""
    finished: Tensor
    """``[S]`` bool: EOS came, or the completion is over by itself; else it was cut off."""


class Rollouts(NamedTuple):
    """Prompts, what the policy wrote, and what that is worth."""

    prompt_ids: list[Tensor]
    """``S`` tensors ``[n]`` int64 on the CPU, at least one token each."""
    completion_ids: list[Tensor]
    """See :class:`Completions`."""
    finished: Tensor
    """See :class:`Completions`."""
    scores: Tensor
    """``[S]`` fp32: the reward after scaling and the penalty for a missing EOS."""
    raw_scores: Tensor
    """``[S]`` fp32: the reward as its source gave it."""

    @property
    def lengths(self) -> Tensor:
        """``[S]`` int64, completion tokens."""
        return torch.tensor([len(ids) for ids in self.completion_ids], dtype=torch.int64)

    @property
    def sizes(self) -> list[int]:
        """Tokens of prompts with their completions."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def __repr__(self) -> str:
        sequences = counted(len(self.prompt_ids), "sequence")
        return f"Rollouts({sequences}, {counted(int(self.lengths.sum()), 'token')})"


class RolloutSource(Protocol):
    """Generation of any kind."""

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        """One completion of every prompt, drawn from the policy as it is now.

        Args:
            model: the policy, a causal language model of transformers. Its training mode, attention
                implementation and weights have to be what they were when the call returns.
            prompts: ``S`` tensors ``[n]`` int64 on the CPU. A prompt that is to be answered several
                times is in the list several times.
            seed: the same seed, prompts and weights give the same completions, whatever was called
                before: a resumed run continues as if it had not stopped.
        """


class RewardSource(Protocol):
    """A reward for every completion: a model, a function, a table.

    Where it has an attribute ``fact``, a text that says which it is, a run can be resumed with the
    same one only.
    """

    def score(
        self,
        prompt_ids: Sequence[Tensor],
        completion_ids: Sequence[Tensor],
        texts: Sequence[tuple[str, str]] | None = None,
    ) -> Tensor:
        """``[S]`` finite rewards, read at the last token of each completion.

        Args:
            prompt_ids, completion_ids: as in :class:`Rollouts`.
            texts: prompts and completions as text, where there is a tokenizer.
        """


class Experience(NamedTuple):
    """Rollouts, and what the models said of every completion token before the first update."""

    rollouts: Rollouts
    old_logps: Tensor
    """``[N]`` fp32 log-probs under the policy that wrote them."""
    ref_logps: Tensor
    """``[N]`` fp32 log-probs under the reference."""
    values: Tensor
    """``[N]`` fp32: the critic at the position before each token, so of the state it was chosen
    in."""
    advantages: Tensor
    """``[N]`` fp32, not whitened."""
    returns: Tensor
    """``[N]`` fp32: advantages and values together, what the critic learns."""

    @property
    def lengths(self) -> Tensor:
        """``[S]`` int64, completion tokens."""
        return self.rollouts.lengths
