"""What a notebook shows: shapes and the numbers that matter, never whole tensors."""

from __future__ import annotations

import torch
from torch._subclasses import FakeTensorMode

from fastdaa import FusedLinearDPOLoss, LmHead, PairLogps, TokenSelection, TokenStats

LENGTHS = torch.tensor([3, 4])
LOGPS = PairLogps(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -3.0]), LENGTHS, LENGTHS)


def test_pairs_show_their_mean_margin() -> None:
    # Margins 0.5 and 1.
    assert repr(LOGPS) == (
        "PairLogps(mean margin 0.75; chosen=float32[2], rejected=float32[2], "
        "chosen_lengths=int64[2], rejected_lengths=int64[2])"
    )


def test_statistics_show_their_mean_entropy() -> None:
    stats = TokenStats(torch.tensor([1.0, 2.0]), *torch.zeros(3, 2))
    assert repr(stats) == (
        "TokenStats(mean entropy 1.5; entropy=float32[2], top1=float32[2], mean_logit=float32[2], "
        "log_sum_sq=float32[2])"
    )


def test_a_selection_shows_its_sizes() -> None:
    selection = TokenSelection(torch.arange(7), torch.arange(7), LENGTHS, (3, 4))
    assert repr(selection) == "TokenSelection(rows=int64[7], targets=int64[7], lengths=int64[2])"


def test_a_loss_shows_itself_and_no_vector() -> None:
    labels = torch.randint(50, (4, 200))
    hidden = torch.randn(4, 200, 8)
    out = FusedLinearDPOLoss()(hidden, torch.zeros(50, 8), labels, ref_logps=torch.zeros(4))
    # All tokens are equally likely: no margin, and DPO's loss is ln 2.
    text = repr(out)
    assert text.startswith("PairLossOutput(loss 0.6931, mean margin 0; loss=float32[]")
    assert "token_logps=float32[796]" in text and "stats=None" in text and len(text) < 400


def test_they_are_still_tuples() -> None:
    chosen, rejected, *_ = LOGPS
    assert LOGPS._replace(chosen=rejected)[0] is rejected and LOGPS[0] is chosen
    assert LOGPS._fields == ("chosen", "rejected", "chosen_lengths", "rejected_lengths")


def test_a_head_shows_shapes_and_settings() -> None:
    head = LmHead(torch.zeros(50, 8, dtype=torch.bfloat16), temperature=0.5)
    assert repr(head) == (
        "LmHead(weight=bfloat16[50, 8], bias=None, softcap=None, logit_scale=1.0, temperature=0.5)"
    )


def test_tensors_without_numbers_are_shown_too() -> None:
    meta = PairLogps(*(torch.zeros(2, device="meta") for _ in range(4)))
    assert repr(meta).startswith("PairLogps(chosen=float32[2] on meta, ")
    with FakeTensorMode():
        fake = PairLogps(*(torch.zeros(2) for _ in range(4)))
    assert repr(fake).startswith("PairLogps(chosen=float32[2], ")
    assert "mean margin" not in repr(PairLogps(torch.zeros(0), torch.zeros(0), LENGTHS, LENGTHS))
