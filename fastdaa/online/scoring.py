"""What a model says of completions, without gradient: log-probs, entropies, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdaa.online.critic import Critic
from fastdaa.online.packs import token_index
from fastdaa.online.ranks import add_up
from fastdaa.plan_call import plan_call
from fastdaa.score import score
from fastdaa.selection import select_rows
from fastdaa.train.backbone import causal_lm, run_head_task
from fastdaa.train.sharding import head_in_force

Packs = Sequence[tuple[Tensor, Mapping[str, Any]]]


class TokenScores(NamedTuple):
    """Of every completion token, each ``[N]`` fp32 on the CPU."""

    logps: Tensor
    """Log-prob of the token, nats."""
    entropy: Tensor
    """Entropy of the distribution that it was drawn from, nats."""
    max_prob: Tensor
    """Probability of the likeliest token at its place."""
    values: Tensor | None = None
    """Of the state before it, where the model has a shared critic."""


@torch.no_grad()
def score_tokens(
    model: nn.Module,
    packs: Packs,
    lengths: Tensor,
    *,
    temperature: float = 1.0,
    critic: Critic | None = None,
    engine: str = "auto",
    max_bytes: int | None = None,
) -> TokenScores:
    """Scores of all tokens, in the order of the sequences (1U a token).

    Args:
        model: with ``install_head_task``, in evaluation mode.
        packs: see :func:`fastdaa.online.packs.packs_of_process`.
        lengths: ``[S]`` int64, completion tokens of every sequence, on the CPU.
        critic: a shared one, whose values are wanted.
    """
    core = causal_lm(model)
    columns = 3 if critic is None else 4
    scores = torch.zeros(columns, int(lengths.sum()))
    for sequences, pack in packs:

        def task(hidden_states: Tensor, pack: Mapping[str, Any] = pack) -> list[Tensor]:
            rows = select_rows(hidden_states.flatten(0, 1), pack["rows"])
            with head_in_force(core) as whole:
                head = replace(whole.detach(), temperature=temperature)
                plan = plan_call(rows, head, stats=True, engine=engine, max_bytes=max_bytes)
                state, stats = score(rows, head, pack["targets"], plan, stats=True)
            assert stats is not None
            # The largest term of the sum is exp(0).
            found = [state.logps, stats.entropy, (-state.log_s).exp()]
            return found if critic is None else [*found, critic.head(rows)]

        found = run_head_task(model, pack, task).result
        if pack.get("counted", True):
            scores[:, token_index(lengths, sequences)] = torch.stack(found).float().cpu()
    return TokenScores(*add_up(scores, core.device))


@torch.no_grad()
def score_values(critic: Critic, packs: Packs, lengths: Tensor) -> Tensor:
    """``[N]`` fp32 on the CPU: values by a critic with a backbone of its own."""
    values = torch.zeros(int(lengths.sum()))
    for sequences, pack in packs:
        found = critic(pack)
        if pack.get("counted", True):
            values[token_index(lengths, sequences)] = found.float().cpu()
    return add_up(values, next(critic.parameters()).device)
