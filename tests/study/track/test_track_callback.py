"""The callback inside training: what it writes, and that training does not notice."""

from __future__ import annotations

import json
import logging
import os
import signal

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from fastdaa.study.table import read_table
from fastdaa.study.track import TrackQuality, TrackSettings
from fastdaa.study.track.reward_function import RewardFunction
from fastdaa.study.track.scoring import ScorerError
from fastdaa.train.callbacks import was_interrupted
from fastdaa.train.metrics_writer import read_metrics

LORA = LoraConfig(task_type="CAUSAL_LM", r=2, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])


def words(prompts, completions):
    """More words are better."""
    return [float(len(text.split())) for text in completions]


@pytest.fixture
def tracked(make_trainer, text_pairs, settings):
    """``tracked(scorers=..., steps=..., **options)``: a trainer with the callback."""

    def build(**options):
        names = {"scorers", "steps", "stop_after", "settings", "run"} & options.keys()
        own = {name: options.pop(name) for name in names}
        trainer = make_trainer(**options)
        callback = TrackQuality(
            trainer,
            text_pairs(seed=9),
            **{"scorers": [RewardFunction(words)], "settings": settings, **own},
        )
        trainer.add_callback(callback)
        return trainer, callback

    return build


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(folder, file="track.jsonl"):
    return [row["checkpoint"] for row in lines(folder / file)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param(
            {"disable_dropout": False, "gradient_checkpointing": True, "dropout": True},
            id="dropout and checkpointing",
        ),
        pytest.param({"bf16": True, "tokens_per_pack": 20}, id="autocast"),
        pytest.param({"lora": True, "gradient_accumulation_steps": 2}, id="lora"),
        pytest.param({"layout": "padded"}, id="padded"),
    ],
)
def test_training_is_the_same_to_the_bit(make_trainer, tracked, tiny, options):
    options = dict(options)
    dropout = 0.5 if options.pop("dropout", False) else 0.0
    if options.pop("lora", False):
        options["peft_config"] = LORA
    plain = make_trainer("plain", tiny(attention_dropout=dropout), **options)
    plain.train()
    trainer, callback = tracked(model=tiny(attention_dropout=dropout), steps=1, **options)
    trainer.train()
    assert [row["checkpoint"] for row in read_table(callback.table)] == [0, 1, 2, 3, 4]
    expected = plain.model.state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, expected[name]), name
    losses = [
        [row["loss"] for row in t.state.log_history if "loss" in row] for t in (plain, trainer)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_rows_samples_and_metrics(tracked, tmp_path):
    trainer, callback = tracked(steps=3, save_strategy="no")
    trainer.train()
    table = read_table(callback.table)
    assert [row["checkpoint"] for row in table] == [0, 3, 4]
    first, *_, last = table
    assert first["kl_k1"] == 0 and abs(first["kl"]) < 1e-5
    assert last["kl"] == last["kl_rb"] > 0.01 and last["kl_rb_stderr"] > 0
    assert (last["run"], last["loss"], last["beta"], last["fraction"]) == ("out", "dpo", 0.1, 1.0)
    assert [row["final"] for row in table] == [False, False, True]
    assert {row["scorer"] for row in table} == {"words"} and last["samples"] == 6
    samples = [s for s in lines(tmp_path / "out" / "track_samples.jsonl") if s["checkpoint"] == 4]
    assert [sample["prompt_index"] for sample in samples] == list(range(6))
    assert last["score"] == sum(words([], [s["answer"] for s in samples])) / 6
    assert last["kl_k1"] == pytest.approx(sum(s["kl_k1"] for s in samples) / 6)
    assert last["length"] == sum(s["tokens"] for s in samples) / 6
    logged = [r for r in read_metrics(tmp_path / "out" / "metrics.jsonl") if "track/score" in r]
    assert [row["step"] for row in logged] == [0, 3, 4]
    assert logged[-1]["track/kl_rb"] == last["kl_rb"]
    assert not (tmp_path / "out" / "track_unscored.jsonl").exists()


def test_every_checkpoint_without_steps(tracked, tmp_path):
    trainer, _ = tracked(save_strategy="steps", save_steps=3, max_steps=5)
    trainer.train()
    assert steps(tmp_path / "out") == [0, 3, 5]


def test_only_kl_without_a_scorer(tracked, tmp_path):
    trainer, callback = tracked(scorers=[], steps=4)
    trainer.train()
    assert not callback.table.exists() and callback.best is None
    rows = lines(tmp_path / "out" / "track_unscored.jsonl")
    assert [row["checkpoint"] for row in rows] == [0, 4]
    assert rows[-1]["score"] is None and rows[-1]["kl"] > 0


def test_resuming_repeats_no_row_and_gives_the_same(tracked, tmp_path):
    options = {"steps": 1, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = tracked(folder="whole", run="run", **options)
    trainer.train()
    whole = lines(tmp_path / "whole" / "track.jsonl")
    trainer, _ = tracked(run="run", **options)
    trainer.train()
    folder = tmp_path / "out"
    with (folder / "track_samples.jsonl").open("a") as file:
        file.write('{"run": "run", "checkpoint": 2, "half a li')
    trainer, callback = tracked(run="run", **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    resumed = lines(folder / "track.jsonl")
    for one, other in zip(resumed, whole, strict=True):
        for row in (one, other):
            assert row.pop("seconds") > 0
        assert one == other
    samples = lines(folder / "track_samples.jsonl")
    places = [(sample["checkpoint"], sample["prompt_index"]) for sample in samples]
    assert len(set(places)) == len(places) == 5 * 6
    assert [one.step for one in callback._record.history] == [0, 1, 2, 3, 4]


def test_what_was_interrupted_at_a_due_step_is_measured_when_it_continues(tracked, tmp_path):
    options = {"steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = tracked(**options)
    trainer.train()
    table = tmp_path / "out" / "track.jsonl"
    kept = table.read_text().splitlines()
    table.write_text(kept[0] + "\n")
    trainer, _ = tracked(**options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps(tmp_path / "out") == [0, 2, 4]
    assert json.loads(table.read_text().splitlines()[1])["kl"] == json.loads(kept[1])["kl"]


@pytest.mark.parametrize(
    "options",
    [{"save_strategy": "steps", "save_steps": 2}, {"save_strategy": "epoch"}],
    ids=["steps", "epoch"],
)
def test_that_a_run_was_interrupted_adds_no_row(tracked, tmp_path, options):
    trainer, _ = tracked(folder="whole", run="run", **options)
    trainer.train()
    trainer, _ = tracked(run="run", **options)
    trainer.add_callback(CtrlC(step=3))
    trainer.train()
    assert was_interrupted(trainer) and (tmp_path / "out" / "checkpoint-3").is_dir()
    trainer, _ = tracked(run="run", **options)
    trainer.train(resume_from_checkpoint=True)
    assert steps(tmp_path / "out") == steps(tmp_path / "whole")


class CtrlC(TrainerCallback):
    """Pressed during a step."""

    def __init__(self, step):
        self.step = step

    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_resuming_with_other_settings_is_refused(tracked, tmp_path):
    options = {"steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer, _ = tracked(**options)
    trainer.train()
    trainer, _ = tracked(
        **options, settings=TrackSettings(prompts=6, max_new_tokens=7, batch_size=4)
    )
    with pytest.raises(ValueError, match=r"expected max_new_tokens = 5.* got 7"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert steps(tmp_path / "out") == [0, 2, 4]  # what was measured is still there


def test_a_new_run_puts_the_old_files_aside(tracked, tmp_path):
    for _ in range(2):
        trainer, _ = tracked(steps=2)
        trainer.train()
    assert steps(tmp_path / "out") == steps(tmp_path / "out", "track.1.jsonl") == [0, 2, 4]


class Failing:
    """Scores well, then worse and worse, or fails at some measurement."""

    column, label = "reward", "failing"

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, samples):
        from fastdaa.study.track.scoring import Scores

        self.calls += 1
        if self.calls == self.fails_at:
            raise ScorerError("out of order")
        return Scores([10.0 - self.calls] * len(samples), {})


def test_a_scorer_that_fails_first_stops_the_run(tracked):
    trainer, callback = tracked(scorers=[Failing(fails_at=1)], steps=1)
    with pytest.raises(ScorerError, match="out of order"):
        trainer.train()
    assert trainer.state.global_step == 0 and not callback.table.exists()


def test_a_scorer_that_fails_later_does_not(tracked, tmp_path, caplog):
    trainer, _ = tracked(scorers=[Failing(fails_at=2)], steps=2)
    with caplog.at_level(logging.WARNING, "fastdaa"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert steps(tmp_path / "out") == [0, 4]
    (row,) = lines(tmp_path / "out" / "track_unscored.jsonl")
    assert row["checkpoint"] == 2 and row["scorer_error"] == "out of order" and row["kl"] > 0
    assert "step 2 has no score: out of order" in caplog.text


def test_warning_and_early_stop(tracked, tmp_path, caplog):
    trainer, callback = tracked(
        scorers=[Failing()], steps=1, stop_after=2, max_steps=8, learning_rate=3e-2
    )
    with caplog.at_level(logging.WARNING, "fastdaa"):
        trainer.train()
    assert trainer.state.global_step == 2
    table = read_table(callback.table)
    assert [row["declined"] for row in table] == [False, True, True]
    assert [row["final"] for row in table] == [False, False, True]
    assert callback.stopped is not None and callback.stopped.step == 0
    assert callback.stopped.fall == 2.0 and callback.best == 0
    # Saved although the run saves no checkpoints otherwise, and complete.
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()
    assert "over-optimisation at step 2: since step 0 the score has fallen by 2" in caplog.text


def test_without_stop_it_only_warns(tracked, caplog):
    trainer, callback = tracked(scorers=[Failing()], steps=1, learning_rate=3e-2)
    with caplog.at_level(logging.WARNING, "fastdaa"):
        trainer.train()
    assert trainer.state.global_step == 4 and callback.stopped is None
    declined = [row for row in read_table(callback.table) if row["declined"]]
    assert caplog.text.count("over-optimisation") == len(declined) >= 3


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_reference_is_where_training_started(tracked, tiny, loss, lora):
    """Also for a loss that needs none."""
    trainer, callback = tracked(
        steps=4, loss_type=loss, beta=None, **({"peft_config": LORA} if lora else {})
    )
    trainer.train()
    first, last = read_table(callback.table)
    assert abs(first["kl"]) < 1e-5 < 1e-4 < last["kl"]


def test_a_given_reference_is_the_one(tracked, tiny):
    trainer, callback = tracked(steps=4, ref_model=tiny(seed=5))
    trainer.train()
    assert read_table(callback.table)[0]["kl"] > 0.1


def test_precomputed_log_probs_leave_no_reference(tracked):
    with pytest.raises(ValueError, match="precompute_ref_log_probs: expected it off"):
        tracked(precompute_ref_log_probs=True)


def test_precomputed_log_probs_with_adapters(tracked):
    trainer, callback = tracked(precompute_ref_log_probs=True, peft_config=LORA, steps=4)
    trainer.train()
    first, last = read_table(callback.table)
    assert abs(first["kl"]) < 1e-5 < last["kl"]


def test_precomputed_log_probs_with_a_model_of_its_own(make_trainer, text_pairs, settings, tiny):
    trainer = make_trainer(precompute_ref_log_probs=True)
    callback = TrackQuality(
        trainer, text_pairs(seed=9), scorers=[RewardFunction(words)], settings=settings,
        ref_model=tiny(),
    )  # fmt: skip
    trainer.add_callback(callback)
    trainer.train()
    assert read_table(callback.table)[-1]["kl"] > 1e-4
