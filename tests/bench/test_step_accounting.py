"""Tokens and operations of a step, by hand."""

from __future__ import annotations

import pytest

from fastdaa.benchmarks.step import accounting
from fastdaa.benchmarks.step.accounting import Tokens
from fastdaa.benchmarks.step.cases import MODELS
from fastdaa.benchmarks.step.contenders import CONTENDERS
from fastdaa.benchmarks.step.model import Parameters, build, parameters
from fastdaa.benchmarks.step.pairs import PairLengths

PAIRS = [PairLengths(2, 3, 5), PairLengths(4, 1, 1), PairLengths(3, 2, 1)]
# Useful: 10 + 6 + 6; scored: 8 + 2 + 3. Batches of two: 4 rows of 7 and 2 rows of 5 make 38.


@pytest.mark.parametrize(
    ("name", "device", "backbone", "head"),
    [
        ("trl", "cpu", 38, 38 - 6),
        ("trl", "cuda", 38, 13),
        ("fastdaa-padded", "cpu", 38, 13),
        ("fastdaa-packed", "cpu", 22 + 9, 13),
        ("fastdaa-prefix_shared", "cpu", 22, 13),
    ],
)
def test_tokens(name: str, device: str, backbone: int, head: int) -> None:
    got = accounting.count(CONTENDERS[name], PAIRS, 2, device)
    assert got == Tokens(useful=22, scored=13, backbone=backbone, head=head)


@pytest.mark.parametrize(
    ("lora", "online", "recomputed", "useful", "hardware"),
    [
        (False, False, False, 6 * (10 * 22 + 7 * 13), 6 * (10 * 38 + 7 * 32)),
        (False, True, False, 6 * (10 * 22 + 7 * 13), 8 * (10 * 38 + 7 * 32)),
        (False, True, True, 6 * (10 * 22 + 7 * 13), 10 * 10 * 38 + 8 * 7 * 32),
        (True, True, False, 4 * (10 * 22 + 7 * 13), 6 * (10 * 38 + 7 * 32)),
    ],
    ids=["cached", "online", "recomputed", "lora"],
)
def test_operations(
    lora: bool, online: bool, recomputed: bool, useful: float, hardware: float
) -> None:
    work = accounting.work(
        Tokens(22, 13, 38, 32), Parameters(body=10, head=7),
        lora=lora, online_reference=online, recomputed=recomputed,
    )  # fmt: skip
    assert (work.useful, work.hardware) == (useful, hardware)


def test_parameters_are_those_of_the_model() -> None:
    shape = MODELS["llama-smoke"]
    model = build(shape, "cpu", seed=0, max_length=32)
    linear = {n: p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    assert parameters(shape) == (sum(linear.values()), model.lm_head.weight.numel())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("llama-13m", 12.9), ("llama-0.5b", 545), ("llama-1.2b", 1236)],
)
def test_models_have_the_size_of_their_name(name: str, millions: float) -> None:
    shape = MODELS[name]
    body, head = parameters(shape)
    total = body + (head if shape.tied else 2 * head)
    assert total / 1e6 == pytest.approx(millions, rel=0.01)


def test_the_measured_rate_is_a_rate() -> None:
    assert 1e8 < accounting.measured_rate("cpu", threads=1) < 1e13
