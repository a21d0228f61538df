"""The language, the gold reward, the source, exact enumeration and exact measures."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from fastdaa.study.enumeration import response_logps
from fastdaa.study.gold import raw_gold
from fastdaa.study.language import LANGUAGE, Language
from fastdaa.study.measures import measure, win_rate
from fastdaa.study.presets import PRESETS, preset_of, size_of
from fastdaa.study.sft import new_model
from fastdaa.study.world import make_world
from fastdaa.train.attention import enable_segments

SMALL = Language(prompts=3, longest=3)


def number_of(language: Language, tokens: tuple[int, ...]) -> int:
    """By counting: responses by length, then in alphabetical order."""
    before = sum(language.tokens**length for length in range(len(tokens)))
    same = itertools.product(range(language.tokens), repeat=len(tokens))
    return before + list(same).index(tokens)


def random_logps(prompts: int, responses: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    return (2 * logits).log_softmax(1)


def test_sizes_of_the_language() -> None:
    assert LANGUAGE.responses == sum(6**length for length in range(7)) == 55_987
    assert LANGUAGE.table.shape == (55_987, 6)
    assert (LANGUAGE.prompts, LANGUAGE.eos, LANGUAGE.pad, LANGUAGE.vocab_size) == (8, 14, 15, 16)
    assert LANGUAGE.lengths.bincount().tolist() == [6**length for length in range(7)]


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [
        pytest.param((), [14], id="empty"),
        pytest.param((0,), [8, 14], id="one token"),
        pytest.param((5, 0, 3), [13, 8, 11, 14], id="three tokens"),
        pytest.param((1, 2, 3, 4, 5, 0), [9, 10, 11, 12, 13, 8], id="six tokens have no EOS"),
    ],
)
def test_completions(tokens: tuple[int, ...], ids: list[int]) -> None:
    number = number_of(LANGUAGE, tokens)
    assert LANGUAGE.completion_ids(number) == ids
    padded = ids + [LANGUAGE.pad] * (6 - len(ids))
    assert LANGUAGE.padded_completions()[number].tolist() == padded
    assert LANGUAGE.response_numbers(torch.tensor([padded])).tolist() == [number]


def test_response_numbers_are_the_inverse_of_completions() -> None:
    numbers = SMALL.response_numbers(SMALL.padded_completions())
    assert numbers.tolist() == list(range(SMALL.responses))
    with pytest.raises(ValueError, match="completions: expected content tokens 3 to 8"):
        SMALL.response_numbers(torch.tensor([[4, 0, 9]]))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        # 0.5 min(len, 4) - 3 (same-class neighbours) - max(0, len - 4) - 2 [empty] + weights
        pytest.param((), -2.0, id="empty"),
        pytest.param((0,), 0.5 + 0.1, id="one token"),
        pytest.param((0, 3, 1), 1.5 + 0.1 + 0.8 + 0.2, id="alternating"),
        pytest.param((0, 1, 2), 1.5 + 0.1 + 0.2 + 0.4 - 6.0, id="two violations"),
        pytest.param((0, 3, 0, 3, 0, 3), 2.0 - 2.0 + 3 * (0.1 + 0.8), id="overlong"),
    ],
)
def test_gold_by_hand(tokens: tuple[int, ...], expected: float) -> None:
    weights = torch.tensor([[0.1, 0.2, 0.4, 0.8, 1.6, 3.2]], dtype=torch.float64)
    gold = raw_gold(LANGUAGE, weights, PRESETS["H"])
    assert gold[0, number_of(LANGUAGE, tokens)].item() == pytest.approx(expected, abs=1e-9)


def test_gold_of_the_same_tokens_in_another_order_ties_exactly() -> None:
    world = make_world("H", 3)
    first, second = number_of(LANGUAGE, (0, 3, 1, 4, 2)), number_of(LANGUAGE, (2, 4, 0, 3, 1))
    assert torch.equal(world.gold[:, first], world.gold[:, second])


def test_anchored_gold_has_mean_zero_and_unit_deviation_under_the_reference() -> None:
    world = make_world("M", 1)
    logps = random_logps(8, LANGUAGE.responses, seed=0)
    gold, probs = world.anchored(logps), logps.exp()
    assert (probs * gold).sum(1).abs().max() < 1e-12
    assert (probs * gold.square()).sum(1).mean().item() == pytest.approx(1.0, abs=1e-12)


def test_source_by_hand() -> None:
    world = make_world("H", 0)
    within = world.favourites.view(8, 2, 3).softmax(-1).view(8, 6)
    source = world.source_logps.exp()
    assert torch.allclose(source.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-12)
    assert source[:, 0].max() == 0
    # A first token of either class, on with 0.7, another class with 0.98, end with 0.3
    expected = 0.5 * within[:, 2] * 0.7 * 0.98 * within[:, 3] * 0.7 * 0.02 * within[:, 4] * 0.3
    assert torch.allclose(source[:, number_of(LANGUAGE, (2, 3, 4))], expected, rtol=1e-12)


def test_source_samples_follow_the_source() -> None:
    world = make_world("H", 0)
    prompts, numbers = world.sft_sequences(40_000)
    source = world.source_logps.exp()
    counts = torch.zeros_like(source)
    counts.index_put_((prompts, numbers), counts.new_ones(()), accumulate=True)
    top = source[0].topk(20).indices
    asked = counts[0].sum()
    deviation = (counts[0, top] / asked - source[0, top]) / (source[0, top] / asked).sqrt()
    assert deviation.abs().max() < 4
    again = world.sft_sequences(40_000)
    assert torch.equal(prompts, again[0])
    assert torch.equal(numbers, again[1])
    assert not torch.equal(numbers, world.sft_sequences(40_000, seed=1)[1])


def test_worlds_are_decided_by_their_seed() -> None:
    first, same, other = make_world("H", 5), make_world("H", 5), make_world("H", 6)
    assert torch.equal(first.gold, same.gold)
    assert torch.equal(first.source_logps, same.source_logps)
    assert not torch.equal(first.weights, other.weights)
    assert not torch.equal(first.favourites, other.favourites)


@pytest.mark.parametrize("segments", [False, True], ids=["as built", "in the trainer's attention"])
def test_enumeration_equals_teacher_forcing(segments: bool) -> None:
    world = make_world("H", 0, SMALL)
    model = new_model("d12", 7, SMALL)
    if segments:
        enable_segments(model)
    model.train()
    logps = response_logps(model, world)
    assert model.training
    assert logps.dtype == torch.float64
    for prompt in range(SMALL.prompts):
        for number in range(SMALL.responses):
            ids = [prompt, *SMALL.completion_ids(number)]
            with torch.no_grad():
                tokens = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(float(tokens[place, token]) for place, token in enumerate(ids[1:]))
            assert logps[prompt, number].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("size", ["d12", "d32"])
def test_all_probability_is_on_responses(size: str) -> None:
    logps = response_logps(new_model(size, 0), make_world("H", 0))
    assert logps.shape == (8, 55_987)
    assert (logps.exp().sum(1) - 1).abs().max() < 1e-9


def test_identical_policies_win_one_half_to_the_last_bit() -> None:
    logps = random_logps(4, 500, seed=1)
    gold = torch.randint(20, (4, 500), generator=torch.Generator().manual_seed(0)).double()
    assert win_rate(logps.exp(), logps.exp(), gold) == 0.5


def test_win_rate_equals_all_pairs_and_swaps() -> None:
    first, second = random_logps(2, 60, seed=1).exp(), random_logps(2, 60, seed=2).exp()
    gold = torch.randint(9, (2, 60), generator=torch.Generator().manual_seed(0)).double()
    better = (gold[:, :, None] > gold[:, None, :]).double()
    tied = (gold[:, :, None] == gold[:, None, :]).double()
    joint = first[:, :, None] * second[:, None, :]
    expected = (joint * (better + 0.5 * tied)).sum((1, 2)).mean().item()
    won = win_rate(first, second, gold)
    assert won == pytest.approx(expected, abs=1e-12)
    assert won + win_rate(second, first, gold) == pytest.approx(1.0, abs=1e-15)


def test_measures_against_plain_sums() -> None:
    world = make_world("H", 0, SMALL)
    policy, ref = random_logps(3, SMALL.responses, seed=1), random_logps(3, SMALL.responses, seed=2)
    gold = world.anchored(ref)
    got = measure(world, policy, ref, gold)
    sums = dict.fromkeys(got._fields, 0.0)
    for prompt in range(3):
        for number in range(SMALL.responses):
            p, q = policy[prompt, number].exp().item(), ref[prompt, number].exp().item()
            tokens = [token for token in SMALL.table[number].tolist() if token >= 0]
            sums["kl"] += p * math.log(p / q) / 3
            sums["kl_forward"] += q * math.log(q / p) / 3
            sums["gold"] += p * gold[prompt, number].item() / 3
            sums["entropy"] -= p * math.log(p) / 3
            sums["length"] += p * len(tokens) / 3
            pairs = itertools.pairwise(tokens)
            sums["violations"] += p * sum(a // 3 == b // 3 for a, b in pairs) / 3
    for name in ("kl", "kl_forward", "gold", "entropy", "length", "violations"):
        assert getattr(got, name) == pytest.approx(sums[name], abs=1e-10), name
    assert got.max_prob == pytest.approx(policy.exp().amax(1).mean().item())
    same = measure(world, ref, ref, gold)
    assert (same.kl, same.kl_forward, same.win_rate) == (0.0, 0.0, 0.5)
    assert same.gold == pytest.approx(0.0, abs=1e-12)


def test_measures_refuse_what_is_no_distribution() -> None:
    world = make_world("H", 0, SMALL)
    logps = random_logps(3, SMALL.responses, seed=1)
    with pytest.raises(ValueError, match=r"logps: expected log-probs .* sum to 1"):
        measure(world, logps - 0.1, logps, world.gold)
    with pytest.raises(ValueError, match=r"ref_logps: expected shape \[3, 259\], got \[2, 259\]"):
        measure(world, logps, logps[:2], world.gold)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: preset_of("X"), "preset: expected one of H, M, got 'X'", id="preset"),
        pytest.param(lambda: size_of("d3"), "size: expected one of d12, d32, d64", id="size"),
        pytest.param(
            lambda: replace(PRESETS["H"], violations=2.0),
            "violations: expected a number from 0 to 1, got 2.0",
            id="share",
        ),
        pytest.param(
            lambda: replace(PRESETS["H"], pairs=0), "pairs: expected at least 1", id="count"
        ),
    ],
)
def test_bad_settings(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_steps_of_the_presets() -> None:
    assert PRESETS["H"].steps == 128
    assert PRESETS["M"].steps == 256
