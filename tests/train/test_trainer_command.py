"""``fastdaa train`` from files: stopped, continued as it says, and used afterwards."""

from __future__ import annotations

import json
import os
import shlex
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from word_files import command_line, word_tokenizer, write_pairs_and_reward

from fastdaa.cli.runs import train_and_save


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A folder with a model and its tokenizer, and a file of pairs."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model(attention_dropout=0.1).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    write_pairs_and_reward(folder)
    return folder


@pytest.fixture
def fastdaa(start_run, files, tmp_path):
    """Run the command; its exit code and what it printed."""

    def command(argv, **options):
        log = tmp_path / "log.txt"
        process = start_run(argv=argv, log=str(log), **options)
        process.join(60)
        return process.exitcode, log.read_text()

    return command


def arguments(files, folder):
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 0.01}
    return command_line(files, "train", files / "model", folder, **options)


def test_interrupted_and_continued_as_the_command_says(fastdaa, files, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "out"
    code, printed = fastdaa(arguments(files, whole))
    assert code == 0 and "step 4/4" in printed
    code, printed = fastdaa(arguments(files, folder), end={"step": 2, "number": signal.SIGINT})
    assert code == 130
    assert f"Interrupted at step 2; saved: {folder}/checkpoint-2" in printed
    program, *argv = shlex.split(printed.strip().splitlines()[-1])
    assert program == "fastdaa" and argv[-1] == "--resume_from_checkpoint"
    assert not (folder / "model.safetensors").exists()
    code, _ = fastdaa(argv)
    assert code == 0
    got, expected = (load_file(f / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


class Stop(TrainerCallback):
    """Sends this process a SIGTERM in the middle of a step."""

    def on_optimizer_step(self, *_, **__):
        os.kill(os.getpid(), signal.SIGTERM)


def test_all_is_said_before_other_processes_end(make_trainer, monkeypatch, capfd):
    """Since a launcher ends all of them when the first one ends."""
    trainer = make_trainer(max_steps=2, callbacks=[Stop()])
    said = []
    monkeypatch.setattr(
        trainer.accelerator, "wait_for_everyone", lambda: said.append(capfd.readouterr().out)
    )
    assert train_and_save("train", trainer, None, []) == 130
    assert "Interrupted at step 1; saved: " in said[-1] and "--resume_from_checkpoint" in said[-1]


def test_what_is_saved_is_an_ordinary_model(make_trainer, pairs, files, tmp_path):
    original = json.loads((files / "model" / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    trainer = make_trainer(
        model=model, max_steps=2, save_strategy="steps", save_steps=1,
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    for folder in ("out", "out/checkpoint-1"):
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert saved == original
    # Neither what the user saves by hand.
    trainer.model.save_pretrained(tmp_path / "by hand")
    assert json.loads((tmp_path / "by hand" / "config.json").read_text()) == original
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = torch.tensor([[1, 4, 5, 6, 7]])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    written = trainer.model.eval().generate(prompt, **options)
    assert torch.equal(written, reloaded.generate(prompt, **options))
    assert written.shape[1] > prompt.shape[1]
    batch = torch.tensor([[0, 0, 4, 5], [6, 7, 8, 9]])
    mask = (batch != 0).long()
    assert torch.equal(
        trainer.model.generate(batch, attention_mask=mask, **options),
        reloaded.generate(batch, attention_mask=mask, **options),
    )
