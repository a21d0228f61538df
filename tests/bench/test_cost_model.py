"""The cost model by hand, and the page that shows its numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastdaa.benchmarks import cost_model
from fastdaa.benchmarks.cases import Case
from fastdaa.benchmarks.contenders import ALL
from fastdaa.benchmarks.cost_model import Cost
from fastdaa.benchmarks.gpu.targets import TARGETS, Target
from fastdaa.benchmarks.roof import Roof, measure_roof

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cost_model.md"
CASE = Case("llama3-8b", 8192, dtype="bfloat16")
H200 = Roof({"bfloat16": 790e12}, 4.3e12)


def test_unit_by_hand() -> None:
    assert CASE.unit == 2 * 8192 * 128256 * 4096
    assert CASE.unit / 790e12 == pytest.approx(10.9e-3, rel=1e-3)


def test_trl_by_hand() -> None:
    n, v, d = 8192, 128256, 4096
    logits, weight, hidden = 6 * n * v, v * d * (4 + 2 * 8 + 6), n * d * (4 + 4 * 8 + 6)
    cost = cost_model.vocabulary_chunks(CASE, "cuda")
    assert cost == Cost(4 * CASE.unit, logits + weight + hidden, "bfloat16")
    assert cost_model.vocabulary_chunks(CASE, "cpu") is None


def test_single_pass_by_hand() -> None:
    n, v, d = 8192, 128256, 4096
    case = Case("llama3-8b", n, "dpo", dtype="bfloat16")
    # The weight's product adds to zeros and targets' rows, and rounds its results itself.
    rounded, factor, begun = n * d * 6, n * d * (4 + 2), v * d * (2 + 2)
    assert n * v * 2 <= 2 << 30 and v * d >= 1 << 24
    targets = n * d * (2 + 3 * 2)  # their rows of the weight, and of its gradient
    cost = cost_model.tiled(case, "single_pass", "triton", "cuda")
    sums = rounded + factor + targets + begun
    assert cost == Cost(3 * case.unit, (4 + 2) * n * v + sums, "bfloat16")


def test_single_pass_in_chunks_by_hand() -> None:
    n, v, d, chunks = 32768, 128256, 4096, 13  # of 2560 tokens
    case = Case("llama3-8b", n, "dpo", dtype="bfloat16")
    packed, read = 4 + 6, 2 + 2  # its largest entry and itself; the loss's gradient in backward
    sums = v * d * (packed + read) + n * d * (2 + packed + read)  # rows are zeros at first
    # The first product writes the weight's sum.
    sums += (chunks - 1) * v * d * 8 + n * d * (8 + (4 + 2) + 2 + (8 + 2))
    cost = cost_model.tiled(case, "single_pass", "triton", "cuda")
    assert cost == Cost(3 * case.unit, (4 + 2) * n * v + sums, "bfloat16")


def test_a_single_pass_in_part_by_hand() -> None:
    n, v, d = 8192, 128256, 4096
    case = Case("llama3-8b", n, "dpo", dtype="bfloat16")
    call = ("cuda", 1500 << 20)
    plan = cost_model.plan_of(
        case, "single_pass", "cuda", impl="single_pass", engine="triton", max_bytes=call[1]
    )
    others = v - plan.kept_columns
    slices = math.ceil(others / plan.tile_columns)
    assert 0 < plan.kept_columns < v and slices == 6
    whole = cost_model.tiled(case, "single_pass", "triton", "cuda")
    cost = cost_model.tiled(case, "single_pass", "triton", *call)
    # Slices add to a wide sum, which the targets' rows join in the end.
    again = (4 + 2) * n * others + (8 * slices + 2 + 3 * 2) * n * d - (2 + 2) * others * d
    assert cost.flop == pytest.approx(whole.flop + 2 * n * others * d)
    assert cost.bytes == pytest.approx(whole.bytes + again)


@pytest.mark.parametrize(
    ("n", "slices", "weight", "packed"),
    [(8192, 8, 0, False), (32768, 16, 8 * 5 + 6, False), (65536, 8, 8 * 15 + 6, True)],
)
def test_recompute_by_hand(n: int, slices: int, weight: int, packed: bool) -> None:
    """8 slices of up to 16384 columns by all of 8192 tokens; 16 of 8192 columns by 6144; 8 of 16384
    columns by 4096, into the memory of what is returned."""
    v, d = 128256, 4096
    cost = cost_model.tiled(Case("llama3-8b", n, dtype="bfloat16"), "recompute", "triton", "cuda")
    adding = 10 * slices + 14 * (slices - 1) if packed else 8 * (slices - 1)
    joining = 2 + 3 * 2  # rows of the weight, and of its gradient
    hidden = n * d * (adding + (2 if packed else 4) + 2 + joining)
    total = (4 + 4 + 2) * n * v + hidden + weight * v * d
    assert cost == Cost(4 * 2 * n * v * d, total, "bfloat16")


def test_the_fused_engine_has_no_tile() -> None:
    case = Case("llama3-8b", 8192, "score", dtype="bfloat16")
    assert cost_model.tiled(case, "score", "fused", "cuda") == Cost(case.unit, 0.0, "bfloat16")


def test_half_precision_on_cpu_is_fp32_work() -> None:
    case = Case("tiny", 64, dtype="bfloat16")
    cost = cost_model.tiled(case, "recompute", "torch", "cpu")
    assert cost.dtype == "float32"
    assert Roof({"bfloat16": 1.0}, 1.0).seconds(cost) is None


@pytest.mark.parametrize(
    ("line", "contender", "case"),
    [
        ("PyTorch, log-probs", "pytorch", CASE),
        ("TRL, log-probs", "trl", CASE),
        ("recompute, triton", "fastdaa-recompute-triton", CASE),
        ("recompute, torch", "fastdaa-recompute", CASE),
        ("frozen, triton", "fastdaa-frozen-triton",
         Case("llama3-8b", 8192, "logps", "bfloat16", False)),
        ("score, triton", "fastdaa-score-triton", Case("llama3-8b", 8192, "score", "bfloat16")),
        ("score, fused", "fastdaa-score-fused", Case("llama3-8b", 8192, "score", "bfloat16")),
        ("single pass of a pair loss, triton", "fastdaa-single-pass-triton",
         Case("llama3-8b", 8192, "dpo", "bfloat16")),
        ("single pass of a pair loss, torch", "fastdaa-single-pass",
         Case("llama3-8b", 8192, "dpo", "bfloat16")),
        ("single pass of 16384 tokens, triton", "fastdaa-single-pass-triton",
         Case("llama3-8b", 16384, "dpo", "bfloat16")),
        ("single pass of 65536 tokens, triton", "fastdaa-single-pass-triton",
         Case("llama3-8b", 65536, "dpo", "bfloat16")),
        ("recompute of 65536 tokens, triton", "fastdaa-recompute-triton",
         Case("llama3-8b", 65536, dtype="bfloat16")),
    ],
    ids=lambda value: value if isinstance(value, str) and "," in value else "",
)  # fmt: skip
def test_the_page_shows_these_numbers(line: str, contender: str, case: Case) -> None:
    (c,) = (c for c in ALL if c.name == contender)
    cost = c.cost(case, "cuda")
    assert cost is not None
    seconds = H200.seconds(cost)
    assert seconds is not None
    products = cost.flop / 790e12
    numbers = (
        f"| {c.gemms(case)}U, {1e3 * products:.1f} ms | {cost.bytes / 1e9:.1f} GB "
        f"| {1e3 * seconds:.1f} | {seconds / products:.2f} |"
    )
    (found,) = (text for text in PAGE.read_text().splitlines() if text.startswith(f"| {line}"))
    assert found.endswith(numbers)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.path)
def test_the_page_shows_what_is_predicted_of_the_targets(target: Target) -> None:
    """By plain division: floor and TRL's time over ours."""
    work = {"score": "score", "single_pass": "dpo"}.get(target.path, "logps")
    case = Case("llama3-8b", 8192, work, "bfloat16", target.path != "frozen")

    def seconds(cost: Cost | None) -> float:
        assert cost is not None
        return cost.flop / 790e12 + cost.bytes / 4.3e12

    floor = target.products * case.unit / 790e12
    trl = seconds(cost_model.vocabulary_chunks(case, "cuda"))
    ours = [
        seconds(cost_model.tiled(case, target.path, engine, "cuda"))
        for engine in ("triton", "torch")
    ]
    row = [f"at most {target.over_floor:.2f}", *(f"{t / floor:.2f}" for t in ours)]
    row += [f"{target.against_trl:.2f}", *(f"{trl / t:.2f}" for t in ours)]
    line = f"| {target.path.replace('_', ' ')} | {' | '.join(row)} |"
    assert line in PAGE.read_text().splitlines()


def test_the_model_counts_the_products_of_the_contender() -> None:
    for case in (CASE, Case("llama3-8b", 512, "dpo", "bfloat16", reference="online")):
        for contender in ALL:
            cost = contender.cost(case, "cuda") if contender.applies(case) else None
            if cost is not None:
                assert cost.flop == contender.gemms(case) * case.unit, contender.name


def test_roof_of_this_machine() -> None:
    roof = measure_roof("cpu", ("float32",))
    assert 1e9 < roof.flops["float32"] < 1e14
    assert 1e8 < roof.bandwidth < 1e13
    assert roof.seconds(Cost(roof.flops["float32"], roof.bandwidth, "float32")) == pytest.approx(2)
