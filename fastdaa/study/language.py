"""The language: one-token prompts, and every response that can follow them.

A response is up to ``longest`` content tokens. A shorter one ends with EOS; one of ``longest``
tokens is over by itself and has no EOS. So the probability of a response is the product over
exactly the tokens that :meth:`Language.completion_ids` returns, training pairs hold those tokens
and no others, generation stops after ``longest`` tokens, and the probabilities of all responses
sum to one.

Responses are numbered by length, then alphabetically: 0 is the empty one, 1 to 6 have one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Language:
    """Sizes and token ids: prompts first, then content, EOS and padding."""

    prompts: int = 8
    classes: int = 2
    class_size: int = 3
    longest: int = 6

    @property
    def tokens(self) -> int:
        """Content tokens, ``T``."""
        return self.classes * self.class_size

    @property
    def eos(self) -> int:
        """Id of the end of a response."""
        return self.prompts + self.tokens

    @property
    def pad(self) -> int:
        """Id that fills batches and never occurs."""
        return self.eos + 1

    @property
    def vocab_size(self) -> int:
        """Ids of the model's vocabulary."""
        return self.pad + 1

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Number of the first response of each length, and the number of all responses."""
        counts = [self.tokens**length for length in range(self.longest + 1)]
        return tuple(sum(counts[:length]) for length in range(self.longest + 2))

    @property
    def responses(self) -> int:
        """How many responses there are, ``R``: 55,987 by default."""
        return self.starts[-1]

    @property
    def table(self) -> Tensor:
        """Content tokens (0 to T - 1) of all responses, -1 after the end: ``[R, longest]``."""
        return _table(self.tokens, self.longest)

    @property
    def lengths(self) -> Tensor:
        """Content tokens of each response, EOS not counted: int64 ``[R]``."""
        return (self.table >= 0).sum(1)

    @property
    def repeats(self) -> Tensor:
        """Neighbours of the same class in each response: int64 ``[R]``."""
        table = self.table
        kinds = table // self.class_size
        return ((kinds[:, 1:] == kinds[:, :-1]) & (table[:, 1:] >= 0)).sum(1)

    @property
    def counts(self) -> Tensor:
        """How often each token occurs in each response: int64 ``[R, T]``."""
        return torch.stack([(self.table == token).sum(1) for token in range(self.tokens)], dim=1)

    def prompt_ids(self, prompt: int) -> list[int]:
        """The prompt as the model reads it."""
        return [prompt]

    def completion_ids(self, response: int) -> list[int]:
        """A response as the model writes it: its tokens, then EOS unless it has ``longest``."""
        ids = [self.prompts + token for token in self.table[response].tolist() if token >= 0]
        return ids if len(ids) == self.longest else [*ids, self.eos]

    def padded_completions(self) -> Tensor:
        """``completion_ids`` of all responses, padded: int64 ``[R, longest]``."""
        table = self.table
        ids = torch.where(table >= 0, table + self.prompts, self.pad)
        short = self.lengths < self.longest
        ids[short, self.lengths[short]] = self.eos
        return ids

    def response_numbers(self, completions: Tensor) -> Tensor:
        """The numbers of padded completions ``[S, longest]``, anything after the end ignored.

        Raises:
            ValueError: a token that is neither content nor EOS before the end of a completion.
        """
        ended = (completions == self.eos).cumsum(1) > 0
        tokens = completions - self.prompts
        if (((tokens < 0) | (tokens >= self.tokens)) & ~ended).any():
            raise ValueError(
                f"completions: expected content tokens {self.prompts} to {self.eos - 1} up to "
                f"EOS {self.eos} or {self.longest} tokens"
            )
        numbers = torch.zeros(len(completions), dtype=torch.int64)
        for position in range(self.longest):
            going = ~ended[:, position]
            numbers = torch.where(going, numbers * self.tokens + tokens[:, position], numbers)
        lengths = (~ended).sum(1)
        return numbers + torch.tensor(self.starts)[lengths]


LANGUAGE = Language()
"""8 prompts, two classes of 3 tokens, responses of 0 to 6 tokens: 55,987 a prompt."""


@lru_cache(maxsize=4)
def _table(tokens: int, longest: int) -> Tensor:
    parts = []
    for length in range(longest + 1):
        numbers = torch.arange(tokens**length)
        powers = tokens ** torch.arange(length - 1, -1, -1)
        digits = numbers[:, None] // powers % tokens
        parts.append(torch.nn.functional.pad(digits, (0, longest - length), value=-1))
    return torch.cat(parts)
