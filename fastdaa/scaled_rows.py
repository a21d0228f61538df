"""Hidden states times their tokens' coefficients, a factor of the weight's gradient.

Rounded to the nearest, a feature that all tokens share is off by the same amount wherever their
coefficients are equal, and the product over the tokens adds that up. So bf16 factors are dithered:
row ``n`` is rounded up where it loses more than ``frac(1/2 - n g)`` of an entry's last place, ``g``
the golden ratio. The golden ratio spreads any run of rows evenly, so what equal entries lose
and gain cancels; entries that bf16 has stay as they are, and a call repeats to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows are rounded in parts of so many bytes of fp32; less than four of that size are alive.
_PART_BYTES = 4 << 20
# Of 2^16, the bits that bf16 leaves out of fp32.
_HALF, _GOLDEN = 32768, 40503


def scaled_rows(
    hidden: Tensor, coefficients: Tensor, operand: torch.dtype, active: Tensor | None = None,
    engine: str = "torch",
) -> Tensor:  # fmt: skip
    """``coefficients [a] * hidden[active]`` as a factor ``[a, D]``, each entry rounded once.

    Args:
        hidden: ``[N, D]``. coefficients: ``[a]``, wide.
        operand: dtype of the factor.
        active: ``[a]`` rows of ``hidden``, None for all of them.
        engine: ``"torch"``, or ``"triton"`` for its kernel; with the same bits.
    """
    factor = hidden.new_empty((coefficients.shape[0], hidden.shape[1]), dtype=operand)
    if engine == "triton" and operand == torch.bfloat16:
        from fastdaa.kernels.hidden_rows import scale_hidden_rows

        scale_hidden_rows(hidden, coefficients, factor, active)
        return factor
    few = max(_PART_BYTES // (4 * max(hidden.shape[1], 1)), 1)
    for start in range(0, coefficients.shape[0], few):
        rows = slice(start, min(start + few, coefficients.shape[0]))
        some = hidden[rows if active is None else active[rows]]
        if operand != torch.bfloat16:
            torch.mul(some, coefficients[rows, None], out=factor[rows])
        else:
            factor[rows] = _dithered(some.float() * coefficients[rows, None], start)
    return factor


def _dithered(wide: Tensor, first: int) -> Tensor:
    """``[r, D]`` fp32 with the entries of bf16, of rows that are counted from ``first``."""
    rows = torch.arange(first, first + wide.shape[0], device=wide.device)
    dither = ((_HALF + _GOLDEN * rows) & 0xFFFF).to(torch.int32)
    cut = (wide.view(torch.int32) + dither[:, None]).bitwise_and_(~0xFFFF)
    # The bits of a NaN may wrap around.
    return torch.where(wide.isnan(), wide, cut.view(torch.float32))
