"""Measurements on held-out prompts: what they say, when, and that the run does not notice."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from fastdaa.online.config import OnlineConfig
from fastdaa.online.generation import Sampling, TransformersRollouts
from fastdaa.online.held_out import HeldOut
from fastdaa.online.loop import OnlineTrainer
from fastdaa.online.scoring import score_tokens

EOS = 2


class CountReward:
    """How often a token is in a completion."""

    def score(self, prompt_ids, completion_ids, texts=None):
        return torch.tensor([float((ids == 5).sum()) for ids in completion_ids])


@pytest.fixture
def make_trainer(tiny_policy, sequences):
    def make(evaluate=None, **options):
        settings = {
            "output_dir": None, "iterations": 3, "rollouts_per_iteration": 4, "minibatch": 4,
            "epochs": 1, "learning_rate": 1e-2, "max_new_tokens": 6, "disable_tqdm": True,
            **options,
        }  # fmt: skip
        prompts, _ = sequences(6)
        rollouts = TransformersRollouts(Sampling((EOS,), 0, 6))
        return OnlineTrainer(
            tiny_policy(), rollouts, CountReward(), prompts, OnlineConfig(**settings),
            evaluate=evaluate,
        )  # fmt: skip

    return make


def test_the_start_is_the_reference(make_trainer, sequences):
    prompts, _ = sequences(5, seed=1)
    measured = HeldOut(prompts, seed=3).measure(make_trainer())
    assert measured["eval/scores"] == measured["eval/ref_scores"]
    assert measured["eval/kl"] == 0 and 1 <= measured["eval/length"] <= 6


def test_a_policy_that_has_moved(make_trainer, tiny_policy, sequences):
    """KL by hand: log-ratios of the completions that the policy itself draws."""
    prompts, _ = sequences(5, seed=1)
    trainer, moved = make_trainer(), tiny_policy(1).state_dict()
    trainer.models.policy.load_state_dict(moved)
    measured = HeldOut(prompts, seed=3).measure(trainer)
    drawn = trainer.sources[0].sample(trainer.models.policy, prompts, 3).completion_ids
    ratios = []
    for prompt, completion in zip(prompts, drawn, strict=True):
        sums = []
        for model in (tiny_policy(1), tiny_policy()):
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
            logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            sums.append(logps.gather(1, completion[:, None]).sum())
        ratios.append(sums[0] - sums[1])
    assert measured["eval/kl"] == pytest.approx(float(torch.stack(ratios).mean()), rel=1e-4)
    expected = CountReward().score(prompts, drawn).mean()
    assert measured["eval/scores"] == pytest.approx(float(expected))


class LengthReward:
    """How long a completion is."""

    def score(self, prompt_ids, completion_ids, texts=None):
        return torch.tensor([float(len(ids)) for ids in completion_ids])


def test_standard_errors_are_over_prompts(make_trainer, tiny_policy, sequences):
    """By hand: with each prompt answered twice, the error of the mean over prompts' means."""
    prompts, _ = sequences(4, seed=1)
    trainer = make_trainer()
    trainer.models.policy.load_state_dict(tiny_policy(1).state_dict())
    measured = HeldOut([*prompts, *prompts], seed=3, gold=LengthReward()).measure(trainer)
    asked = [*prompts, *prompts]
    drawn = trainer.sources[0].sample(trainer.models.policy, asked, 3).completion_ids
    lengths = torch.tensor([float(len(ids)) for ids in drawn]).view(2, 4).mean(0)
    assert measured["eval/gold"] == pytest.approx(float(lengths.mean()))
    assert measured["eval/gold_stderr"] == pytest.approx(float(lengths.std()) / 2)
    assert {"eval/ref_gold", "eval/scores_stderr", "eval/kl_stderr"} <= measured.keys()


def test_a_single_prompt_has_no_standard_error(make_trainer, sequences):
    prompts, _ = sequences(1)
    measured = HeldOut(prompts * 3).measure(make_trainer())
    assert "eval/scores" in measured and "eval/scores_stderr" not in measured


def test_measured_when_due_and_unnoticed(make_trainer, sequences):
    prompts, _ = sequences(5, seed=1)
    calls = []
    held_out = HeldOut(prompts, every=2)

    def evaluate(trainer):
        found = held_out(trainer)
        calls.append((trainer.place.iteration, bool(found)))
        return found

    with_it, without = make_trainer(evaluate), make_trainer()
    with_it.train()
    without.train()
    assert calls == [(1, False), (2, True), (3, True)]
    other = copy.deepcopy(without.models.policy.state_dict())
    for name, value in with_it.models.policy.state_dict().items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("prompts", "every", "message"),
    [([], 1, "expected at least one to evaluate on"), ([torch.tensor([3])], 0, "every")],
    ids=["no prompt", "never"],
)
def test_errors(prompts, every, message):
    with pytest.raises(ValueError, match=message):
        HeldOut(prompts, every=every)


def test_scores_see_the_temperature_of_the_run(make_trainer, sequences, monkeypatch):
    prompts, _ = sequences(2, seed=1)
    seen = []

    def spy(*args, **options):
        seen.append(options["temperature"])
        return score_tokens(*args, **options)

    monkeypatch.setattr("fastdaa.online.held_out.score_tokens", spy)
    HeldOut(prompts).measure(make_trainer(temperature=0.5))
    assert seen == [0.5, 0.5]


class BrokenReward:
    """Whose author has made a mistake."""

    def score(self, prompt_ids, completion_ids, texts=None):
        raise ValueError("reward broken.py:f failed")


class NoisyReward(CountReward):
    """Draws random numbers, as a reward with dropout or a sampled judge does."""

    def score(self, prompt_ids, completion_ids, texts=None):
        noise = [random.random() + np.random.rand() for _ in completion_ids]
        noise = torch.tensor(noise) + torch.rand(len(completion_ids))
        return super().score(prompt_ids, completion_ids) + noise


def test_a_resumed_run_with_a_random_reward_is_the_same(make_trainer, sequences, tmp_path):
    prompts, _ = sequences(5, seed=1)

    def run(folder, iterations, resume):
        held_out = HeldOut(prompts, every=1, gold=NoisyReward())
        trainer = make_trainer(
            held_out, output_dir=str(tmp_path / folder), iterations=iterations, save_steps=1
        )
        trainer.sources = (trainer.sources[0], NoisyReward())
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        return trainer, trainer.train(resume=resume).metrics

    whole, expected = run("whole", 3, False)
    run("cut", 2, False)
    rest, found = run("cut", 3, True)
    for name, value in whole.models.policy.state_dict().items():
        assert torch.equal(value, rest.models.policy.state_dict()[name]), name
    evals = [name for name in expected if name.startswith("eval/")]
    assert len(evals) > 5
    assert {name: found[name] for name in evals} == {name: expected[name] for name in evals}


def test_a_gold_reward_that_fails_does_so_before_the_first_iteration(make_trainer, sequences):
    prompts, _ = sequences(5, seed=1)
    trainer = make_trainer(HeldOut(prompts, every=3, gold=BrokenReward()))
    with pytest.raises(ValueError, match=r"broken\.py:f failed"):
        trainer.train()
    assert trainer.place.rollouts == 0
