"""What an objective needs beside the policy's log-probs, checked and cut to ranges of pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastdaa.chunks import Chunk
from fastdaa.logps import pair_logps, sequence_logps
from fastdaa.losses import Objective
from fastdaa.losses.hyperparameters import check_advantages
from fastdaa.losses.weights import desensitized, on_policy_weights, tail_tokens
from fastdaa.outputs import (
    BatchTotals,
    PairLogps,
    PairLossOutput,
    TokenSelection,
    TokenStats,
    short,
)
from fastdaa.validation import (
    check_counts,
    check_device,
    check_indices,
    check_kind,
    check_not_negative,
    check_vector,
)


class PairBatch:
    """Everything an objective needs beside the policy's log-probs, cut to any range of pairs."""

    def __init__(
        self,
        selection: TokenSelection,
        objective: Objective,
        ref_logps: Tensor | None,
        ref_token_logps: Tensor | None,
        completion_lengths: Tensor | None,
        advantages: Tensor | None,
        totals: BatchTotals | None,
        engine: str = "torch",
    ):
        self.ref_is_summed = False
        sequences, tokens = len(selection.counts), sum(selection.counts)
        if sequences % 2 or not sequences:
            raise ValueError(f"selection: expected 2B > 0 sequences, got {sequences}")
        check_counts("selection.lengths", selection.lengths, selection.counts)
        device = selection.targets.device
        for name, tensor in (("rows", selection.rows), ("lengths", selection.lengths)):
            check_device(f"selection.{name}", tensor, device)
        if ref_token_logps is not None:
            check_vector("ref_token_logps", ref_token_logps, tokens, device)
            ref_token_logps = ref_token_logps.detach().contiguous()
        elif getattr(objective, "needs_ref_tokens", False):
            sums = "" if ref_logps is None else "; ref_logps, which are sums, are not enough"
            raise ValueError(
                f"ref_token_logps: expected [{tokens}] for {objective}, got None{sums}"
            )
        alpha, self.weighted = weighting_of(objective)
        self.tail, self.alpha = None, 1.0 if alpha is None else alpha
        if alpha is not None and ref_token_logps is not None:
            self.tail = tail_tokens(selection.lengths, tokens)
            weighted = desensitized(ref_token_logps, self.tail, alpha)
            ref_logps = sequence_logps(weighted, selection.lengths)
        elif ref_token_logps is not None and ref_logps is None:
            self.ref_is_summed = True
            ref_logps = sequence_logps(ref_token_logps, selection.lengths)
        if ref_logps is not None:
            check_vector("ref_logps", ref_logps, sequences, device)
            ref_logps = ref_logps.detach().contiguous()
        elif objective.needs_ref:
            raise ValueError(f"ref_logps: expected [{sequences}] for {objective}, got None")
        if completion_lengths is None:
            completion_lengths = selection.lengths
        check_indices("completion_lengths", completion_lengths, (sequences,))
        check_device("completion_lengths", completion_lengths, device)
        check_not_negative("completion_lengths", completion_lengths)
        check_advantages(advantages, objective)
        if advantages is not None:
            check_vector("advantages", advantages, sequences, device)
            advantages = advantages.detach().contiguous()
        self.selection, self.objective, self.advantages = selection, objective, advantages
        self.completion_lengths = completion_lengths.contiguous()
        self.ref_logps, self.ref_token_logps = ref_logps, ref_token_logps
        here = BatchTotals(sequences // 2, max(sum(selection.counts[::2]), 1), tokens)
        if totals is not None:
            _check_totals(totals)
        self.totals = here if totals is None else totals
        self.in_kernel = engine == "triton" and _has_kernel(objective)
        self.everything = Chunk(slice(0, sequences // 2), slice(0, tokens))

    @property
    def _tokens(self) -> int:
        """Divisor of token-level terms."""
        return self.totals.tokens or sum(self.selection.counts)

    def evaluate(
        self, token_logps: Tensor, chunk: Chunk, stats: TokenStats | None
    ) -> tuple[Tensor, Tensor]:
        """Losses ``[b]`` of a chunk, and the derivatives ``[n]`` of the batch's mean by its tokens'
        log-probs, both without gradient."""
        if self.in_kernel:
            return self._in_kernel(token_logps, chunk)
        with torch.enable_grad(), _without_hooks():
            leaf = token_logps.detach().requires_grad_()
            losses = self.losses(leaf, chunk, stats)
            if not losses.requires_grad:
                return losses.detach(), torch.zeros_like(token_logps)
            _check_reads_alone(losses, leaf)
            (coefficients,) = torch.autograd.grad(losses.sum() / self.totals.pairs, leaf)
        return losses.detach(), coefficients

    def _in_kernel(self, token_logps: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """One launch a term of the objective, in place of autograd through some thirty."""
        from fastdaa.objective_kernel import evaluate_objective

        sequences = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
        ref, ref_tokens, advantages = self.ref_logps, self.ref_token_logps, self.advantages
        values = evaluate_objective(
            self.objective,
            token_logps,
            self.selection.lengths[sequences],
            totals=self.totals._replace(tokens=self._tokens),
            # Token log-probs are summed as the policy's are: a margin of 0 is exactly 0.
            ref_logps=None if ref is None or self.ref_is_summed else ref[sequences].float(),
            ref_token_logps=None if ref_tokens is None else ref_tokens[chunk.tokens].float(),
            completion_lengths=self.completion_lengths[sequences],
            advantages=None if advantages is None else advantages[sequences],
        )
        assert values.token_coefficients is not None
        return values.losses, values.token_coefficients / self.totals.pairs

    def losses(self, token_logps: Tensor, chunk: Chunk, stats: TokenStats | None) -> Tensor:
        """Losses ``[b]`` of a chunk's pairs from its token log-probs ``[n]``; differentiable.

        With ``use_weighting`` they need the statistics of the tokens.
        """
        sequences = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
        lengths = self.selection.lengths[sequences]
        completion = self.completion_lengths[sequences]
        policy = pair_logps(sequence_logps(token_logps, lengths), completion)
        more: dict[str, Any] = {}
        if self.tail is not None:
            weighted = desensitized(token_logps, self.tail[chunk.tokens], self.alpha)
            more["unweighted"] = policy
            policy = pair_logps(sequence_logps(weighted, lengths), completion)
        if self.weighted:
            assert stats is not None
            more["pair_weights"] = pair_weights(stats.log_sum_sq, token_logps, lengths)
        ref = None
        if self.ref_logps is not None:
            ref = pair_logps(self.ref_logps[sequences].to(policy.chosen.dtype), completion)
        token_part = None
        if self.objective.has_token_level:
            ref_tokens, advantages = self.ref_token_logps, self.advantages
            token_part = self.objective.token_losses(
                token_logps,
                None if ref_tokens is None else ref_tokens[chunk.tokens],
                lengths,
                advantages=None if advantages is None else advantages[sequences],
                pairs=self.totals.pairs,
                tokens=self._tokens,
            )
        return self.objective(policy, ref, self.totals, token_part, **more)

    def output(
        self, loss: Tensor, losses: Tensor, logps: Tensor, stats: TokenStats | None, told: bool
    ) -> PairLossOutput:
        """The public result; ``told`` says that the statistics belong to it."""
        sums = sequence_logps(logps, self.selection.lengths)
        policy: PairLogps = pair_logps(sums, self.completion_lengths)
        weights = None
        if self.weighted and stats is not None:
            weights = pair_weights(stats.log_sum_sq, logps, self.selection.lengths)
        return PairLossOutput(loss, losses, policy, logps, stats if told else None, weights)


def pair_weights(log_sum_sq: Tensor, token_logps: Tensor, lengths: Tensor) -> Tensor:
    """WPO's weights ``[B]`` of pairs, no gradient, from the log-probs ``[N]`` of their tokens and
    the logs of the sums of all squared probabilities."""
    return on_policy_weights(sequence_logps(token_logps - log_sum_sq, lengths), lengths)


@contextmanager
def _without_hooks() -> Iterator[None]:
    """Leaves hooks on saved tensors to what waits for the caller's backward pass.

    Those of activation checkpointing would compute the whole call again, for the few numbers that a
    graph inside it saves.
    """
    with ExitStack() as stack:
        with suppress(RuntimeError):  # raised where hooks are disabled: then there are none
            stack.enter_context(saved_tensors_hooks(_unchanged, _unchanged))
        yield


def _unchanged(tensor: Tensor) -> Tensor:
    # Without its graph: a node that saved its own result would hold itself, for good where the loss
    # does not reach it.
    return tensor.detach()


def _check_reads_alone(losses: Tensor, leaf: Tensor) -> None:
    """Raise ``ValueError`` if the losses have a gradient for another tensor than ``leaf``.

    A function of the caller's may read one, as a scale that is learned, whose gradient would be
    lost here.
    """
    pending, seen = [losses.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", leaf)
        if variable is not leaf:
            raise ValueError(
                "objective: expected a function of the log-probs alone, got one that reads another "
                f"tensor that requires a gradient, {short(variable)}; detach it, or take the loss "
                "outside the head with impl='recompute' (without torch.compile) or token_logps"
            )
        pending += [following for following, _ in node.next_functions]


def _check_totals(totals: BatchTotals) -> None:
    """Raise for what no batch can have."""
    check_kind("totals", totals, BatchTotals, "BatchTotals(pairs, chosen_tokens)")
    for name, number, least in zip(totals._fields, totals, (1, 0, 0), strict=True):
        if number is not None and number < least:
            raise ValueError(f"totals.{name}: expected {least} or more, got {number}")


def _has_kernel(objective: Objective) -> bool:
    from fastdaa.objective_kernel import has_kernel

    plain = weighting_of(objective) == (None, False)
    return plain and isinstance(objective, Objective) and has_kernel(objective)


def weighting_of(objective: Objective) -> tuple[float | None, bool]:
    """``ld_alpha`` and ``use_weighting``; what is called like an objective may have neither."""
    own = isinstance(objective, Objective)
    return (objective.ld_alpha, objective.use_weighting) if own else (None, False)
