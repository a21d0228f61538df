"""The four losses that are compared, as one would write them in PyTorch.

Written down here once more, apart from ``fastdaa.losses``, so that the oracle and the peers do not
stand on what they are compared with. Hyperparameters are fastdaa's defaults.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1


def pair_objective(
    loss: str,
    token_logps: Tensor,  # [N]
    ref_logps: Tensor,  # [N]
    lengths: Tensor,  # [2B] int64, pair-major
) -> Tensor:
    """Mean loss over the pairs (over the tokens for ``"apa"``), in the dtype of the log-probs.

    ``h`` is the difference of the summed log-ratios of chosen and rejected. dpo: ``-log
    sigmoid(beta h)`` (arXiv 2305.18290, eq. 7); ipo: ``(h - 1 / (2 beta))^2`` (2310.12036, eq. 17);
    slic: ``max(0, 1 - beta h)`` (2309.06657); apa: ``(log ratio - advantage)^2`` a token, with
    advantages 1 and -1 (2306.02231).

    Raises:
        ValueError: an unknown loss.
    """
    if loss == "apa":
        advantages = torch.ones_like(lengths, dtype=token_logps.dtype)
        advantages[1::2] = -1
        per_token = advantages.repeat_interleave(lengths, output_size=token_logps.numel())
        return (token_logps - ref_logps - per_token).square().mean()
    # unsafe skips a check of the lengths that would wait for the device.
    ratios = torch.segment_reduce(token_logps - ref_logps, "sum", lengths=lengths, unsafe=True)
    h = ratios[0::2] - ratios[1::2]
    if loss == "dpo":
        return -F.logsigmoid(BETA * h).mean()
    if loss == "ipo":
        return (h - 1 / (2 * BETA)).square().mean()
    if loss == "slic":
        return torch.relu(1 - BETA * h).mean()
    raise ValueError(f"loss: expected dpo, ipo, slic or apa, got {loss!r}")
