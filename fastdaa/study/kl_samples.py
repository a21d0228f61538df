"""Estimates of KL(policy || reference) of sampled answers, from log-ratios of their tokens.

For an answer y sampled from the policy, with ``u_t = log pi(y_t|y_<t) - log ref(y_t|y_<t)`` over
its tokens and ``U`` their sum, in nats:

- ``k1 = U``: unbiased;
- ``rb = sum_t KL(pi(.|y_<t) || ref(.|y_<t))``, the expectation of every term of k1 over the next
  token (Rao-Blackwell; Amini et al. 2025), by :func:`fastdaa.token_kl`: unbiased, less variance;
- ``k3 = e^(-U) - 1 + U`` (Schulman 2020): unbiased, never negative, heavy-tailed far away: the mean
  of a few hundred samples is then below the truth as a rule, and so is its standard error;
- ``trlx = sum_t (e^(u_t) - 1 - u_t)``, as the trlX family logs it: the expectation of a term is
  chi^2(pi || ref) - KL, so it is no estimate of the KL at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.online.rewards import sequence_sums


def kl_estimates(
    log_ratios: Tensor, lengths: Tensor, token_kls: Tensor | None = None
) -> dict[str, Tensor]:
    """``k1``, ``k3`` and ``trlx`` of every answer, and ``rb`` with ``token_kls``.

    A mean over answers estimates the KL, and their deviation over the root of their number its
    standard error, as long as every answer has a prompt of its own.

    Args:
        log_ratios: ``[N]`` log policy - log reference of the sampled tokens, answer by answer.
        lengths: ``[S]`` int64, tokens of each answer; their sum is ``N``.
        token_kls: ``[N]`` KL(policy || reference) of the next-token distributions.

    Returns:
        ``[S]`` fp64 each, in nats an answer.

    Raises:
        ValueError: shapes that do not belong together.
    """
    tokens = int(lengths.sum())
    for name, values in (("log_ratios", log_ratios), ("token_kls", token_kls)):
        if values is not None and values.shape != (tokens,):
            raise ValueError(
                f"{name}: expected [{tokens}], one a token of all answers, got {list(values.shape)}"
            )
    ratios = log_ratios.double()
    total = sequence_sums(ratios, lengths)
    found = {
        "k1": total,
        "k3": torch.expm1(-total) + total,
        "trlx": sequence_sums(torch.expm1(ratios) - ratios, lengths),
    }
    if token_kls is not None:
        found["rb"] = sequence_sums(token_kls, lengths)
    return found
