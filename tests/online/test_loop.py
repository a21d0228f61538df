"""The loop: metrics, checkpoints, resume to the bit, Ctrl-C, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from fastdaa.online.checkpoint import save_checkpoint
from fastdaa.online.config import OnlineConfig
from fastdaa.online.held_out import HeldOut
from fastdaa.online.loop import OnlineTrainer
from fastdaa.online.reward_functions import FunctionReward
from fastdaa.online.seeds import prompts_of
from fastdaa.online.types import Completions
from fastdaa.train import checkpoints
from fastdaa.train.metrics_writer import read_metrics
from fastdaa.train.run_record import new_record, write_record

EOS = 2
PROMPTS = [torch.tensor([3 + index]) for index in range(5)]


class Sampler:
    """Token by token from the policy, at most six of them."""

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        generator = torch.Generator().manual_seed(seed)
        completions, finished = [], []
        for prompt in prompts:
            ids = prompt
            with torch.no_grad():
                while len(ids) - len(prompt) < 6 and (ids is prompt or int(ids[-1]) != EOS):
                    logits = model(input_ids=ids[None]).logits[0, -1]
                    token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                    ids = torch.cat([ids, token])
            completions.append(ids[len(prompt) :])
            finished.append(int(ids[-1]) == EOS)
        return Completions(completions, torch.tensor(finished))


class CountOf:
    """The share of one token in a completion."""

    def __init__(self, token: int = 5) -> None:
        self.token = token

    def score(self, prompt_ids: Any, completion_ids: Sequence[Tensor], texts: Any = None) -> Tensor:
        return torch.stack([(ids == self.token).float().mean() for ids in completion_ids])


def _config(folder: Path | None, **changes: Any) -> OnlineConfig:
    settings: dict[str, Any] = {
        "algorithm": "ppo", "iterations": 3, "rollouts_per_iteration": 6, "minibatch": 3,
        "learning_rate": 1e-2, "save_steps": 1, "save_total_limit": 0, "disable_tqdm": True,
        "kl_controller": "adaptive", "kl_target": 0.1, "kl_horizon": 50,
    }  # fmt: skip
    return OnlineConfig(output_dir=None if folder is None else str(folder), **settings | changes)


def _trainer(policy: Any, config: OnlineConfig, **given: Any) -> OnlineTrainer:
    sources = (given.pop("rollouts", Sampler()), given.pop("rewards", CountOf()))
    return OnlineTrainer(policy, *sources, PROMPTS, config, **given)


def _same_weights(first: Any, second: Any) -> bool:
    return all(
        torch.equal(a, b)
        for one, two in ((first.policy, second.policy), (first.critic, second.critic))
        for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


class _Interrupting(CountOf):
    """Sends this process a signal while the rewards of one iteration are computed."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls, self.call = 0, call

    def score(self, *arguments: Any) -> Tensor:
        self.calls += 1
        if self.calls == self.call:
            os.kill(os.getpid(), signal.SIGINT)
        return super().score(*arguments)


class _NoMore:
    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        raise AssertionError("rollouts were sampled that the checkpoint holds")


@pytest.mark.parametrize("algorithm", ["apa", "ppo", "awr"])
def test_a_run_and_its_metrics(tiny_policy: Any, tmp_path: Path, algorithm: str) -> None:
    looked = []
    trainer = _trainer(
        tiny_policy(), _config(tmp_path, algorithm=algorithm, logging_steps=2),
        evaluate=lambda t: looked.append(t.place.iteration) or {"eval/seen": len(looked)},
    )  # fmt: skip
    before = [p.clone() for p in trainer.models.reference.parameters()]
    result = trainer.train()
    assert result[:3] == (3, 12, False)
    assert looked == [1, 2, 3]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["iteration"], row["step"], row["episode"]) for row in rows] == [
        (2, 8, 12), (3, 12, 18)
    ]  # fmt: skip
    names = {
        "objective/kl", "objective/entropy", "objective/scores", "objective/rlhf_reward",
        "policy/approxkl", "loss/policy", "loss/value", "val/ratio", "lr",
        "rollout_tokens_per_second", "update_tokens_per_second", "eval/seen",
    }  # fmt: skip
    assert names <= rows[-1].keys()
    assert rows[-1]["update_tokens_per_second"] > 0
    assert ("policy/clipfrac" in rows[-1]) == (algorithm == "ppo")
    assert all(torch.equal(a, b) for a, b in zip(
        before, trainer.models.reference.parameters(), strict=True
    ))  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12", "checkpoint-4", "checkpoint-8"
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"bf16": True}, {"critic": "shared", "critic_head": "linear"}, {"tokens_per_pack": 12},
     {"kl_controller": "fixed", "whiten_advantages": "unmasked", "reward_clip": 0.5},
     {"lr_scheduler_type": "cosine", "warmup_steps": 2, "clip_range_value": 0.2}],
    ids=lambda changes: "-".join(changes),
)  # fmt: skip
def test_other_ways_to_run(tiny_policy: Any, changes: dict[str, Any]) -> None:
    policy = tiny_policy()
    before = [parameter.clone() for parameter in policy.parameters()]
    result = _trainer(policy, _config(None, iterations=2, **changes)).train()
    assert result.iterations == 2
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())
    assert not all(map(torch.equal, before, policy.parameters()))
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


