"""Gradients of logits without the loss's coefficients, made while a tile of logits is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdaa.engines import logits_memory
from fastdaa.head_plan import HeadPlan
from fastdaa.kept_products import KeptGradients
from fastdaa.outputs import STATISTICS, TokenStats
from fastdaa.row_passes import RowState, set_target
from fastdaa.score import join
from fastdaa.tiles import Logits, blocks, filled_rows


class Unscaled:
    """``d logp / d logits`` of tokens and the plan's first columns, tile by tile, as
    :class:`fastdaa.kept_products.KeptGradients` has it: rounded to the dtype of the next product,
    the targets' entries as well.
    """

    def __init__(
        self, logits: Logits, targets: Tensor, plan: HeadPlan, tokens: int, stats: bool
    ) -> None:
        self.logits, self.targets, self.plan, self.stats = logits, targets, plan, stats
        self.columns = slice(0, logits.head.width)
        self.weight = logits.columns(self.columns)
        rows = filled_rows(tokens, self.weight.device)
        width = plan.kept_columns if plan.keeps_part else self.columns.stop
        device = self.weight.device
        self._memory = logits_memory(rows, width, device, logits.operand)
        self.dz = self._memory[:tokens]
        self.factors = self.weight.new_empty(tokens, dtype=logits.wide)
        self.own = torch.empty_like(self.factors)
        self.states: list[RowState] = []
        """Of the tiles, where backward computes logits again."""
        self.values: list[TokenStats] = []

    @property
    def kept(self) -> KeptGradients:
        """Gradients of the rows made last, which lie at the front of the buffer."""
        return KeptGradients(self.dz, self.factors, self.own)

    def joined(self) -> tuple[list[Tensor], list[Tensor]]:
        """The three fields of the states and the token statistics: ``[N]``, or empty where
        none were recorded."""
        empty = self.factors.new_empty(0)
        return join(self.states, 3, empty), join(self.values, STATISTICS, empty)

    def make(self, rows: slice, record: bool = True) -> Tensor:
        """Log-probs ``[r]`` of some rows; their gradients go to the front of the buffer.

        ``record`` keeps token statistics, if they are wanted at all.
        """
        return self._tiles(rows, record, gradient=True)

    def score(self, rows: slice) -> Tensor:
        """Log-probs ``[r]`` of some rows without their gradients."""
        return self._tiles(rows, True, gradient=False)

    def _tiles(self, rows: slice, record: bool, *, gradient: bool) -> Tensor:
        logps = self.weight.new_empty(rows.stop - rows.start, dtype=self.logits.wide)
        for block in blocks(logps.shape[0], self.plan.block_rows):
            at = slice(rows.start + block.start, rows.start + block.stop)
            logps[block] = self._tile(at, block if gradient else None, record)
        if gradient:
            self._set_targets(rows)
        return logps

    def _set_targets(self, rows: slice) -> None:
        made = slice(0, rows.stop - rows.start)
        entries = (self.own[made] / self.factors[made]).to(self.dz.dtype)
        # With what fills up the rows: deterministic PyTorch would copy what is not contiguous.
        width = self.dz.stride(0)
        whole = self.dz[made].as_strided((entries.shape[0], width), (width, 1))
        set_target(whole, self.targets[rows], entries, self.logits.head.first_token)

    def _tile(self, rows: slice, place: slice | None, record: bool) -> Tensor:
        targets, stats = self.targets[rows], self.stats and record
        hidden, here = self.logits.rows(rows), None
        if place is None:
            state, values = self.logits.statistics(hidden, self.weight, targets, stats)
        else:
            # Wide gradients are made in the memory of their logits.
            in_place = self.logits.operand == self.logits.wide
            if in_place:
                filled = filled_rows(place.stop - place.start, self.weight.device)
                here = self._memory[place.start : place.start + filled]
            tile = self.logits.row_tile(hidden, self.weight, self.columns, here)
            made = tile.slopes(targets, stats, None if in_place else self.dz[place])
            state, values = made.state, made.values
            self.factors[place], self.own[place] = made.factors, made.own
            if self.plan.keeps_part:
                self.states.append(state)
        if values is not None:
            self.values.append(values)
        return state.logps
