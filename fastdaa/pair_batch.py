"""What an objective needs beside the policy's log-probs, checked and cut to ranges of pairs."""

from __future__ import annotations

from torch import Tensor

from fastdaa.logps import pair_logps, sequence_logps
from fastdaa.losses import Objective
from fastdaa.outputs import BatchTotals, PairLogps, PairLossOutput, TokenSelection, TokenStats
from fastdaa.single_pass import Chunk
from fastdaa.validation import check_indices, check_shape


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
    ):
        sequences, tokens = len(selection.counts), sum(selection.counts)
        if sequences % 2 or not sequences:
            raise ValueError(f"selection: expected 2B > 0 sequences, got {sequences}")
        check_indices("selection.lengths", selection.lengths, (sequences,))
        if ref_token_logps is not None:
            check_shape("ref_token_logps", ref_token_logps, (tokens,))
            if ref_logps is None:
                ref_logps = sequence_logps(ref_token_logps, selection.lengths)
        if ref_logps is not None:
            check_shape("ref_logps", ref_logps, (sequences,))
        elif objective.needs_ref:
            raise ValueError(f"ref_logps: expected [{sequences}] for {objective}, got None")
        if completion_lengths is None:
            completion_lengths = selection.lengths
        check_indices("completion_lengths", completion_lengths, (sequences,))
        if advantages is not None:
            check_shape("advantages", advantages, (sequences,))
        self.selection, self.objective, self.advantages = selection, objective, advantages
        self.completion_lengths = completion_lengths
        self.ref_logps, self.ref_token_logps = ref_logps, ref_token_logps
        here = BatchTotals(sequences // 2, max(sum(selection.counts[::2]), 1), tokens)
        self.totals = here if totals is None else totals
        self.everything = Chunk(slice(0, sequences // 2), slice(0, tokens))

    def losses(self, token_logps: Tensor, chunk: Chunk) -> Tensor:
        """Losses ``[b]`` of the pairs of a chunk from its token log-probs ``[n]``."""
        sequences = slice(2 * chunk.pairs.start, 2 * chunk.pairs.stop)
        lengths = self.selection.lengths[sequences]
        completion = self.completion_lengths[sequences]
        policy = pair_logps(sequence_logps(token_logps, lengths), completion)
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
                tokens=self.totals.tokens or sum(self.selection.counts),
            )
        return self.objective(policy, ref, self.totals, token_part)

    def output(
        self, loss: Tensor, losses: Tensor, logps: Tensor, stats: TokenStats | None
    ) -> PairLossOutput:
        """The public result."""
        sums = sequence_logps(logps, self.selection.lengths)
        policy: PairLogps = pair_logps(sums, self.completion_lengths)
        return PairLossOutput(loss, losses, policy, logps, stats)
