"""Calls of ``pair_loss`` for tests of the single pass that keeps gradients of logits."""

from __future__ import annotations

import torch

from fastdaa import LmHead, Objective, PairLogps, TokenSelection, pair_loss, single_pass_memory

COUNTS = (6, 4, 1, 3, 8, 2, 0, 5)
V, D = 131, 24
EVERYTHING = {"softcap": 3.0, "logit_scale": 1.4, "temperature": 0.7}


class Linear:
    """Sends any gradient through a pair loss: the reference is the coefficients."""

    needs_ref, coupled, has_token_level = True, False, False

    def __init__(self, sparse: bool = False):
        self.sparse = sparse

    def __call__(self, policy: PairLogps, ref: PairLogps, totals, token_losses):
        return (ref.chosen * policy.chosen + ref.rejected * policy.rejected) * totals.pairs


def keep_at_most(monkeypatch, kept: int) -> None:
    """Gradients of logits of so many bytes are kept where there is no ``max_bytes``."""
    monkeypatch.setattr(single_pass_memory, "_most_kept", lambda size: kept)
    monkeypatch.setattr(single_pass_memory, "_default_limit", lambda room: 1 << 40)


def tensors(dtype, counts=COUNTS, v=V, d=D, bias=False):
    """Leaves ``[hidden states, weight, bias]``, with logits of a few nats, and a selection."""
    n = sum(counts)
    targets = torch.randint(v, (n,))
    made = [torch.randn(n, d), torch.randn(v, d) * 0.6, torch.randn(v) if bias else None]
    leaves = [None if t is None else t.to(dtype).requires_grad_() for t in made]
    return leaves, TokenSelection(torch.arange(n), targets, torch.tensor(counts), tuple(counts))


def run(leaves, selection, objective, *, options=None, scale=1.0, **kwargs):
    """Output and gradients of ``scale * loss``."""
    copies = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    kwargs.setdefault("ref_logps", torch.linspace(-30, -5, len(selection.counts)))
    out = pair_loss(
        copies[0], LmHead(*copies[1:], **(options or {})), selection, objective, **kwargs
    )
    wanted = [t for t in copies if t is not None]
    return out, torch.autograd.grad(out.loss, wanted, torch.tensor(scale, dtype=out.loss.dtype))


def truth(leaves, selection, objective, **kwargs):
    wide = [None if t is None else t.detach().double() for t in leaves]
    return run(wide, selection, objective, impl="reference", **kwargs)


class OneSign:
    """Coefficients of one sign, hidden states with a common mean of so many standard deviations,
    targets drawn from the model: the targets' part of the weight's gradient and the others cancel.
    """

    def __init__(self, mean: float, n: int = 2048, v: int = 512, d: int = 64):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, d, generator=generator)
        hidden += mean * torch.randn(1, d, generator=generator)
        self.hidden = hidden.bfloat16().requires_grad_()
        self.weight = (torch.randn(v, d, generator=generator) / 11).bfloat16().requires_grad_()
        p = (self.hidden.double() @ self.weight.double().T).softmax(dim=1)
        self.targets = torch.multinomial(p, 1, generator=generator)[:, 0]
        usual = self.gradients(self.materialised)
        self.exact = self.gradients(self.materialised, torch.float64)
        self.usual = [relative(*pair) for pair in zip(usual, self.exact, strict=True)]

    @staticmethod
    def materialised(hidden, weight, targets):
        """``(h @ w.T).float()`` and autograd; fp64 as it is."""
        z = hidden @ weight.T
        z = z.float() if z.dtype == torch.bfloat16 else z
        return z.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

    def gradients(self, logps_of, dtype=torch.bfloat16):
        leaves = [t.detach().to(dtype).clone().requires_grad_() for t in (self.hidden, self.weight)]
        return torch.autograd.grad(logps_of(*leaves, self.targets).sum(), leaves)

    def check(self, gradients) -> None:
        """No worse than materialised logits, nor than three roundings to the nearest."""
        for got, exact, usual in zip(gradients, self.exact, self.usual, strict=True):
            assert relative(got, exact) <= min(usual, 2.8e-3)


def relative(got, want) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def check_wanted_alone(leaves, selection, wanted):
    """The leaves ``wanted``, by their numbers, have the gradients that all together have."""
    objective, ref = Objective.parse("dpo"), torch.zeros(len(COUNTS))
    _, expected = run(leaves, selection, objective, ref_logps=ref)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i in wanted)
    pair_loss(
        leaves[0], LmHead(*leaves[1:]), selection, objective, ref_logps=ref, impl="single_pass"
    ).loss.backward()
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[i]) if i in wanted else leaf.grad is None
