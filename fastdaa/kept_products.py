"""Gradients of a head from gradients of logits that were kept without the loss's coefficients.

Every loss of token log-probs has ``dL/dz_i = c_i (onehot_i - p_i)``, with one coefficient ``c_i`` a
row. The rest of the row does not depend on the loss, and waits in the dtype of the next product.
The coefficients then scale the rows of the hidden states' gradient, and the hidden states where
they are a factor of the weight's gradient. The entry of the target, ``o_i = 1 - p_i``, is the
largest of its row. What rounding takes from it is added in fp32:

    dH = c * (f * (dz W) + (o - f * r) * W[targets]),
    dW = dz^T G,   dW[targets] += c * o * H - r * G,   G = c * f * H, rounded

where ``dz`` holds the kept rows, ``f`` a factor a row and ``r`` the rounded ``o / f`` that stand in
``dz`` at the targets. They stand there because ``dW`` may be rounded before it is added to: without
them the products would be of the size of what is added, and often cancel it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.row_passes import in_tile, move_to_front
from fastdaa.scaled_rows import scaled_rows
from fastdaa.target_rows import TargetRows, add_column_sums, add_target_rows, finish_hidden
from fastdaa.tiles import add_product, product, product_slices, row_slices, write_product
from fastdaa.waiting_rows import WaitingRows

# Moving rows costs 4 bytes a logit and saves 4 D FLOP a logit that is left out, so it pays up to
# this share of rows that remain.
_WORTH_MOVING = 15 / 16


class KeptGradients(NamedTuple):
    """``d logp / d z`` of tokens and the first columns: ``factors[:, None] * dz``, but ``own`` at
    the targets, where ``dz`` has it rounded."""

    dz: Tensor
    """``[a, k]``, a factor."""
    factors: Tensor
    """``[N]``, wide, as the next."""
    own: Tensor
    """``[N]``, also of targets beyond the columns."""
    active: Tensor | None = None
    """``[a]`` which tokens ``dz`` has, None for all."""

    def of_active(self) -> KeptGradients:
        """The same for the tokens in ``active`` alone."""
        return KeptGradients(self.dz, self.factors[self.active], self.own[self.active])

    def rows(self, targets: Tensor, coefficients: Tensor, vocab_size: int) -> TargetRows:
        """What scales the rows ``[a]``, for the loss's coefficients ``[N]``."""
        rows = TargetRows(targets, coefficients * self.factors, coefficients * self.own)
        rows = rows if self.active is None else rows.pick(self.active)
        return with_entries(rows, self.dz, slice(0, self.dz.shape[1]), vocab_size)


class FirstColumns:
    """What kept gradients contribute: the first rows of the weight's and the bias's gradient, and
    their part of the gradient of the hidden states, to which other columns are added later."""

    def __init__(
        self, kept: KeptGradients, targets: Tensor, coefficients: Tensor, vocab_size: int,
        engine: str,
    ) -> None:  # fmt: skip
        self.kept, self.width, self.engine = kept, kept.dz.shape[1], engine
        self.rows = kept.rows(targets, coefficients, vocab_size)

    def write_head(
        self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None,
        positions: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Into gradients ``[V, D]`` and ``[V]``, where wanted: each rounded once. Of ``hidden`` the
        rows at ``positions`` are meant, or else those that are active."""
        dz, rows = self.kept.dz, self.rows
        active = self.kept.active if positions is None else positions
        if weight is not None:
            out = weight[: self.width]
            factor = scaled_rows(hidden, rows.coefficients, dz.dtype, active, self.engine)
            if out.dtype == rows.own.dtype:  # nothing is rounded between the two
                write_product(out, dz.T, factor)
                add_target_rows(out, hidden, rows, active, self.engine, factor)
            else:
                add_target_rows(out.zero_(), hidden, rows, active, self.engine, factor)
                add_product(out, dz.T, factor)
        if bias is not None:
            total = torch.zeros_like(bias[: self.width], dtype=rows.own.dtype)
            add_column_sums(total, dz, rows)
            bias[: self.width] = total

    def write_hidden(self, weight: Tensor, out: Tensor) -> None:
        """Into ``out [N, D]``, each rounded once to its dtype."""
        factor = weight[: self.width].to(self.kept.dz.dtype)
        write_hidden_gradient(self.kept.dz, self.rows, factor, out, self.kept.active, self.engine)

    def put_hidden(self, weight: Tensor, out: WaitingRows) -> None:
        """The same into rows that others add to; ``kept`` are all of them."""
        factor = weight[: self.width].to(self.kept.dz.dtype)
        for part, result in hidden_gradient_parts(self.kept.dz, self.rows, factor, self.engine):
            out.put(part, result)
            del result  # before the next one is made


def with_entries(rows: TargetRows, dz: Tensor, columns: slice, vocab_size: int) -> TargetRows:
    """The rows ``[a]`` of ``dz [a, k]``, which has these columns of the vocabulary, with what
    stands at their targets."""
    inside, local = in_tile(rows.targets, columns.start, dz.shape[1])
    entries = dz.gather(1, local[:, None])[:, 0].to(rows.own.dtype)
    rows = rows._replace(entries=torch.where(inside, entries, 0.0))
    return rows if dz.shape[1] == vocab_size else rows.among(columns)


def leave_out(dz: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor | None]:
    """``dz`` with its rows of coefficient 0 left out, in place, and which rows remain.

    None stands for all of them, also where moving rows would cost more than their products. The
    host waits for the device here, because it has to know the number of rows.
    """
    active = coefficients.nonzero()[:, 0]
    if active.shape[0] > _WORTH_MOVING * coefficients.shape[0]:
        return dz, None
    return move_to_front(dz, active), active


def write_hidden_gradient(
    dz: Tensor, rows: TargetRows, weight: Tensor, out: Tensor, active: Tensor | None = None,
    engine: str = "torch",
) -> None:  # fmt: skip
    """What :func:`hidden_gradient_parts` gives, into the rows ``active`` of ``out`` (None for all),
    rounded once."""
    for part in product_slices(out[: dz.shape[0]]):
        result, of = product(dz[part], weight), rows.pick(part)
        if active is None:
            finish_hidden(result, of, weight, out[part], engine=engine)
        else:
            finish_hidden(result, of, weight, out, active[part], engine)
        del result  # before the next one is made


def hidden_gradient_parts(
    dz: Tensor, rows: TargetRows, weight: Tensor, engine: str
) -> Iterator[tuple[slice, Tensor]]:
    """``coefficients * (dz weight) + rest * weight[targets]``, ``[a, D]`` and wide, some rows at a
    time; ``weight`` is a factor."""
    for part in row_slices(dz.shape[0], weight.shape[1]):
        result = product(dz[part], weight)
        finish_hidden(result, rows.pick(part), weight, engine=engine)
        yield part, result
        del result  # before the next one is made
