"""Estimates of the KL from samples against exact enumeration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdaa.study.enumeration import response_logps
from fastdaa.study.estimators import (
    Policy,
    compare,
    estimates,
    load_policy,
    run_estimators,
    trained_policies,
)
from fastdaa.study.language import Language
from fastdaa.study.measures import measure
from fastdaa.study.presets import PRESETS
from fastdaa.study.sampling import sample_responses
from fastdaa.study.sft import Reference, make_reference
from fastdaa.study.world import World, make_world

SMALL = Language(prompts=4, longest=4)
QUICK = replace(PRESETS["H"], name="quick", sft_samples=8000, sft_epochs=1, pairs=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(QUICK, 0, SMALL)


@pytest.fixture(scope="module")
def reference(world: World, folder: Path) -> Reference:
    return make_reference(world, "d32", 0, folder / "world")


@pytest.fixture(scope="module")
def policies(world: World, reference: Reference) -> list[Policy]:
    return trained_policies(world, reference, fractions=(0.3, 1.0))


def test_samples_follow_the_model(world: World, reference: Reference) -> None:
    prompts, ids = sample_responses(reference.model, world, 40_000, seed=0)
    assert prompts.bincount().tolist() == [10_000] * 4
    numbers = SMALL.response_numbers(ids)
    assert torch.equal(SMALL.padded_completions()[numbers], ids)
    probs = reference.logps.exp()[1]
    counts = numbers[prompts == 1].bincount(minlength=SMALL.responses).double()
    top = probs.topk(15).indices
    deviation = (counts[top] / 10_000 - probs[top]) / (probs[top] / 10_000).sqrt()
    assert deviation.abs().max() < 4
    again = sample_responses(reference.model, world, 40_000, seed=0)
    assert torch.equal(again[1], ids)


def test_estimates_of_a_sample_against_enumeration(
    world: World, reference: Reference, policies: list[Policy]
) -> None:
    model = policies[-1].model
    logps = response_logps(model, world)
    prompts, ids = sample_responses(model, world, 64, seed=1)
    found = estimates(model, reference.model, SMALL, prompts, ids)
    numbers = SMALL.response_numbers(ids)
    total = (logps - reference.logps)[prompts, numbers]
    torch.testing.assert_close(found["k1"], total, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["k3"], torch.exp(-total) - 1 + total, atol=1e-3, rtol=1e-3)
    divergences, ratios = _by_hand(model, reference.model, int(prompts[0]), ids[0].tolist())
    assert found["rb"][0].item() == pytest.approx(sum(divergences), abs=1e-4)
    trlx = sum(torch.expm1(ratio).item() - ratio.item() for ratio in ratios)
    assert found["trlx"][0].item() == pytest.approx(trlx, rel=1e-3)


def _by_hand(
    model: torch.nn.Module, reference: torch.nn.Module, prompt: int, ids: list[int]
) -> tuple[list[float], list[torch.Tensor]]:
    tokens = [token for token in ids if token != SMALL.pad]
    with torch.no_grad():
        ours, theirs = (
            each(torch.tensor([[prompt, *tokens[:-1]]])).logits[0].double().log_softmax(-1)
            for each in (model, reference)
        )
    divergences = (ours.exp() * (ours - theirs)).sum(-1).tolist()
    return divergences, [ours[t, token] - theirs[t, token] for t, token in enumerate(tokens)]


def test_k1_and_rb_agree_with_enumeration(
    world: World, reference: Reference, policies: list[Policy]
) -> None:
    distances = []
    for policy in policies:
        record = compare(policy, reference, world, samples=128, repeats=100, seed=2)
        logps = response_logps(policy.model, world)
        exact = measure(world, logps, reference.logps, reference.gold).kl
        assert record["exact"] == exact
        distances.append(exact)
        for name in ("k1", "rb"):
            found = record["estimators"][name]
            assert abs(found["mean"] - exact) < 3 * found["stderr"], (policy.name, name)
            assert abs(found["bias_in_stderr"]) < 3
            assert found["p05"] < exact < found["p95"]
        assert record["variance_ratio"] > 1.5
        # Its expectation is chi^2 - KL: far off, and not by chance.
        assert abs(record["estimators"]["trlx"]["bias_in_stderr"]) > 5
    assert 0.02 < distances[0] < distances[1]


def test_a_policy_that_is_the_reference(world: World, reference: Reference) -> None:
    policy = Policy("itself", reference.model)
    record = compare(policy, reference, world, samples=8, repeats=2)
    assert record["exact"] == 0.0
    assert record["variance_ratio"] is None
    assert record["estimators"]["k1"]["mean"] == 0.0
    assert record["estimators"]["rb"]["mean"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="expected 1 sample and 2 repeats or more, got 8 and 1"):
        compare(policy, reference, world, samples=8, repeats=1)


def test_the_file(folder: Path, policies: list[Policy], world: World) -> None:
    policies[-1].model.save_pretrained(folder / "policy")
    lines: list[str] = []
    returned = run_estimators(
        folder, 0, lines.append, preset=QUICK, language=SMALL,
        policy_folders=[folder / "policy"], samples=16, repeats=5,
    )  # fmt: skip
    assert returned == lines
    assert lines[0].startswith("policy: exact KL ")
    content = json.loads((folder / "estimators.json").read_text())
    assert (content["preset"], content["samples"], content["repeats"]) == ("quick", 16, 5)
    (record,) = content["policies"]
    assert set(record["estimators"]) == {"k1", "rb", "k3", "trlx"}
    with pytest.raises(FileNotFoundError, match=r"policy: expected a folder with config\.json"):
        load_policy(folder / "nothing")
