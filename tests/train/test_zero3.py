"""What of ZeRO-3 needs no DeepSpeed: sizes and pieces of weights, and refusals."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastdaa.train import zero3
from fastdaa.train.finite import all_finite
from fastdaa.train.sharding import meets_in_packs, more_to_come, pieces_fact


@pytest.fixture
def cut(monkeypatch):
    """``cut(module, rank)``: its weights as ZeRO-3 leaves them to one of two processes; the last
    piece is filled up with NaN."""

    def apply(module, rank):
        monkeypatch.setattr(zero3.dist, "get_rank", lambda group: rank)
        for number, weight in enumerate(module.parameters()):
            values, size = weight.detach().flatten(), math.ceil(weight.numel() / 2)
            padded = torch.full((2 * size,), math.nan)
            padded[: len(values)] = values
            weight.ds_tensor = padded[rank * size : (rank + 1) * size]
            weight.ds_tensor.ds_numel, weight.ds_numel = size, weight.numel()
            weight.ds_shape, weight.ds_id = weight.shape, number
            weight.ds_process_group = None
            weight.data = torch.empty(0)
        return module

    return apply


def test_sizes_of_cut_weights(cut):
    weight = nn.Linear(3, 5).weight
    assert (zero3.rows_of(weight), zero3.whole_size(weight)) == (5, 15)
    weight = cut(nn.Linear(3, 5), 0).weight
    assert (zero3.rows_of(weight), zero3.whole_size(weight)) == (5, 15)


@pytest.mark.parametrize(("rank", "size"), [(0, 8), (1, 7)])
def test_a_piece_ends_where_the_weight_ends(cut, rank, size):
    whole = nn.Linear(3, 5)
    values = whole.weight.detach().flatten().clone()
    assert zero3.own_piece(whole.weight) is whole.weight
    piece = zero3.own_piece(cut(whole, rank).weight)
    assert torch.equal(piece, values[8 * rank :][:8]) and len(piece) == size


@pytest.mark.parametrize("rank", [0, 1])
def test_pieces_that_are_not_finite_are_seen(cut, rank):
    assert all_finite(cut(nn.Linear(3, 5), rank))
    broken = nn.Linear(3, 5)
    with torch.no_grad():
        broken.weight[4, 2] = math.inf
    assert all_finite(cut(broken, rank)) is (rank == 0)


def test_a_model_that_was_cut_before_is_refused(cut, make_trainer, tiny_model):
    with pytest.raises(ValueError, match="model: expected whole weights, got a model that"):
        make_trainer(cut(tiny_model(), 0))
    with pytest.raises(ValueError, match="ref_model: expected whole weights"):
        make_trainer(ref_model=cut(tiny_model(), 0))


@pytest.mark.parametrize(
    ("stage", "fsdp", "meets"),
    [
        (None, False, False),
        (None, True, True),
        (1, False, False),
        (2, False, True),
        (3, False, True),
    ],
)
def test_where_processes_meet_in_every_pack(stage, fsdp, meets):
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(
        is_fsdp_enabled=fsdp, is_deepspeed_enabled=stage is not None, accelerator=accelerator
    )
    assert meets_in_packs(trainer) is meets


@pytest.mark.parametrize(
    ("stage", "fact"),
    [
        (None, {}),
        (0, {"DeepSpeed": "ZeRO 0"}),
        (1, {"DeepSpeed": "ZeRO 1 over 2 processes"}),
        (3, {"DeepSpeed": "ZeRO 3 over 2 processes"}),
    ],
)
def test_a_checkpoint_says_how_it_is_cut(stage, fact):
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    trainer = SimpleNamespace(
        is_deepspeed_enabled=stage is not None, accelerator=accelerator,
        args=SimpleNamespace(world_size=2),
    )  # fmt: skip
    assert pieces_fact(trainer) == fact


@pytest.mark.parametrize("last_batch", [True, False])
def test_deepspeed_steps_in_the_last_pack_alone(last_batch):
    accelerator = SimpleNamespace(sync_gradients=last_batch)
    trainer = SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=True, accelerator=accelerator
    )
    with pytest.raises(MemoryError), more_to_come(trainer, None):
        assert accelerator.sync_gradients is False
        raise MemoryError
    assert accelerator.sync_gradients is last_batch