def test_activation_checkpointing_computes_layers_again(tiny_policy: Any) -> None:
    runs, calls = [], []
    for again in (False, True):
        trainer = _trainer(tiny_policy(), _config(None, activation_checkpointing=again))
        counts = {"policy": 0, "critic": 0, "reference": 0}

        def count(layer: Any, _: Any, of: str, counts: dict[str, int] = counts) -> None:
            counts[of] += layer.training

        models = trainer.models
        policy, reference = models.policy.model, models.reference.model
        for of, model in (
            ("policy", policy),
            ("critic", models.critic.backbone),
            ("reference", reference),
        ):
            model.layers[0].mlp.register_forward_pre_hook(functools.partial(count, of=of))
        trainer.train()
        runs.append(models)
        calls.append(counts)
    assert _same_weights(*runs)
    # Twelve minibatches.
    assert calls == [
        {"policy": 12, "critic": 12, "reference": 0},
        {"policy": 24, "critic": 24, "reference": 0},
    ]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_adapter_needs_no_copy_as_its_reference(tiny_policy: Any, dropout: float) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for reference in (None, tiny_policy()):
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules="all-linear", lora_dropout=dropout)
        policy = peft.get_peft_model(tiny_policy(), lora)
        evaluate = HeldOut(PROMPTS[:2], every=1)
        config = _config(None, disable_dropout=False)
        trainer = _trainer(policy, config, reference=reference, evaluate=evaluate)
        assert trainer.models.reference is reference
        base = {w.data_ptr() for w in policy.parameters() if not w.requires_grad}
        for weight in trainer.models.critic.backbone.parameters():
            assert (weight.data_ptr() in base) != weight.requires_grad
        trainer.train()
        found.append((policy, trainer))
    assert all(map(torch.equal, *(policy.parameters() for policy, _ in found)))
    first, second = (trainer._metrics for _, trainer in found)
    assert first["objective/kl"] and first["eval/kl"]
    for name in first.keys() - {n for n in first if "time" in n or "per_second" in n}:
        assert first[name] == second[name], name


