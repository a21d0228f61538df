"""Exact divergences between two heads' next-token distributions, token by token.

Sampled log-ratios (k1) estimate the same quantities with far more variance; here every position
contributes its expectation over the whole vocabulary, without an ``[N, V]`` tensor. With ``l`` and
``l'`` the log-probabilities of policy and reference, ``p`` and ``q`` their exponentials and
``m = (p + q) / 2``, the values and their gradients by the policy's final logits are

    kl          KL(p || q)                         p_v (l_v - l'_v - KL(p || q))
    reverse_kl  KL(q || p)                         p_v - q_v
    js          (KL(p || m) + KL(q || m)) / 2      p_v (l_v - log m_v - KL(p || m)) / 2
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdaa.engines import logit_slope, scale_tile
from fastdaa.head import LmHead
from fastdaa.planner import HeadPlan, plan_head
from fastdaa.recompute import HeadGradients, rounded
from fastdaa.tiles import GradientFactor, Logits, blocks, product, without_autocast
from fastdaa.validation import check_choice, check_product

KINDS = ("kl", "reverse_kl", "js")


def token_divergence(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    kind: str = "kl",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """Divergence of the policy's next-token distribution from the reference's at every position.

    Differentiable towards the policy's hidden states, weight and bias; the reference is a constant.
    Costs 2U without gradient, 3U where the head is not trained (the gradient of the hidden states
    is made in the forward pass), else 6U.

    Args:
        hidden_states: ``[N, D]`` of the policy.
        head: head of the policy.
        ref_hidden_states: ``[N, D']`` of the reference at the same positions.
        ref_head: head of the reference, over the same vocabulary.
        kind: ``"kl"`` for ``KL(policy || ref)``, ``"reverse_kl"`` for ``KL(ref || policy)``,
            ``"js"`` for the Jensen-Shannon divergence (at most ln 2).
        engine: ``"torch"``, ``"fused"`` (values only, no logits in memory; contiguous inputs of
            one dtype up to fp32), or ``"auto"``, for now torch.
        max_bytes: bytes of fp32 logits held at a time, for each of the two heads.

    Returns:
        ``[N]`` in nats, fp32 (fp64 for fp64 inputs). ``"kl"`` is infinite where the reference
        excludes a token that the policy does not, ``"reverse_kl"`` in the opposite case.

    Raises:
        TypeError, ValueError: an unknown ``kind``, inputs of a wrong dtype or shape, another number
            of positions or another vocabulary, or an engine that cannot serve the call.
        ImportError: ``engine="fused"`` without the package triton.
    """
    check_choice("kind", kind, KINDS)
    check_choice("engine", engine, ("auto", "torch", "fused"))
    _check_pair(hidden_states, head, ref_hidden_states, ref_head)
    grad = torch.is_grad_enabled()
    plan = plan_head(
        head.vocab_size, hidden_states.device,
        hidden_grad=grad and hidden_states.requires_grad, head_grad=grad and head.trained,
        engine=engine, max_bytes=max_bytes,
    )  # fmt: skip
    ref_hidden_states, ref_head = ref_hidden_states.detach(), ref_head.detach()
    if plan.engine == "fused":
        return _fused(hidden_states, head, ref_hidden_states, ref_head, kind)
    ref = Logits(ref_hidden_states, ref_head)
    return _Divergence.apply(
        hidden_states, head.weight, head.bias, head.detach(), ref, kind, plan
    )  # fmt: skip


def token_kl(
    hidden_states: Tensor,
    head: LmHead,
    ref_hidden_states: Tensor,
    ref_head: LmHead,
    *,
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """:func:`token_divergence` with ``kind="kl"``: ``KL(policy || ref)``, ``[N]`` in nats."""
    return token_divergence(
        hidden_states, head, ref_hidden_states, ref_head, engine=engine, max_bytes=max_bytes
    )


def _check_pair(
    hidden_states: Tensor, head: LmHead, ref_hidden_states: Tensor, ref_head: LmHead
) -> None:
    for name, h in (("head", head), ("ref_head", ref_head)):
        if h.shard is not None:
            raise ValueError(f"{name}: expected the whole vocabulary, got a slice of it")
    check_product(hidden_states, head.weight)
    check_product(ref_hidden_states, ref_head.weight, "ref_")
    if hidden_states.shape[0] != ref_hidden_states.shape[0]:
        raise ValueError(
            f"ref_hidden_states: expected {hidden_states.shape[0]} positions as in hidden_states, "
            f"got {ref_hidden_states.shape[0]}"
        )
    if head.vocab_size != ref_head.vocab_size:
        raise ValueError(
            f"ref_head: expected a vocabulary of {head.vocab_size}, got {ref_head.vocab_size}"
        )


class _Divergence(torch.autograd.Function):
    """``apply(hidden_states, weight, bias, head, ref, kind, plan)`` to divergences ``[N]``."""

    @staticmethod
    def forward(
        ctx: Any, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, head: LmHead,
        ref: Logits, kind: str, plan: HeadPlan,
    ) -> Tensor:  # fmt: skip
        """The values; for a head that is not trained, also their slopes by the hidden states."""
        policy = Logits(hidden_states, head)
        with without_autocast(hidden_states.device):
            slopes = None
            if plan.path == "frozen":
                slopes = hidden_states.new_empty(hidden_states.shape, dtype=policy.wide)
            parts = [hidden_states.new_empty(0, dtype=policy.wide)]
            for rows in blocks(hidden_states.shape[0], plan.block_rows):
                values, dz = _compare(policy, ref, rows, kind, slopes is not None)
                parts.append(values)
                if slopes is not None and dz is not None:
                    slopes[rows] = _by_hidden(policy, dz)
        ctx.ref, ctx.kind, ctx.plan, ctx.operand = ref, kind, plan, policy.operand
        ctx.options = replace(head, weight=weight[:0], bias=None)
        ctx.save_for_backward(hidden_states, weight, bias, slopes)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, coefficients: Tensor) -> tuple[Tensor | None, ...]:
        """A row scale where slopes were kept, else both heads' logits once more."""
        hidden_states, weight, bias, slopes = ctx.saved_tensors
        nothing = (None,) * 4
        if slopes is not None:
            grad = (slopes * coefficients[:, None]).to(hidden_states.dtype)
            return grad, None, None, *nothing
        head = replace(ctx.options, weight=weight, bias=bias)
        policy = Logits(hidden_states, head, ctx.operand)
        return *_gradients(policy, coefficients, ctx), *nothing


def _gradients(policy: Logits, coefficients: Tensor, ctx: Any) -> tuple[Tensor | None, ...]:
    """Gradients of hidden states, weight and bias from whole rows of logits computed again."""
    grads = HeadGradients.zeros(policy, ctx.needs_input_grad[:3])
    factor = GradientFactor(policy, coefficients)
    scaled = factor.scaled(coefficients)
    columns = slice(0, policy.head.width)
    with without_autocast(policy.hidden_states.device):
        weight = policy.columns(columns)
        for rows in blocks(coefficients.shape[0], ctx.plan.block_rows):
            _, dz = _compare(policy, ctx.ref, rows, ctx.kind, True)
            assert dz is not None
            dz.mul_(scaled[rows, None])
            grads.add(dz, factor, policy.rows(rows), weight, rows, columns)
    return rounded(grads.finish(), (policy.hidden_states, policy.head.weight, policy.head.bias))


def _compare(
    policy: Logits, ref: Logits, rows: slice, kind: str, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Values ``[r]`` and, if wanted, their gradient ``[r, V]`` by the policy's raw products."""
    z, ref_z = _final_logits(policy, rows), _final_logits(ref, rows)
    slope = logit_slope(policy.head, z) if gradient else 1.0
    values, dz = _value_and_gradient(_log_softmax(z), _log_softmax(ref_z), kind, gradient)
    return values, None if dz is None else scale_tile(dz, slope)


def _value_and_gradient(
    logp: Tensor, logq: Tensor, kind: str, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The table of the module; ``logp`` and ``logq`` ``[r, V]`` are given up."""
    p, q = logp.exp(), logq.exp()
    if kind == "kl":
        gap = _where_positive(p, logp.sub_(logq))
        kl = (p * gap).sum(dim=1)
        return kl, p.mul_(gap.sub_(kl[:, None])) if gradient else None
    if kind == "reverse_kl":
        gap = _where_positive(q, logq.sub_(logp))
        return gap.mul_(q).sum(dim=1), p.sub_(q) if gradient else None
    log_mean = torch.logaddexp(logp, logq).sub_(math.log(2.0))
    gap = _where_positive(p, logp.sub_(log_mean))
    from_policy = (p * gap).sum(dim=1)
    from_ref = _where_positive(q, logq.sub_(log_mean)).mul_(q).sum(dim=1)
    js = (from_policy + from_ref) / 2.0
    return js, p.mul_(gap.sub_(from_policy[:, None])).div_(2.0) if gradient else None


def _where_positive(p: Tensor, gap: Tensor) -> Tensor:
    """``gap`` with 0 where ``p`` is 0: such a token contributes nothing, whatever ``gap`` is."""
    return gap.masked_fill_(p == 0, 0.0)


def _final_logits(logits: Logits, rows: slice) -> Tensor:
    everything = slice(0, logits.head.width)
    return logits.tile(logits.rows(rows), logits.columns(everything), everything)


def _log_softmax(z: Tensor) -> Tensor:
    """In place. The maximum goes first: a large common offset would swallow the normaliser."""
    z.sub_(z.amax(dim=1, keepdim=True))
    return z.sub_(z.logsumexp(dim=1, keepdim=True))


def _by_hidden(policy: Logits, dz: Tensor) -> Tensor:
    """``dz [r, V]`` times the weight, ``[r, D]`` wide."""
    ones = dz.new_ones(1)
    factor = GradientFactor(policy, ones)
    tile = dz if factor.scale is None else dz.mul_(factor.scale)
    weight = policy.columns(slice(0, policy.head.width))
    return factor.restore(product(tile.to(policy.operand), weight))


def _fused(
    hidden_states: Tensor, head: LmHead, ref_hidden_states: Tensor, ref_head: LmHead, kind: str
) -> Tensor:
    """From the accumulators of both products: Triton's kernel."""
    from fastdaa.kernels.divergence import HeadOptions, token_divergences

    def options(h: LmHead) -> HeadOptions:
        return HeadOptions(h.logit_scale, h.softcap, h.temperature)

    divergences = token_divergences(
        hidden_states, head.weight, ref_hidden_states, ref_head.weight,
        bias=head.bias, ref_bias=ref_head.bias, options=options(head),
        ref_options=options(ref_head), js=kind == "js",
    )  # fmt: skip
    values = getattr(divergences, kind)
    assert isinstance(values, Tensor)
    return values
