"""Seeded inputs of a case: hidden states, weight, targets, pairs and reference log-probs.

Random hidden states give nearly uniform predictions, which no trained model makes and which
flatter methods that skip small probabilities. ``peaked`` inputs have logits up to about 40: every
row prefers one token, with three others 4, 6 and 8 below it, above a background of deviation 3
that shuffles them a little and drowns the weakest preferences. The target is drawn among the four.
It has a probability above one half in about two rows of three; the mean entropy is about 1.3 nats
(flat: about 10). The gate's oracle computes it, and every row states it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdaa.benchmarks.cases import Case

_BACKGROUND = 3.0
_PREFERENCE = (10.0, 40.0)
_GAPS = (0.0, 4.0, 6.0, 8.0)
# What the reference's hidden states differ by: about 0.3 nat a token.
_REFERENCE_NOISE = 0.3
_ROWS = 512


@dataclass
class HeadInputs:
    """Everything a contender may read. Leaves require gradients as the case wants them."""

    case: Case
    hidden: Tensor
    """``[N, D]``, sequence by sequence, pair-major: chosen, rejected, chosen, ..."""
    weight: Tensor
    """``[V, D]``."""
    targets: Tensor
    """``[N]`` int64."""
    cotangent: Tensor
    """``[N]`` fp32: what ``"logps"`` multiplies the log-probs by before it sums them."""
    counts: tuple[int, ...]
    """Tokens of the ``2B`` sequences."""
    lengths: Tensor
    """``[2B]`` int64, the same on the device."""
    ref_logps: Tensor | None
    """``[N]`` fp32 log-probs of the reference, for losses."""
    ref_hidden: Tensor | None
    """``[N, D]`` of the reference, for losses with an online reference; its weight is the values of
    ``weight``."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.hidden.device

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Tensors whose gradients are wanted: the hidden states, then the weight."""
        if not self.case.wants_grad:
            return ()
        return (self.hidden, self.weight) if self.case.head_grad else (self.hidden,)


def make_inputs(case: Case, seed: int = 0, device: str | torch.device = "cpu") -> HeadInputs:
    """Inputs of a case, the same for a seed and a device type."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, case.dtype)
    n, v, d = case.tokens, case.vocab, case.hidden

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    weight = normal(v, d).mul_(d**-0.5)
    targets = torch.randint(v, (n,), generator=generator, device=device)
    if case.distribution == "flat":
        hidden = normal(n, d)
    else:
        hidden = normal(n, d).mul_(_BACKGROUND)
        targets = _prefer(hidden, weight, targets, generator)
    counts = sequence_counts(case, seed)
    inputs = HeadInputs(
        case, hidden.to(dtype), weight.to(dtype), targets, normal(n) / n**0.5, counts,
        torch.tensor(counts, device=device), None, None,
    )  # fmt: skip
    if case.is_loss:
        ref_hidden = (hidden + _REFERENCE_NOISE * normal(n, d)).to(dtype)
        inputs.ref_logps = _log_probs(ref_hidden, inputs.weight, targets, case.softcap)
        inputs.ref_hidden = ref_hidden if case.reference == "online" else None
    for leaf in inputs.leaves:
        leaf.requires_grad_()
    return inputs


def _prefer(hidden: Tensor, weight: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """Make rows of ``hidden`` prefer four tokens each, in place; targets ``[N]`` among them."""
    n, device = hidden.shape[0], hidden.device
    low, high = _PREFERENCE
    level = low + (high - low) * torch.rand(n, generator=generator, device=device)
    others = torch.randint(weight.shape[0], (n, 3), generator=generator, device=device)
    liked = torch.cat([targets[:, None], others], dim=1)
    gaps = torch.tensor(_GAPS, device=device)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        directions = weight[liked[rows]]
        directions = directions / directions.square().sum(dim=-1, keepdim=True)
        hidden[rows] += ((level[rows, None] - gaps)[..., None] * directions).sum(dim=1)
    share = torch.softmax(-gaps, dim=0).expand(n, -1)
    chosen = torch.multinomial(share, 1, generator=generator)
    return liked.gather(1, chosen)[:, 0]


def sequence_counts(case: Case, seed: int) -> tuple[int, ...]:
    """Tokens of the ``2B`` sequences, pair-major, with sum ``N``."""
    sequences = 2 * case.pairs
    if case.lengths == "equal":
        shares = torch.ones(sequences, dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(seed)
        shares = 8.0 ** torch.rand(sequences, generator=generator, dtype=torch.float64)
    ends = (shares.cumsum(0) / shares.sum() * case.tokens).round().long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    return tuple(counts.tolist())


def _log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Log-probs ``[N]`` from fp32 logits, a block of rows at a time."""
    parts = []
    wide = weight.float()
    for start in range(0, hidden.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        z = hidden[rows].float() @ wide.T
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        target = z.gather(1, targets[rows, None])[:, 0]
        parts.append(target - torch.logsumexp(z, dim=1))
    return torch.cat(parts)
