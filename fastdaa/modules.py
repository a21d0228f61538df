"""``torch.nn`` modules: hidden states, head weight, labels and a reference in; a loss out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdaa.head import LmHead, check_settings
from fastdaa.logps import head_logps
from fastdaa.losses import Loss, Objective
from fastdaa.outputs import PairLossOutput, TokenSelection
from fastdaa.pair_loss import pair_loss
from fastdaa.paths import PATHS
from fastdaa.planner import ENGINES
from fastdaa.selection import ORDERS, check_ignore_index, moved, select_pairs
from fastdaa.validation import (
    check_choice,
    check_device,
    check_floating,
    check_head_inputs,
    check_positions,
    check_positive,
    check_readable,
    check_shape,
    check_whole,
)


class FusedLinearPairLoss(nn.Module):
    """A preference loss on the last hidden states, without logits.

    Args:
        loss: name of a loss (see ``fastdaa.LOSSES``), a loss of :func:`fastdaa.custom_loss`, or a
            list of them (a mixture).
        weights: weights of a mixture.
        softcap, logit_scale, temperature: of the head, see :class:`fastdaa.LmHead`.
        order: order of the rows, ``"chosen_first"`` or ``"interleaved"``.
        ignore_index: label of positions that are not scored.
        impl, engine, max_bytes: see :func:`fastdaa.pair_loss`.
        hyperparameters: of the loss, e.g. ``beta=0.1``; also ``ld_alpha`` and ``use_weighting`` of
            :class:`fastdaa.Objective`.

    Raises:
        TypeError, ValueError: an unknown loss, a hyperparameter that it does not have, or an option
            with a value that it cannot have.
    """

    def __init__(
        self,
        loss: str | Loss | Sequence[str | Loss] = "dpo",
        *,
        weights: Sequence[float] | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        order: str = "chosen_first",
        ignore_index: int = -100,
        impl: str = "auto",
        engine: str = "auto",
        max_bytes: int | None = None,
        **hyperparameters: Any,
    ):
        super().__init__()
        self.objective = Objective.parse(loss, weights=weights, **hyperparameters)
        self.head_options: dict[str, Any] = check_settings(softcap, logit_scale, temperature)
        check_choice("order", order, ORDERS)
        check_ignore_index(ignore_index)
        check_choice("impl", impl, PATHS)
        check_choice("engine", engine, ENGINES)
        check_positive("max_bytes", max_bytes)
        self.order, self.ignore_index = order, ignore_index
        self.impl, self.engine, self.max_bytes = impl, engine, max_bytes

    def extra_repr(self) -> str:
        """The objective with every value."""
        return str(self.objective)

    def forward(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_logps: Tensor | None = None,
        ref_token_logps: Tensor | None = None,
        ref_hidden_states: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        advantages: Tensor | None = None,
    ) -> PairLossOutput:
        """The loss of a batch of pairs.

        Args:
            hidden_states: ``[2B, T, D]`` of the policy. weight: ``[V, D]``. bias: ``[V]``.
            labels: ``[2B, T]`` int64, at the position of their token, not shifted.
            ref_logps: ``[2B]`` reference log-probs, rows ordered as ``labels``.
            ref_token_logps: ``[2B, T]`` reference log-probs of the tokens, at the position of
                their label; others are not read. Instead of ``ref_logps``, which are not enough for
                token-level objectives and ``ld_alpha``.
            ref_hidden_states: ``[2B, T, D']``, instead of both.
            ref_weight: ``[V, D']`` of the reference's head; None for the policy's head, detached.
            ref_bias: ``[V]`` that goes with ``ref_weight``, or None.
            advantages: ``[2B]``, rows ordered as ``labels``, for objectives with token-level terms;
                an error with others.

        Returns:
            The result; its vectors are in pair order.

        Raises:
            TypeError, ValueError: inputs that do not fit together, or a missing reference.
        """
        check_readable("labels", labels)
        check_floating("hidden_states", hidden_states)
        selection = self._selection(labels, hidden_states.device)
        check_positions("hidden_states", hidden_states, labels.shape)
        for name, given in (("ref_logps", ref_logps), ("ref_token_logps", ref_token_logps)):
            if given is not None and ref_hidden_states is not None:
                raise ValueError(f"{name}: expected None beside ref_hidden_states, got both")
        if ref_weight is None and ref_bias is not None:
            raise ValueError("ref_bias: expected None without ref_weight, got a bias")
        if ref_token_logps is not None:
            check_floating("ref_token_logps", ref_token_logps)
            check_whole("ref_token_logps", ref_token_logps)
            check_shape("ref_token_logps", ref_token_logps, tuple(labels.shape))
            check_device("ref_token_logps", ref_token_logps, hidden_states.device)
            # A row predicts the token behind it.
            ref_token_logps = ref_token_logps.flatten().index_select(0, selection.rows + 1)
        if ref_hidden_states is not None and self.objective.needs_ref:
            ref_head = (weight, bias) if ref_weight is None else (ref_weight, ref_bias)
            ref_token_logps = self._score(ref_hidden_states, *ref_head, selection, labels.shape)
        head = LmHead(weight, bias, **self.head_options)
        return pair_loss(
            hidden_states,
            head,
            selection,
            self.objective,
            ref_logps=self._pair_major(ref_logps),
            ref_token_logps=ref_token_logps,
            advantages=self._pair_major(advantages),
            impl=self.impl,
            engine=self.engine,
            max_bytes=self.max_bytes,
        )

    def _selection(self, labels: Tensor, device: torch.device) -> TokenSelection:
        selection = select_pairs(labels, order=self.order, ignore_index=self.ignore_index)
        return moved(selection, device)

    @torch.no_grad()
    def _score(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selection: TokenSelection,
        shape: torch.Size,
    ) -> Tensor:
        """Reference log-probs ``[N]`` of the selected tokens."""
        check_positions("ref_hidden_states", hidden_states, shape)
        rows = hidden_states.flatten(0, 1).index_select(0, selection.rows)
        head = LmHead(weight, bias, **self.head_options)
        check_head_inputs(rows, weight, selection.targets, bias, prefix="ref_")
        return head_logps(
            rows, head, selection.targets, engine=self.engine, max_bytes=self.max_bytes,
            selected=True,
        )  # fmt: skip

    def _pair_major(self, values: Tensor | None) -> Tensor | None:
        if self.order == "interleaved" or not isinstance(values, Tensor):
            return values
        if values.ndim != 1 or len(values) % 2:
            return values  # pair_loss names what is wrong with the shape
        return values.view(2, -1).T.reshape(-1)


class FusedLinearDPOLoss(FusedLinearPairLoss):
    """DPO on hidden states, see :func:`fastdaa.losses.dpo`.

    Args:
        beta: strength of the KL term, above 0.
        label_smoothing: probability that a label is flipped, in [0, 0.5).
        length_alpha: R-DPO's weight on the difference in length.
        length_norm: per-token means of the log-probs in the place of their sums.
        softcap, logit_scale, temperature, order, ignore_index, impl, engine, max_bytes: see
            :class:`FusedLinearPairLoss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        length_alpha: float = 0.0,
        length_norm: bool = False,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        order: str = "chosen_first",
        ignore_index: int = -100,
        impl: str = "auto",
        engine: str = "auto",
        max_bytes: int | None = None,
    ):
        super().__init__(
            "dpo", beta=beta, label_smoothing=label_smoothing, length_alpha=length_alpha,
            length_norm=length_norm,
            softcap=softcap, logit_scale=logit_scale, temperature=temperature, order=order,
            ignore_index=ignore_index, impl=impl, engine=engine, max_bytes=max_bytes,
        )  # fmt: skip


class FusedLinearIPOLoss(FusedLinearPairLoss):
    """IPO on hidden states, see :func:`fastdaa.losses.ipo`.

    Args:
        beta: strength of the KL term (tau of the paper), above 0.
        target: ``"standard"`` for a margin of ``1 / (2 beta)``, ``"unified"`` for ``1 / beta``.
        length_norm: per-token means of the log-probs in the place of their sums.
        softcap, logit_scale, temperature, order, ignore_index, impl, engine, max_bytes: see
            :class:`FusedLinearPairLoss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        target: str = "standard",
        length_norm: bool = False,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        order: str = "chosen_first",
        ignore_index: int = -100,
        impl: str = "auto",
        engine: str = "auto",
        max_bytes: int | None = None,
    ):
        super().__init__(
            "ipo", beta=beta, target=target, length_norm=length_norm,
            softcap=softcap, logit_scale=logit_scale, temperature=temperature, order=order,
            ignore_index=ignore_index, impl=impl, engine=engine, max_bytes=max_bytes,
        )  # fmt: skip


class FusedLinearSLiCLoss(FusedLinearPairLoss):
    """SLiC on hidden states: a hinge, see :func:`fastdaa.losses.slic`.

    Args:
        beta: strength of the KL term, above 0.
        delta: margin of the hinge, not negative.
        softcap, logit_scale, temperature, order, ignore_index, impl, engine, max_bytes: see
            :class:`FusedLinearPairLoss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        delta: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        order: str = "chosen_first",
        ignore_index: int = -100,
        impl: str = "auto",
        engine: str = "auto",
        max_bytes: int | None = None,
    ):
        super().__init__(
            "slic", beta=beta, delta=delta,
            softcap=softcap, logit_scale=logit_scale, temperature=temperature, order=order,
            ignore_index=ignore_index, impl=impl, engine=engine, max_bytes=max_bytes,
        )  # fmt: skip


class FusedLinearAPALoss(FusedLinearPairLoss):
    """APA on hidden states, offline on pairs, see :func:`fastdaa.losses.apa_pairs`.

    Args:
        lam: divisor of the advantages, above 0.
        softcap, logit_scale, temperature, order, ignore_index, impl, engine, max_bytes: see
            :class:`FusedLinearPairLoss`.
    """

    def __init__(
        self,
        *,
        lam: float = 1.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        temperature: float = 1.0,
        order: str = "chosen_first",
        ignore_index: int = -100,
        impl: str = "auto",
        engine: str = "auto",
        max_bytes: int | None = None,
    ):
        super().__init__(
            "apa", lam=lam,
            softcap=softcap, logit_scale=logit_scale, temperature=temperature, order=order,
            ignore_index=ignore_index, impl=impl, engine=engine, max_bytes=max_bytes,
        )  # fmt: skip
