"""Elementary functions whose derivatives keep their digits where they saturate.

PyTorch takes the derivative of ``sigmoid`` from its value, as ``s * (1 - s)``, and that of
``expm1`` as ``value + 1``. In fp32 the first loses all digits above ``x = 17`` and the second below
``x = -17``: pairs that are badly ranked would have a gradient of exactly 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 1e30
"""Stands for infinity where infinity times 0, or less itself, would be NaN; finite in fp32."""


def sigmoid(x: Tensor) -> Tensor:
    """``1 / (1 + exp(-x))``; value and derivative right to a few roundings of what they are."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))


def expm1(x: Tensor) -> Tensor:
    """``exp(x) - 1``; value and derivative right to a few roundings, unless ``exp`` overflows."""
    return torch.where(x < -1, x.exp() - 1, x.expm1())
