"""The commands with adapters as their models, from fine-tuning to on-policy training."""

from __future__ import annotations

import json
import os
import signal
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_files import command_line, word_tokenizer, write_pairs_and_reward

from fastdaa.cli import main
from fastdaa.train.adapter_files import load_causal_lm
from fastdaa.train.trainer import PreferenceTrainer

peft = pytest.importorskip("peft")
CONTINUED, NEW = {}, {"use_peft": True}
KINDS = [pytest.param(CONTINUED, id="continued"), pytest.param(NEW, id="merged")]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A folder with a model, pairs, a reward function, and an adapter by ``fastdaa sft``."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    write_pairs_and_reward(folder)
    code = run(
        folder, "sft", folder / "model", folder / "sft", use_peft=True, lora_r=4, max_steps=6,
        learning_rate=0.05,
    )  # fmt: skip
    assert code == 0
    return folder


def run(files, command, model, out, **options):
    """A command over the pairs; its exit code."""
    return main(command_line(files, command, model, out, **options))


@torch.no_grad()
def logps(files, model):
    """Log-probs of the chosen completions, by full logits."""
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    found = []
    for line in (files / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt, chosen = (tokenizer(row[side])["input_ids"] for side in ("prompt", "chosen"))
        ids = torch.tensor([prompt + chosen + [tokenizer.eos_token_id]])
        scores = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(scores.gather(1, ids[0, len(prompt) :, None]).sum())
    return torch.stack(found)


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", KINDS)
def test_preference_training_starts_where_fine_tuning_ended(files, tmp_path, options, capsys):
    out = tmp_path / "out"
    code = run(
        files, "train", files / "sft", out, learning_rate=0, num_train_epochs=1, save_steps=2,
        **options,
    )  # fmt: skip
    assert code == 0
    said = capsys.readouterr().err
    assert f"LORA r=4 adapter {files / 'sft'} on {files / 'model'}" in said
    start = logps(files, load_causal_lm(str(files / "sft")))
    base = logps(files, load_causal_lm(str(files / "model")))
    assert float((start - base).abs().min()) > 0.1
    rows = [row for row in rows_of(out) if "loss" in row]
    assert sum(row["logps/chosen"] for row in rows) / 3 == pytest.approx(start.mean().item(), 1e-5)
    assert all(abs(row["rewards/margins"]) < 1e-6 for row in rows)
    # What is left loads again, also with transformers and PEFT alone.
    loaders = (
        load_causal_lm, AutoModelForCausalLM.from_pretrained,
        peft.AutoPeftModelForCausalLM.from_pretrained,
    )  # fmt: skip
    for folder in (out, out / "checkpoint-2"):
        for load in loaders:
            assert torch.allclose(logps(files, load(str(folder))), start, atol=1e-4)
    config = json.loads((out / "adapter_config.json").read_text())
    expected = out / "base_model" if options else files / "model"
    assert config["base_model_name_or_path"] == str(expected)
    assert config["r"] == (16 if options else 4)


@pytest.mark.parametrize("options", KINDS)
def test_stopped_and_continued(files, tmp_path, options, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    train = partial(run, files, "train", learning_rate=0.01, max_steps=4, beta=0.5, **options)
    assert train(files / "sft", whole) == 0
    original = PreferenceTrainer.training_step

    def stopping(self, *args):
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "training_step", stopping)
        assert train(files / "sft", out) == 130
    assert train(whole, out, resume_from_checkpoint=True) == 2
    assert "resume_from_checkpoint: expected the" in capsys.readouterr().err
    assert train(files / "sft", out, resume_from_checkpoint=True) == 0
    states = [(f / "adapter_model.safetensors").read_bytes() for f in (out, whole)]
    assert states[0] == states[1]


@pytest.mark.parametrize("options", KINDS)
def test_the_other_stages(files, tmp_path, options):
    assert run(files, "online", files / "sft", tmp_path / "online", **options) == 0
    first, *_ = rows_of(tmp_path / "online")
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    checkpoint = next((tmp_path / "online").glob("checkpoint-*"))
    expected = logps(files, load_causal_lm(str(tmp_path / "online")))
    assert torch.equal(logps(files, load_causal_lm(str(checkpoint))), expected)
    assert (
        run(files, "sft", files / "sft", tmp_path / "sft", learning_rate=0, max_steps=1, **options)
        == 0
    )
    start = logps(files, load_causal_lm(str(files / "sft")))
    assert torch.allclose(logps(files, load_causal_lm(str(tmp_path / "sft"))), start, atol=1e-4)


def test_on_policy_training_is_not_continued_with_another_reference(files, tmp_path, capsys):
    options = {"save_steps": 1, "iterations": 2}
    assert run(files, "online", files / "sft", tmp_path / "out", **options) == 0
    other = tmp_path / "out" / "checkpoint-4"
    more = {**options, "iterations": 3, "resume_from_checkpoint": True}
    assert run(files, "online", other, tmp_path / "out", **more) == 2
    assert "resume: expected the reference of" in capsys.readouterr().err
    assert run(files, "online", files / "sft", tmp_path / "out", **more) == 0


def test_pipeline_with_adapters(files, tmp_path, capsys):
    stage = {"max_steps": 2, "per_device_train_batch_size": 4}
    options = {
        "pipeline": True, "learning_rate": 1e-20,
        "sft_options": json.dumps({**stage, "use_peft": True, "learning_rate": 0.05}),
    }  # fmt: skip
    assert run(files, "online", files / "model", tmp_path / "out", **options) == 0
    policies = [load_causal_lm(str(tmp_path / "out" / name)) for name in ("sft", "online")]
    assert torch.allclose(*(logps(files, policy) for policy in policies), atol=1e-4)
    assert peft.PeftModel in type(policies[1]).__mro__


def test_reward_and_doctor_and_quality(files, tmp_path, capsys):
    assert run(files, "reward", files / "sft", tmp_path / "reward", max_steps=1) == 0
    assert not (tmp_path / "reward" / "adapter_config.json").exists()
    assert main(["doctor", "--model", str(files / "sft")]) == 0
    assert "LORA r=4 adapter" in capsys.readouterr().out
    out = tmp_path / "out"
    assert run(files, "train", files / "sft", out, learning_rate=0.01, max_steps=1) == 0
    track = [
        "study", "track", f"--model={out}", f"--dataset={files}/pairs.jsonl", "--prompts=4",
        f"--reward={files}/reward.py:count", "--max_new_tokens=3", "--device=cpu",
        f"--table={tmp_path}/track.jsonl",
    ]  # fmt: skip
    # Its base is not where it started.
    assert main(track) == 2
    assert "ref_model: expected the model or adapter that the training" in capsys.readouterr().err
    assert main([*track, f"--ref_model={files / 'sft'}"]) == 0


@pytest.mark.parametrize(
    ("options", "place", "message"),
    [
        pytest.param({}, "model", "expected another folder than that of the base", id="base"),
        pytest.param({}, "merged", "without the base model of another run", id="merged base"),
        pytest.param({"ref_model": "sft"}, "model", "another folder than that of the", id="ref"),
    ],
)
def test_folders_that_are_not_written_to(files, tmp_path, options, place, message, capsys):
    (tmp_path / "merged" / "base_model").mkdir(parents=True)
    out = files / "model" if place == "model" else tmp_path / place
    given = {name: files / value for name, value in options.items()}
    assert run(files, "train", files / "sft", out, **given) == 2
    assert message in capsys.readouterr().err