def test_a_base_that_is_trained_is_no_reference(tiny_policy: Any) -> None:
    peft = pytest.importorskip("peft")
    policy = peft.get_peft_model(tiny_policy(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    policy.base_model.model.model.norm.weight.requires_grad_(True)
    trainer = _trainer(policy, _config(None))
    norm = trainer.models.reference.base_model.model.model.norm.weight
    assert norm is not policy.base_model.model.model.norm.weight and not norm.requires_grad


def test_an_adapter_that_is_trained_further_has_its_start_as_reference(tiny_policy: Any) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    base = tiny_policy()
    torch.manual_seed(1)  # with others no rollout may have the token that pays
    policy = peft.get_peft_model(base, lora)
    start = copy.deepcopy(policy)
    trainer = _trainer(policy, _config(None))
    trainer.train()
    reference, weights = trainer.models.reference, dict(policy.named_parameters())
    for (name, kept), first in zip(reference.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(kept, first) and not kept.requires_grad
        assert (kept is weights[name]) != weights[name].requires_grad, name
    assert not all(map(torch.equal, weights.values(), start.parameters()))


def test_models_train_in_updates_alone(tiny_policy: Any) -> None:
    seen: list[tuple[str, bool, bool]] = []

    def look(when: str, trainer: OnlineTrainer) -> None:
        seen.append((when, trainer.models.policy.training, trainer.models.critic.training))

    class Watched(CountOf):
        def score(self, *arguments: Any) -> Tensor:
            look("rewards", trainer)
            return super().score(*arguments)

    trainer = _trainer(
        tiny_policy(), _config(None), rewards=Watched(), evaluate=lambda t: look("evaluation", t)
    )
    step = trainer.updater.step

    def watched(*arguments: Any) -> Any:
        look("update", trainer)
        return step(*arguments)

    trainer.updater.step = watched  # type: ignore[method-assign]
    trainer.train()
    assert set(seen) == {
        ("rewards", False, False), ("update", True, True), ("evaluation", False, False)
    }  # fmt: skip


def test_the_policy_learns_what_pays(tiny_policy: Any) -> None:
    config = _config(
        None, algorithm="apa", kl_lambda=0.5, iterations=12, rollouts_per_iteration=24, minibatch=8,
        learning_rate=1e-2,
    )  # fmt: skip
    scores: list[float] = []
    trainer = _trainer(
        tiny_policy(), config,
        evaluate=lambda t: scores.append(float(t._metrics["objective/raw_scores"])),
    )  # fmt: skip
    trainer.train()
    assert sum(scores[-3:]) / 3 > 3 * (sum(scores[:2]) / 2) + 0.1


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_resumed_after_an_iteration_as_if_never_stopped(
    tiny_policy: Any, tmp_path: Path, critic: str
) -> None:
    whole = _trainer(tiny_policy(), _config(tmp_path / "whole", critic=critic))
    whole.train()
    _trainer(tiny_policy(), _config(tmp_path / "cut", critic=critic, iterations=2)).train()
    rest = _trainer(tiny_policy(), _config(tmp_path / "cut", critic=critic))
    assert rest.train(resume=True).iterations == 3
    assert _same_weights(whole.models, rest.models)
    assert whole.controller == rest.controller
    assert whole.running.state_dict() == rest.running.state_dict()
    assert whole.monitor == rest.monitor
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")]
    for ours, theirs in zip(*rows, strict=True):
        assert {k: v for k, v in ours.items() if not _timed(k)} == {
            k: v for k, v in theirs.items() if not _timed(k)
        }


def _score(prompts: Any, completions: Any) -> Any:
    return [1.0] * len(completions)


def _other(prompts: Any, completions: Any) -> Any:
    return [2.0] * len(completions)


class _Words:
    """What is used of a tokenizer."""

    def batch_decode(self, rows: Sequence[Tensor], **_: Any) -> list[str]:
        return [str(row.tolist()) for row in rows]

    def save_pretrained(self, folder: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize("changed", ["reward", "gold_reward"])
def test_resumed_with_another_reward(tiny_policy: Any, tmp_path: Path, changed: str) -> None:
    def trainer(iterations: int, **given: Any) -> OnlineTrainer:
        reward, gold = (
            FunctionReward(given.get(name, _score)) for name in ("reward", "gold_reward")
        )
        config = _config(tmp_path, iterations=iterations)
        held_out = HeldOut([torch.tensor([3, 4])], gold=gold)
        return _trainer(tiny_policy(), config, rewards=reward, evaluate=held_out,
                        tokenizer=_Words())  # fmt: skip

    trainer(1).train()
    said = f"resume: expected the {changed} of .*, _score, got another, _other"
    with pytest.raises(ValueError, match=said):
        trainer(2, **{changed: _other}).train(resume=True)
    assert trainer(2).train(resume=True).iterations == 2


def test_resumed_with_another_factor_of_the_adapter(tiny_policy: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def trainer(iterations: int, alpha: int, rank: int = 2) -> OnlineTrainer:
        lora = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj"])
        policy = peft.get_peft_model(tiny_policy(), lora)
        return _trainer(policy, _config(tmp_path, iterations=iterations))

    trainer(1, 8).train()
    said = "expected the adapter of .* alpha 8.*, got another, .* alpha 64.*; give the lora_"
    with pytest.raises(ValueError, match=said):
        trainer(2, 64).train(resume=True)
    with pytest.raises(ValueError, match=r"expected the adapter of .*, got another"):
        trainer(2, 8, rank=4).train(resume=True)
    assert trainer(2, 8).train(resume=True).iterations == 2


def _timed(name: str) -> bool:
    return name.startswith("time") or "per_second" in name


def test_ctrl_c_keeps_rollouts_and_the_rest_is_the_same(tiny_policy: Any, tmp_path: Path) -> None:
    whole = _trainer(tiny_policy(), _config(tmp_path / "whole"))
    whole.train()
    cut = _trainer(tiny_policy(), _config(tmp_path / "cut"), rewards=_Interrupting(call=3))
    # A process in the background is started with SIGINT ignored.
    before = signal.getsignal(signal.SIGINT)
    result = cut.train()
    assert result.interrupted
    assert result[:2] == (2, 8)
    assert signal.getsignal(signal.SIGINT) is before
    # The same step as after the second iteration, now with the rollouts of the third.
    state = torch.load(tmp_path / "cut" / "checkpoint-8" / "state.pt", weights_only=True)
    assert len(state["experience"]["scores"]) == 6
    rest = _trainer(tiny_policy(), _config(tmp_path / "cut"), rollouts=_NoMore())
    assert not rest.train(resume=True).interrupted
    assert _same_weights(whole.models, rest.models)
    assert whole.controller == rest.controller


def test_stopped_between_two_minibatches(tiny_policy: Any, tmp_path: Path) -> None:
    whole = _trainer(tiny_policy(), _config(tmp_path / "whole"))
    whole.train()
    cut = _trainer(tiny_policy(), _config(tmp_path / "cut"))
    step = cut.updater.step

    def stop_after_six(*arguments: Any) -> Any:
        if cut.place.steps == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    cut.updater.step = stop_after_six
    assert cut.train().interrupted
    assert cut.place == (1, 2, 6, 6)
    rest = _trainer(tiny_policy(), _config(tmp_path / "cut"), rollouts=Sampler())
    rest.train(resume=tmp_path / "cut" / "checkpoint-6")
    assert _same_weights(whole.models, rest.models)
    rows = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")]
    assert [row["loss/policy"] for row in rows[0]] == pytest.approx(
        [row["loss/policy"] for row in rows[1]], rel=1e-6
    )


def test_half_written_checkpoints_do_not_count(tiny_policy: Any, tmp_path: Path) -> None:
    _trainer(tiny_policy(), _config(tmp_path, iterations=2)).train()
    (tmp_path / ".checkpoint-12.partial").mkdir()
    (tmp_path / "checkpoint-99").mkdir()
    (tmp_path / "checkpoint-8").rename(tmp_path / ".checkpoint-8.replaced")
    # There is nothing left to train.
    assert _trainer(tiny_policy(), _config(tmp_path, iterations=2)).train(resume=True).steps == 8
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "checkpoint-4", "checkpoint-8"
    ]  # fmt: skip
    assert checkpoints.last_complete(tmp_path) == str(tmp_path / "checkpoint-8")


def test_only_the_last_checkpoints_are_kept(tiny_policy: Any, tmp_path: Path) -> None:
    # Other folders are left alone: one of another name, and weights that somebody has put there.
    for name, file in (("checkpoint-best", "trainer_state.json"), ("checkpoint-99", "w.bin")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text('{"global_step": 1}')
    _trainer(tiny_policy(), _config(tmp_path, save_total_limit=2)).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-12", "checkpoint-8", "checkpoint-99", "checkpoint-best"
    ]  # fmt: skip
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_records_of_other_commands_do_not_hide_checkpoints(
    tiny_policy: Any, tmp_path: Path
) -> None:
    write_record(tmp_path, new_record({}))
    _trainer(tiny_policy(), _config(tmp_path, iterations=1)).train()
    assert checkpoints.last_complete(tmp_path) == str(tmp_path / "checkpoint-4")


def test_a_checkpoint_holds_a_model_that_transformers_reads(
    tiny_policy: Any, tmp_path: Path
) -> None:
    trainer = _trainer(tiny_policy(), _config(tmp_path, iterations=1))
    trainer.train()
    trainer.save_model(tmp_path / "model")
    policy = type(trainer.models.policy)
    for folder in ("checkpoint-4", "model"):
        read = policy.from_pretrained(tmp_path / folder)
        mine = trainer.models.policy.parameters()
        assert all(torch.equal(a, b) for a, b in zip(mine, read.parameters(), strict=True))
    content = json.loads((tmp_path / "checkpoint-4" / "online_config.json").read_text())
    assert content["algorithm"] == "ppo"


def test_collapse_is_said_and_ends_the_run(
    tiny_policy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(
        tmp_path, algorithm="awr", kl_lambda=0.05, iterations=40, rollouts_per_iteration=12,
        learning_rate=3e-2, stop_on_collapse=True, save_steps=100, disable_tqdm=False,
    )  # fmt: skip
    result = _trainer(tiny_policy(), config).train()
    assert result.collapsed
    assert result.iterations < 40
    assert "collapse: " in capsys.readouterr().out
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["monitor/collapsed"] == 1


class _Wrong:
    def __init__(self, values: Any) -> None:
        self.values = values

    def sample(self, model: Any, prompts: Sequence[Tensor], seed: int) -> Completions:
        return self.values

    def score(self, *arguments: Any) -> Any:
        return self.values


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rewards": _Wrong(torch.zeros(5))}, "reward: expected 6 finite numbers"),
        ({"rewards": _Wrong(torch.full((6,), torch.nan))}, "reward: expected 6 finite numbers"),
        ({"rollouts": _Wrong(Completions([torch.ones(1)] * 5, torch.ones(5)))},
         "rollouts: expected 6 completions"),
        ({"rollouts": _Wrong(Completions([torch.ones(0)] * 6, torch.ones(6)))},
         "rollouts: expected at least one token"),
    ],
    ids=["too-few-rewards", "nan-reward", "too-few-rollouts", "empty-rollouts"],
)  # fmt: skip
def test_sources_that_fail(tiny_policy: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _trainer(tiny_policy(), _config(None), **given).train()


def test_broken_losses_end_the_run(tiny_policy: Any) -> None:
    trainer = _trainer(tiny_policy(), _config(None, learning_rate=1e30, max_grad_norm=0.0))
    with pytest.raises(FloatingPointError, match="expected finite"):
        trainer.train()


def test_a_new_run_does_not_overwrite_an_old_one(tiny_policy: Any, tmp_path: Path) -> None:
    _trainer(tiny_policy(), _config(tmp_path, iterations=1)).train()
    with pytest.raises(ValueError, match="expected a folder without checkpoints for a new run"):
        _trainer(tiny_policy(), _config(tmp_path)).train()
    with pytest.raises(ValueError, match=r"resume: .*clip_range 0.2 then, 0.3 now"):
        _trainer(tiny_policy(), _config(tmp_path, clip_range=0.3)).train(resume=True)
    with pytest.raises(FileNotFoundError, match="resume: expected a complete checkpoint"):
        _trainer(tiny_policy(), _config(tmp_path)).train(resume=tmp_path / "nothing")


def test_resume_without_a_checkpoint_starts(tiny_policy: Any, tmp_path: Path) -> None:
    assert _trainer(tiny_policy(), _config(tmp_path, iterations=1)).train(resume=True).steps == 4


def test_prompts_come_in_whole_passes() -> None:
    drawn = [prompts_of(PROMPTS, 4, iteration, seed=1) for iteration in range(5)]
    ids = [int(prompt) for part in drawn for prompt in part]
    for start in range(0, 20, 5):
        assert sorted(ids[start : start + 5]) == [3, 4, 5, 6, 7]
    assert ids[:5] != ids[5:10]


def test_prompts_that_leave_no_positions() -> None:
    sizes = {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 29}
    policy = GPT2LMHeadModel(GPT2Config(**sizes))
    _trainer(policy, _config(None, max_new_tokens=15))
    said = "max_prompt_length, max_new_tokens: expected at most 16 together: .* has 17 tokens"
    with pytest.raises(ValueError, match=said):
        _trainer(policy, _config(None, max_new_tokens=16))
    held_out = HeldOut([torch.tensor([3, 4])])
    with pytest.raises(ValueError, match=said):
        _trainer(policy, _config(None, max_new_tokens=15), evaluate=held_out)


def test_no_prompts(tiny_policy: Any) -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        OnlineTrainer(tiny_policy(), Sampler(), CountOf(), [], _config(None))


def test_models_that_could_not_be_trained_or_saved(tiny_policy: Any, tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(ValueError, match="model: expected a generation configuration that can be"):
        _trainer(policy, _config(None))
    away = cpu_offload(tiny_policy(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="policy: expected the weights to train and the LM head"):
        _trainer(away, _config(None))
    with pytest.raises(ValueError, match="reference: expected the LM head on a device"):
        _trainer(tiny_policy(), _config(None), reference=away)


def test_nothing_is_saved_without_a_folder(tiny_policy: Any) -> None:
    trainer = _trainer(tiny_policy(), dataclasses.replace(_config(None), iterations=1))
    assert trainer.train().iterations == 1
    with pytest.raises(ValueError, match="output_dir: expected a folder"):
        save_checkpoint(trainer.config, trainer.place, trainer.models, {}, None, [])


@pytest.mark.parametrize("interrupted", [False, True])
def test_broken_weights_end_the_run_before_they_are_saved(
    tiny_policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: bool
) -> None:
    """The losses of an iteration are those before its last update."""
    trainer = _trainer(tiny_policy(), _config(tmp_path, save_steps=1))
    step = trainer.updater.step

    def breaking(*given: Any) -> Any:
        losses = step(*given)
        if interrupted:
            signal.raise_signal(signal.SIGTERM)
        with torch.no_grad():
            next(trainer.models.policy.parameters())[0, 0] = torch.inf
        return losses

    monkeypatch.setattr(trainer.updater, "step", breaking)
    with pytest.raises(FloatingPointError, match=r"iteration 1: expected finite (weights|losses)"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
