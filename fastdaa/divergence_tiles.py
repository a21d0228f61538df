"""Divergences and their gradients from tiles of both heads' logits.

With ``l`` and ``l'`` the log-probabilities of policy and reference, ``p`` and ``q`` their
exponentials and ``m = (p + q) / 2``, the values and their gradients by the policy's final logits
are

    kl          KL(p || q)                         p_v (l_v - l'_v - KL(p || q))
    reverse_kl  KL(q || p)                         p_v - q_v
    js          (KL(p || m) + KL(q || m)) / 2      p_v (l_v - log m_v - KL(p || m)) / 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdaa.frozen import slopes_of
from fastdaa.fused_check import check_rows
from fastdaa.gradient_sums import Gradients, GradientSums, dtypes_of
from fastdaa.head import LmHead
from fastdaa.head_plan import HeadPlan
from fastdaa.plan_call import plan_call
from fastdaa.row_passes import logit_slope, scale_tile
from fastdaa.tiles import GradientFactor, Logits, blocks, product, without_autocast
from fastdaa.validation import check_device, check_product
from fastdaa.waiting_rows import WaitingRows


def check_pair(
    hidden_states: Tensor, head: LmHead, ref_hidden_states: Tensor, ref_head: LmHead
) -> None:
    """Raise unless both are ``[N, D]`` under whole heads of one vocabulary, on one device."""
    for name, h in (("head", head), ("ref_head", ref_head)):
        if h.shard is not None:
            raise ValueError(f"{name}: expected the whole vocabulary, got a slice of it")
    check_product(hidden_states, head.weight)
    check_product(ref_hidden_states, ref_head.weight, "ref_")
    check_device("ref_hidden_states", ref_hidden_states, hidden_states.device)
    if hidden_states.shape[0] != ref_hidden_states.shape[0]:
        raise ValueError(
            f"ref_hidden_states: expected {hidden_states.shape[0]} positions as in hidden_states, "
            f"got {ref_hidden_states.shape[0]}"
        )
    if head.vocab_size != ref_head.vocab_size:
        raise ValueError(
            f"ref_head: expected a vocabulary of {head.vocab_size}, got {ref_head.vocab_size}"
        )


def plan_divergence(
    hidden_states: Tensor,
    head: LmHead,
    *,
    hidden_grad: bool,
    head_grad: bool,
    engine: str,
    max_bytes: int | None,
) -> HeadPlan:
    """The plan of a call with these gradients wanted by the policy; tiles of both heads fit."""
    return plan_call(
        hidden_states, head, wanted=(hidden_grad, head_grad), engine=engine, max_bytes=max_bytes,
        divergence=True,
    )  # fmt: skip


def divergences(
    policy: Logits, ref: Logits, kind: str, plan: HeadPlan
) -> tuple[Tensor, WaitingRows | None]:
    """Values ``[N]``, wide, and, on the path of a head that is not trained, their slopes ``[N, D]``
    by the hidden states."""
    hidden = policy.hidden_states
    values = hidden.new_empty(hidden.shape[0], dtype=policy.wide)
    frozen, weights = plan.path == "frozen", _weights(policy, ref)
    slopes = slopes_of(policy) if frozen else None
    with without_autocast(hidden.device):
        for rows in blocks(hidden.shape[0], plan.block_rows):
            values[rows], dz = _compare(policy, ref, weights, rows, kind, frozen)
            if slopes is not None and dz is not None:
                slopes.keep(rows, _by_hidden(policy, dz, weights[0], slopes.place(rows)))
            del dz  # before the next tiles are made
    return values, slopes


def divergence_gradients(
    policy: Logits,
    ref: Logits,
    coefficients: Tensor,
    kind: str,
    plan: HeadPlan,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients of ``sum(coefficients * values)`` by hidden states, weight and bias, from whole
    rows of logits computed again."""
    grads = GradientSums(policy, wanted)
    factor = GradientFactor(policy, coefficients)
    scaled = factor.scaled(coefficients)
    with without_autocast(policy.hidden_states.device):
        weights = _weights(policy, ref)
        for rows in blocks(coefficients.shape[0], plan.block_rows):
            _, dz = _compare(policy, ref, weights, rows, kind, True)
            assert dz is not None
            dz.mul_(scaled[rows, None])
            grads.add(dz, factor, policy.rows(rows), weights[0], rows)
            del dz
    dtypes = dtypes_of(policy.hidden_states, policy.head.weight, policy.head.bias)
    return grads.finish(waits=False).returned(dtypes)


def _weights(policy: Logits, ref: Logits) -> tuple[Tensor, Tensor]:
    """Both weights as factors."""
    return policy.columns(slice(0, policy.head.width)), ref.columns(slice(0, ref.head.width))


