"""Token log-probabilities from hidden states and the LM head: the differentiable primitive.

No ``[N, V]`` tensor exists at any time; memory beyond inputs and gradients is a tile of logits and
a few numbers a token. Log-probabilities and statistics are fp32 (fp64 for fp64 inputs), gradients
are summed in that dtype and rounded once to the dtype of their tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdaa import reference
from fastdaa.compiled_kept import compiled_kept_logps
from fastdaa.compiled_logps import compiled_head_logps, compiled_token_stats
from fastdaa.frozen import Frozen
from fastdaa.head import LmHead
from fastdaa.kept_logps import KeptLogps, plan_kept
from fastdaa.outputs import PairLogps, TokenStats
from fastdaa.plan_call import plan_call
from fastdaa.recompute import Recompute
from fastdaa.score import score
from fastdaa.validation import check_floating, check_head_inputs, check_lengths, check_shape


def token_logps(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
) -> Tensor:
    """Log-probability of every target under the LM head, without the logits.

    Differentiable towards ``hidden_states``, ``weight`` and ``bias``; the result can be used in any
    expression, and backward can run more than once with ``retain_graph=True``.

    Args:
        hidden_states: ``[N, D]`` fp16, bf16, fp32 or fp64; the rows that are scored.
        weight: ``[V, D]`` of the head, in the same or another floating dtype.
        targets: ``[N]`` int64 token ids in ``[0, V)``.
        bias: ``[V]``, or None.
        softcap: final logit soft-capping ``c * tanh(z / c)``, or None.
        logit_scale: factor on the logits before the cap.
        temperature: divisor of the logits after the cap.
        impl: ``"auto"``, ``"score"`` (no gradient), ``"frozen"`` (head not trained),
            ``"recompute"``, ``"single_pass"`` (gradients of the logits are kept until the loss is
            known, 2 bytes an entry for bf16 factors: 3U for any loss, to 4U where memory holds a
            part of them), or ``"reference"`` (materialised logits, for checks).
        engine: what works on tiles of logits: ``"torch"``, ``"triton"`` (fp16, bf16 and fp32 on
            CUDA devices; not yet measured on one), ``"fused"`` (without gradient only: no tile of
            logits at all, and log-probs that differ from the other engines' in the last bits, so
            both models of a comparison need it), or ``"auto"``: triton on CUDA devices where its
            kernels agree with fp64 (tried once a process), else torch.
        max_bytes: memory beyond inputs and returned gradients, as in :func:`fastdaa.plan_head`;
            None for the default of the device.

    Returns:
        ``[N]`` in nats, fp32 (fp64 if an input is fp64).

    Raises:
        TypeError, ValueError: inputs of a wrong dtype, shape or device, or an ``impl`` or
            ``engine`` that cannot serve this call.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
        RuntimeError: ``engine="fused"`` gives other results than plain torch on this GPU.
    """
    check_head_inputs(hidden_states, weight, targets, bias)
    head = LmHead(weight, bias, softcap, logit_scale, temperature)
    return head_logps(hidden_states, head, targets, impl=impl, engine=engine, max_bytes=max_bytes)


def head_logps(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
    selected: bool = False,
) -> Tensor:
    """:func:`token_logps` with the head as one :class:`~fastdaa.head.LmHead`.

    ``selected`` says that the hidden states are a copy, made for this call, which counts, too.
    """
    call = (hidden_states, head, targets)
    options: dict[str, Any] = {"engine": engine, "max_bytes": max_bytes, "selected": selected}
    if not torch.compiler.is_compiling():
        return head_logps_and_stats(*call, impl=impl, **options)[0]
    if impl == "single_pass":
        return compiled_kept_logps(*call, **options)
    return compiled_head_logps(*call, impl=impl, **options)


def head_logps_and_stats(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    stats: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
    sparse: bool = False,
    selected: bool = False,
    keep: bool = False,
    positions: Tensor | None = None,
    bonus: bool = False,
) -> tuple[Tensor, TokenStats | None]:
    """:func:`head_logps` and, from the same logits, the statistics of :func:`token_stats`.

    With a ``bonus`` the entropy is differentiable, too. ``keep`` prefers ``impl="single_pass"``
    where the head is trained and it fits in memory. With ``positions [N]`` hidden states are
    ``[P, D]``, of which the paths ``score``, ``frozen`` and ``recompute`` copy the rows that they
    need at a time.
    """
    if not bonus and (impl == "single_pass" or (keep and impl == "auto")):
        kept = plan_kept(
            hidden_states, head, stats=stats, impl=impl, engine=engine, max_bytes=max_bytes,
            sparse=sparse, selected=selected,
        )  # fmt: skip
        if kept is not None:
            call = (hidden_states, head.weight, head.bias, targets, head.detach())
            logps, *more = KeptLogps.apply(*call, kept, stats)
            return logps, TokenStats(*more) if stats else None
    plan = plan_call(
        hidden_states, head, stats=stats, impl=impl, engine=engine, max_bytes=max_bytes,
        sparse=sparse, selected=selected, tokens=None if positions is None else len(positions),
        bonus=bonus,
    )  # fmt: skip
    if plan.path == "reference":
        if head.shard is not None:
            raise ValueError("impl='reference': expected a head with the whole vocabulary, got a "
                             "slice of it")  # fmt: skip
        logps = reference.token_logps(
            hidden_states, head.weight, targets, bias=head.bias, softcap=head.softcap,
            logit_scale=head.logit_scale, temperature=head.temperature,
        )  # fmt: skip
        values = (
            token_stats(hidden_states, head, targets, max_bytes=max_bytes)[1] if stats else None
        )
        return logps, values
    if plan.path == "score":
        state, values = score(hidden_states, head, targets, plan, stats=stats, positions=positions)
        return state.logps, values
    if plan.path == "frozen":
        logps, *more = Frozen.apply(hidden_states, head, targets, plan, stats, positions)
    else:
        logps, *more = Recompute.apply(
            hidden_states, head.weight, head.bias, targets, head.detach(), plan, stats, positions,
            bonus,
        )  # fmt: skip
    return logps, TokenStats(*more) if stats else None


@torch.no_grad()
def token_stats(
    hidden_states: Tensor,
    head: LmHead,
    targets: Tensor,
    *,
    engine: str = "auto",
    max_bytes: int | None = None,
) -> tuple[Tensor, TokenStats]:
    """Log-probabilities ``[N]`` and statistics of the predicted distributions, no gradient (1U).

    Args:
        hidden_states: ``[N, D]`` floating.
        head: weight, bias and options.
        targets: ``[N]`` int64 token ids in ``[0, V)``.
        engine, max_bytes: as in :func:`token_logps`.

    Returns:
        ``[N]`` log-probs in nats and the statistics, ``[N]`` each: entropy in nats, whether the
        target is the most likely token, mean logit, log of the sum of squared probabilities; fp32
        (fp64 if an input is fp64).

    Raises:
        TypeError, ValueError, ImportError: as in :func:`token_logps`.
    """
    check_head_inputs(hidden_states, head.weight, targets, head.bias, head.vocab_size)
    if torch.compiler.is_compiling():
        return compiled_token_stats(
            hidden_states, head, targets, engine=engine, max_bytes=max_bytes
        )
    plan = plan_call(hidden_states, head, stats=True, engine=engine, max_bytes=max_bytes)
    state, stats = score(hidden_states, head, targets, plan, stats=True)
    assert stats is not None
    return state.logps, stats


def sequence_logps(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sum token log-probs to sequence log-probs, in a fixed order and in fp64.

    A sum over hundreds of tokens in fp32 alone would lose a thousandth of a nat.

    Args:
        token_logps: ``[N]``, sequence by sequence.
        lengths: ``[S]`` int64 with sum ``N``; a length of 0 gives 0. They are read on CPU alone, so
            that nothing waits for a device: on CUDA another sum is undefined, as are targets
            outside the vocabulary.

    Returns:
        ``[S]`` in the dtype of ``token_logps``; differentiable.

    Raises:
        TypeError, ValueError: log-probs or lengths of a wrong dtype or shape; on CPU, lengths below
            0 or with another sum.
    """
    check_floating("token_logps", token_logps)
    check_shape("token_logps", token_logps, (token_logps.numel(),))
    check_lengths("lengths", lengths, token_logps.shape[0])
    # unsafe skips a check of the lengths that would wait for the device.
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True)
    return sums.to(token_logps.dtype)


def pair_logps(sequence_logps: Tensor, lengths: Tensor) -> PairLogps:
    """Pair-major sequence log-probs ``[2B]`` and completion lengths ``[2B]`` side by side."""
    logps, tokens = sequence_logps.view(-1, 2), lengths.view(-1, 2)
    return PairLogps(logps[:, 0], logps[:, 1], tokens[:, 0], tokens[:, 1])
