"""Fine-tuning, the cached reference, preference pairs, the reward model, tilting and best-of-n."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastdaa.study import tilt as experiment
from fastdaa.study.closed_form import best_of_n, best_of_n_kl, standardised, tilt
from fastdaa.study.enumeration import response_logps
from fastdaa.study.language import Language
from fastdaa.study.measures import measure
from fastdaa.study.preferences import Pairs, draw_pairs, label_agreement, preference_pairs
from fastdaa.study.presets import PRESETS
from fastdaa.study.reward_model import RewardModel, response_rewards, train_reward_model
from fastdaa.study.sft import Reference, excess_loss, fine_tune, make_reference, new_model
from fastdaa.study.table import read_table
from fastdaa.study.world import World, make_world

SMALL = Language(prompts=4, longest=4)
QUICK = replace(PRESETS["H"], name="quick", sft_samples=8000, sft_epochs=2, pairs=1024)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(QUICK, 0, SMALL)


@pytest.fixture(scope="module")
def reference(world: World, folder: Path) -> Reference:
    return make_reference(world, "d32", 0, folder)


def test_fine_tuning_comes_close_to_the_source(world: World, reference: Reference) -> None:
    untrained = excess_loss(world, response_logps(new_model("d32", 0, SMALL), world))
    assert untrained > 0.3
    assert 0 < excess_loss(world, reference.logps) < 0.02


@pytest.mark.slow
def test_excess_loss_of_the_presets(tmp_path: Path) -> None:
    harsh = make_world("H", 0)
    assert 0 < excess_loss(harsh, make_reference(harsh, "d32", 0, tmp_path).logps) < 0.005


def test_reference_is_cached(
    world: World, reference: Reference, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("fastdaa.study.sft.fine_tune", never)
    again = make_reference(world, "d32", 0, folder)
    assert torch.equal(again.logps, reference.logps)
    assert torch.equal(response_logps(again.model, world), reference.logps)
    # The reward is no setting of the reference, the source and the seeds are.
    milder = make_world(replace(QUICK, penalty=0.5), 0, SMALL)
    assert torch.equal(make_reference(milder, "d32", 0, folder).logps, reference.logps)
    others = [
        (make_world(replace(QUICK, violations=0.5), 0, SMALL), "d32", 0),
        (make_world(QUICK, 1, SMALL), "d32", 0),
        (world, "d12", 0),
        (world, "d32", 1),
    ]
    for settings in others:
        with pytest.raises(AssertionError, match="trained again"):
            make_reference(*settings, folder)
    assert not list(folder.glob(".*.partial"))


def test_reference_is_a_model_folder(reference: Reference, folder: Path) -> None:
    (entry,) = folder.glob("quick-0-d32-s0-*")
    loaded = AutoModelForCausalLM.from_pretrained(entry)
    state = reference.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert json.loads((entry / "settings.json").read_text())["world_seed"] == 0


@pytest.fixture
def brief() -> World:
    """Its reference is made in no time."""
    return make_world(replace(QUICK, sft_samples=512, sft_epochs=1), 0, SMALL)


def test_interrupted_making_leaves_nothing(
    brief: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(weights: object, path: Path, **options: object) -> None:
        assert path.parent.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdaa.study.sft.save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        make_reference(brief, "d12", 0, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["model", "logps"])
def test_a_broken_reference_says_what_to_delete(brief: World, tmp_path: Path, name: str) -> None:
    make_reference(brief, "d12", 0, tmp_path)
    (entry,) = tmp_path.iterdir()
    file = entry / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"made again if {re.escape(str(entry))} is deleted"):
        make_reference(brief, "d12", 0, tmp_path)


def test_two_processes_may_make_a_reference_at_once(
    brief: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(model: object, world: World) -> torch.Tensor:
        monkeypatch.undo()
        make_reference(brief, "d12", 0, tmp_path)
        return response_logps(model, world)

    monkeypatch.setattr("fastdaa.study.sft.response_logps", meanwhile)
    made = make_reference(brief, "d12", 0, tmp_path)
    (entry,) = tmp_path.iterdir()
    assert torch.equal(load_file(entry / "logps.safetensors")["logps"], made.logps)


def test_fine_tuning_is_decided_by_its_seed(brief: World) -> None:
    found = []
    for seed in (0, 0, 1):
        model = new_model("d12", 0, SMALL)
        fine_tune(model, brief, seed)
        found.append(response_logps(model, brief))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_pairs_follow_bradley_terry(world: World, reference: Reference) -> None:
    pairs = draw_pairs(world, reference.logps, reference.gold, 40_000, 0)
    margins = pairs.margins(reference.gold)
    sizes = margins.abs()
    for low, high in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.5, 2.5), (2.5, 10.0)):
        inside = (sizes > low) & (sizes <= high)
        count = int(inside.sum())
        assert count > 100
        expected = sizes[inside].sigmoid()
        won = (margins[inside] > 0).double().mean()
        deviation = (expected * (1 - expected)).sum().sqrt() / count
        assert abs(won - expected.mean()) < 4 * deviation, (low, high)
    assert (pairs.chosen != pairs.rejected).all()


def test_pairs_as_the_trainer_takes_them(world: World, reference: Reference) -> None:
    data = preference_pairs(world, reference.logps, reference.gold, 50, seed=3)
    numbers = draw_pairs(world, reference.logps, reference.gold, 50, seed=3)
    assert data.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    for row, prompt, chosen, rejected in zip(data, *numbers, strict=True):
        assert row["prompt_ids"] == [int(prompt)]
        assert row["chosen_ids"] == SMALL.completion_ids(int(chosen))
        assert row["rejected_ids"] == SMALL.completion_ids(int(rejected))
    other = draw_pairs(world, reference.logps, reference.gold, 50, seed=4)
    assert not torch.equal(numbers.chosen, other.chosen)
    with pytest.raises(ValueError, match="n: expected at least one pair, got 0"):
        draw_pairs(world, reference.logps, reference.gold, 0, seed=0)


def test_rewards_equal_single_forwards(world: World, reference: Reference) -> None:
    model = RewardModel(reference.model, seed=0).eval()
    rewards = response_rewards(model, world)
    assert rewards.shape == (4, SMALL.responses)
    for prompt, number in ((0, 0), (1, 3), (2, 40), (3, 258), (0, 300), (3, 1554)):
        ids = torch.tensor([[prompt, *SMALL.completion_ids(number)]])
        with torch.no_grad():
            hidden = model.model.model(input_ids=ids).last_hidden_state[0, -1]
            expected = model.score(hidden).item()
        assert rewards[prompt, number].item() == pytest.approx(expected, abs=1e-4)


def test_packed_rewards_are_those_of_the_walk(world: World, reference: Reference) -> None:
    from fastdaa.data import PairCollator

    model = RewardModel(reference.model, seed=0).eval()
    rewards = response_rewards(model, world)
    pairs = draw_pairs(world, reference.logps, reference.gold, 20, 0)
    data = preference_pairs(world, reference.logps, reference.gold, 20, 0)
    (pack,) = PairCollator("prefix_shared")([{"row_id": 0, **row} for row in data])["packs"]
    with torch.no_grad():
        packed = model(pack).double().view(20, 2)
    expected = [rewards[pairs.prompts, side] for side in (pairs.chosen, pairs.rejected)]
    torch.testing.assert_close(packed, torch.stack(expected, dim=1), atol=1e-4, rtol=0)


def test_reward_model_is_better_than_chance_and_below_the_labels(
    world: World, reference: Reference
) -> None:
    logps, gold = reference.logps, reference.gold
    held_out = draw_pairs(world, logps, gold, 8192, 1)
    agreement = label_agreement(held_out, gold)
    accuracy = {}
    for pairs in (64, 1024):
        data = draw_pairs(world, logps, gold, pairs, 0)
        model = train_reward_model(reference.model, world, data, seed=0)
        margins = held_out.margins(response_rewards(model, world))
        accuracy[pairs] = float((margins > 0).double().mean())
    deviation = 0.5 / math.sqrt(len(held_out.prompts))
    assert accuracy[1024] > 0.5 + 6 * deviation
    assert accuracy[64] < accuracy[1024] < agreement


def test_tilting_by_hand() -> None:
    ref = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    proxy = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.3 * math.exp(2), 0.2 * math.exp(4)], dtype=torch.float64)
    got = tilt(ref, proxy, 0.5).exp()[0]
    torch.testing.assert_close(got, weights / weights.sum(), rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
        tilt(ref, proxy, 0.0)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_with_ties_by_hand(n: int) -> None:
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    proxy = torch.tensor([1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    tied = 0.7**n - 0.4**n
    expected = torch.tensor([tied / 3, 0.4**n, 2 * tied / 3, 1 - 0.7**n], dtype=torch.float64)
    got = best_of_n(probs.log()[None], proxy[None], n)[0].exp()
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_best_of_n_kl_without_ties_is_the_formula() -> None:
    # Twenty thousand equally likely responses are nearly continuous.
    ref = torch.full((1, 20_000), -math.log(20_000), dtype=torch.float64)
    proxy = torch.randperm(20_000, generator=torch.Generator().manual_seed(0)).double()[None]
    for n in (2, 16, 64):
        logps = best_of_n(ref, proxy, n)
        kl = (logps.exp() * (logps - ref)).sum().item()
        assert kl == pytest.approx(best_of_n_kl(n), abs=2e-5 * n)
    far = best_of_n(ref, proxy, 10**7)
    assert far.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    assert far[0, proxy.argmax()].exp().item() == pytest.approx(1.0, abs=1e-9)
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        best_of_n(ref, proxy, 0)


def test_tilting_towards_gold_never_falls(world: World, reference: Reference) -> None:
    proxy = standardised(reference.gold, reference.logps)
    gains = [
        measure(world, tilt(reference.logps, proxy, b), reference.logps, reference.gold).gold
        for b in (8.0, 2.0, 0.5, 0.1)
    ]
    assert gains == sorted(gains)


def test_following_a_reward_model_over_optimises(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, lines = tmp_path, []
    (output / "world").symlink_to(folder)
    experiment.run_tilt(output, [0], lines.append, settings=[QUICK], language=SMALL)
    table = read_table(output / "tilt.jsonl")
    for algorithm in ("tilt", "bon"):
        curve = [row for row in table if row["algorithm"] == algorithm]
        kl = [row["kl"] for row in curve]
        assert kl == sorted(kl)
        proxy = [row["proxy"] for row in curve]
        assert proxy == sorted(proxy)
        best = max(range(len(curve)), key=lambda number: curve[number]["gold"])
        assert 0 < best < len(curve) - 1, "expected the peak inside the curve"
        assert curve[-1]["gold"] < curve[best]["gold"] - 0.1
        assert [row["final"] for row in curve] == [False] * (len(curve) - 1) + [True]
    bon = [row for row in table if row["algorithm"] == "bon"]
    assert all(row["kl"] <= row["kl_formula"] + 1e-6 for row in bon)
    assert bon[1]["kl"] == pytest.approx(bon[1]["kl_formula"], rel=0.02)
    assert "1,024 pairs, seed 0" in lines[0]
    # A second call trains nothing.
    monkeypatch.setattr(experiment, "train_proxy", None)
    again = experiment.run_tilt(output, [0], settings=[QUICK], language=SMALL)
    assert again == lines
    assert list(read_table(output / "tilt.jsonl")) == list(table)


def test_curves_of_other_seeds_and_worlds_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def labelled(world: World, size: Any, key: str, references: Path) -> list[dict[str, Any]]:
        run = f"tilt-{world.preset.name}-s{world.seed}"
        made.append(f"{run}-{size.name}")
        return [{"run": run, "size": size.name, "settings": key}]

    made: list[str] = []
    monkeypatch.setattr(experiment, "_labelled", labelled)
    monkeypatch.setattr(experiment, "describe", lambda rows: "")
    other = replace(QUICK, name="other")
    for seed, settings, size in ((0, [QUICK, other], "d12"), (1, [QUICK], "d12"),
                                 (0, [other], "d12"), (0, [other], "d32")):  # fmt: skip
        experiment.run_tilt(tmp_path, [seed], settings=settings, size=size, language=SMALL)
    rows = [json.loads(line) for line in (tmp_path / "tilt.jsonl").read_text().splitlines()]
    quick = QUICK.name
    assert [(row["run"], row["size"]) for row in rows] == [
        (f"tilt-{quick}-s0", "d12"), (f"tilt-{quick}-s1", "d12"), ("tilt-other-s0", "d32")
    ]  # fmt: skip
    # Nothing twice; the other size has the same names, and takes their place.
    assert len(made) == 4


def test_margins_of_pairs() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [0.0, 5.0, 1.0]])
    pairs = Pairs(torch.tensor([0, 1, 0]), torch.tensor([2, 0, 1]), torch.tensor([0, 1, 1]))
    assert pairs.margins(values).tolist() == [3.0, -5.0, 0.0]
    assert label_agreement(pairs, values) == 0.5
