"""Liger's chunked preference losses on the head of fastdaa: same names, arguments and results.

``from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss`` becomes ``from
fastdaa.drop_in.liger import LigerFusedLinearDPOLoss``; liger-kernel itself is not needed. The
classes follow liger-kernel 0.8.5, and tests compare every result and gradient with its own.

Inputs of all: ``lin_weight [V, D]``, ``_input [2B, T, D]`` (all chosen, then all rejected),
``target [2B, T]`` int64, shifted by the caller, so that position ``t`` holds the token that
``_input[:, t]`` predicts, and ``bias [V]`` or None. Results: ``(loss, (chosen_logps [B],
rejected_logps [B], chosen_logits_mean, rejected_logits_mean, nll_loss, *rewards))``, in nats.

What differs:

- Log-probs come from fp32 sums (Liger rounds logits to the dtype of the inputs), no position that
  is not scored is computed, and pairs are not taken ``chunk_size`` at a time: memory is planned.
  ``chunk_size`` and ``compiled`` are taken and have no effect.
- Everything but the loss is detached. In Liger the other results look differentiable, and their
  gradients are dropped.
- Per-token means of an empty completion are 0 instead of NaN.
- ``beta`` has to be above 0, ``label_smoothing`` (where the loss reads it) in [0, 0.5), ``gamma``
  and ``alpha`` not negative, ``discopop_tau`` in (0, 1]: else ``ValueError``.

:class:`LigerFusedLinearKTOLoss` has other inputs and results, those of Liger's: ``_input [B, T,
D]`` first, and a KL baseline from the caller. Left out are the losses that are not about
preferences.
"""

from fastdaa.drop_in.liger.dpo import LigerFusedLinearDPOLoss
from fastdaa.drop_in.liger.kto import LigerFusedLinearKTOLoss
from fastdaa.drop_in.liger.orpo import LigerFusedLinearORPOLoss
from fastdaa.drop_in.liger.reference_free import LigerFusedLinearCPOLoss, LigerFusedLinearSimPOLoss

__all__ = [
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
]