def _compare(
    policy: Logits, ref: Logits, weights: tuple[Tensor, Tensor], rows: slice, kind: str,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Values ``[r]`` and, if wanted, their gradient ``[r, V]`` by the policy's raw products."""
    z, ref_z = (
        logits.tile(logits.rows(rows), weight, slice(0, logits.head.width))
        for logits, weight in zip((policy, ref), weights, strict=True)
    )
    slope = logit_slope(policy.head, z) if gradient else 1.0
    values, dz = _value_and_gradient(_log_softmax(z), _log_softmax(ref_z), kind, gradient)
    return values, None if dz is None else scale_tile(dz, slope)


def _value_and_gradient(
    logp: Tensor, logq: Tensor, kind: str, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The table of the module; ``logp`` and ``logq`` ``[r, V]`` are given up."""
    if kind == "kl":
        p = logp.exp()
        gap = _where_positive(p, logp.sub_(logq))
        kl = (p * gap).sum(dim=1)
        return kl, p.mul_(gap.sub_(kl[:, None])) if gradient else None
    q = logq.exp()
    if kind == "reverse_kl":
        gap = _where_positive(q, logq.sub_(logp))
        return gap.mul_(q).sum(dim=1), logp.exp_().sub_(q) if gradient else None
    p = logp.exp()
    log_mean = torch.logaddexp(logp, logq).sub_(math.log(2.0))
    gap = _where_positive(p, logp.sub_(log_mean))
    from_policy = (p * gap).sum(dim=1)
    from_ref = _where_positive(q, logq.sub_(log_mean)).mul_(q).sum(dim=1)
    js = (from_policy + from_ref) / 2.0
    return js, p.mul_(gap.sub_(from_policy[:, None])).div_(2.0) if gradient else None


def _where_positive(p: Tensor, gap: Tensor) -> Tensor:
    """``gap`` with 0 where ``p`` is 0: such a token contributes nothing, whatever ``gap`` is."""
    return gap.masked_fill_(p == 0, 0.0)


def _log_softmax(z: Tensor) -> Tensor:
    """In place. The maximum goes first: a large common offset would swallow the normaliser."""
    z.sub_(z.amax(dim=1, keepdim=True))
    return z.sub_(z.logsumexp(dim=1, keepdim=True))


def _by_hidden(policy: Logits, dz: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out [r, D]``, wide: ``dz [r, V]`` times the weight."""
    ones = dz.new_ones(1)
    factor = GradientFactor(policy, ones)
    tile = dz if factor.scale is None else dz.mul_(factor.scale)
    return factor.restore(product(tile.to(policy.operand), weight, out))


def fused_divergences(
    hidden_states: Tensor, head: LmHead, ref_hidden_states: Tensor, ref_head: LmHead, kind: str,
    plan: HeadPlan,
) -> Tensor:  # fmt: skip
    """From the accumulators of both products: Triton's kernel."""
    from fastdaa.kernels.divergence import HeadOptions, token_divergences

    def options(h: LmHead) -> HeadOptions:
        return HeadOptions(h.logit_scale, h.softcap, h.temperature)

    def values(rows: slice) -> Tensor:
        found = token_divergences(
            hidden_states[rows], head.weight, ref_hidden_states[rows], ref_head.weight,
            bias=head.bias, ref_bias=ref_head.bias, options=options(head),
            ref_options=options(ref_head), js=kind == "js",
        )  # fmt: skip
        return getattr(found, kind)

    size = hidden_states.shape[0]
    found = [values(rows) for rows in blocks(size, plan.block_rows)] or [values(slice(0))]
    if size:
        _check(hidden_states, head, ref_hidden_states, ref_head, kind, found[0])
    return torch.cat(found)


def _check(
    hidden_states: Tensor, head: LmHead, ref_hidden_states: Tensor, ref_head: LmHead, kind: str,
    values: Tensor,
) -> None:  # fmt: skip
    """The first block of a call, once for every variant of the kernel."""

    def plain(picked: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        with without_autocast(picked.device):
            both = Logits(hidden_states[picked], head), Logits(ref_hidden_states[picked], ref_head)
            weights, rows = _weights(*both), slice(0, picked.shape[0])
            largest = [
                logits.tile(logits.rows(rows), weight, slice(0, head.width)).abs().amax(dim=1)
                for logits, weight in zip(both, weights, strict=True)
            ]
            expected, _ = _compare(*both, weights, rows, kind, False)
        return {"divergences": expected}, torch.maximum(*largest)

    options = [
        (
            h.weight.shape,
            h.bias is None,
            h.logit_scale == 1.0,
            h.softcap is None,
            h.temperature == 1.0,
        )
        for h in (head, ref_head)
    ]
    variant = ("divergence", kind == "js", hidden_states.dtype, *options)
    check_rows(hidden_states.device, variant, {"divergences": values}, plain)
