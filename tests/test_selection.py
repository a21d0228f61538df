"""Which positions are scored: the shift by one, the order of pairs, and what is refused."""

from __future__ import annotations

import pytest
import torch

from fastdaa import TokenSelection, select_pairs, select_tokens
from fastdaa.selection import select_rows

_ = -100
LABELS = torch.tensor(
    [
        [_, _, 11, 12],  # two tokens after a prompt of two
        [_, 21, _, 23],  # a hole
        [31, 32, 33, 34],  # no prompt: token 0 has nothing that predicts it
        [_, _, _, _],  # nothing
    ]
)


def as_lists(selection: TokenSelection) -> tuple[list[int], ...]:
    return tuple(t.tolist() for t in selection[:3])


def test_a_token_is_scored_at_the_position_before_it():
    selection = select_tokens(LABELS)
    rows, targets, lengths = as_lists(selection)
    assert rows == [1, 2, 4, 6, 8, 9, 10]
    assert targets == [11, 12, 21, 23, 32, 33, 34]
    assert lengths == [2, 2, 3, 0]
    assert selection.counts == (2, 2, 3, 0)


@pytest.mark.parametrize(
    ("order", "rows", "targets", "lengths"),
    [
        # chosen = rows 0 and 1, rejected = rows 2 and 3
        pytest.param(
            "chosen_first",
            [1, 2, 8, 9, 10, 4, 6],
            [11, 12, 32, 33, 34, 21, 23],
            [2, 3, 2, 0],
            id="chosen-first",
        ),
        pytest.param(
            "interleaved",
            [1, 2, 4, 6, 8, 9, 10],
            [11, 12, 21, 23, 32, 33, 34],
            [2, 2, 3, 0],
            id="interleaved",
        ),
    ],
)
def test_pairs_come_out_pair_by_pair(order, rows, targets, lengths):
    selection = select_pairs(LABELS, order=order)
    assert as_lists(selection) == (rows, targets, lengths)
    assert selection.counts == tuple(lengths)


def test_rows_point_at_the_hidden_state_that_predicts_the_target():
    tokens = torch.arange(100, 124).view(4, 6)
    selection = select_pairs(tokens)
    # A model whose hidden state is its own token id: the next one is one larger.
    assert torch.equal(tokens.reshape(-1)[selection.rows] + 1, selection.targets)


@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 0)], ids=["no-rows", "one-token", "empty"])
def test_nothing_to_score(shape):
    selection = select_tokens(torch.zeros(shape, dtype=torch.int64))
    assert as_lists(selection) == ([], [], [0] * shape[0])


def test_another_ignore_index():
    selection = select_tokens(torch.tensor([[-1, -1, 5, 6]]), ignore_index=-1)
    assert selection.targets.tolist() == [5, 6]


def test_to_moves_the_tensors_and_keeps_the_counts():
    moved = select_tokens(LABELS).to("meta")
    assert {t.device.type for t in moved[:3]} == {"meta"}
    assert moved.counts == (2, 2, 3, 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(
            lambda: select_tokens(LABELS.int()),
            TypeError,
            "labels: expected an int64 tensor, got torch.int32",
            id="int32",
        ),
        pytest.param(
            lambda: select_tokens([[1, 2]]),
            TypeError,
            "labels: expected an int64 tensor, got list",
            id="list",
        ),
        pytest.param(
            lambda: select_tokens(LABELS[0]),
            ValueError,
            r"labels: expected shape \[S, T\], got \[4\]",
            id="one-dimension",
        ),
        pytest.param(
            lambda: select_pairs(LABELS[:3]),
            ValueError,
            r"labels: expected 2B rows \(chosen and rejected\), got 3",
            id="odd-rows",
        ),
        pytest.param(
            lambda: select_pairs(LABELS, order="rejected_first"),
            ValueError,
            "order: expected one of 'chosen_first', 'interleaved', got 'rejected_first'",
            id="order",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_selected_rows_and_their_gradient_are_those_of_an_index():
    """Also of a row that is selected twice, as the last one of a shared prompt is."""
    hidden = torch.randn(6, 3, requires_grad=True)
    rows, weights = torch.tensor([4, 1, 4, 0]), torch.randn(4, 3)
    (want,) = torch.autograd.grad((hidden[rows] * weights).sum(), hidden)
    selected = select_rows(hidden, rows)
    assert torch.equal(selected, hidden[rows])
    (got,) = torch.autograd.grad(selected, hidden, weights)
    assert torch.equal(got, want)
