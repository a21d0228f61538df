"""``fastdaa online`` from files: the whole pipeline, stopped, continued, and used afterwards."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from word_files import WORDS, write_pairs_and_reward

from fastdaa.cli import main
from fastdaa.cli.online import _print_summary
from fastdaa.cli.online_arguments import parse
from fastdaa.cli.runs import continuation
from fastdaa.data.tokenise_prompts import TokenizedPrompt
from fastdaa.online.loop import OnlineTrainer
from fastdaa.online.prompts import Ending, Prompts, chat_ending
from fastdaa.train.folder_lock import LOCK_FILE

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s> after ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
REWARD = """
import os, signal
CALLS = 0

def count(prompts, completions):
    return [text.split().count("w3") - 0.1 * len(text.split()) for text in completions]

def stopping(prompts, completions):
    global CALLS
    CALLS += 1
    if CALLS == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return count(prompts, completions)
"""


def make_tokenizer(**options):
    special = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>", "after"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model and its tokenizer, a file of pairs, and reward functions."""
    folder = tmp_path_factory.mktemp("files")
    config = LlamaConfig(
        vocab_size=27, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_pairs_and_reward(folder)
    (folder / "reward.py").write_text(REWARD)
    return folder


def arguments(files, folder, **options):
    options = {
        "model": files / "model", "dataset": files / "pairs.jsonl", "output_dir": folder,
        "iterations": 4, "rollouts_per_iteration": 8, "minibatch": 4, "max_new_tokens": 5,
        "learning_rate": 0.01, "kl_lambda": 0.5, "seed": 1, "disable_tqdm": True,
        **options,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    return ["online", "--use_cpu", *words]


STAGE = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 0.01}


def pipeline(files, folder, **options):
    stages = {"sft_options": json.dumps(STAGE), "reward_options": json.dumps(STAGE)}
    return arguments(
        files, folder, pipeline=True, test_size=3, eval_steps=2, **{**stages, **options}
    )


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_pipeline_in_one_command_and_again(files, tmp_path, capsys):
    folder = tmp_path / "out"
    assert main(pipeline(files, folder)) == 0
    assert "no complete checkpoint" not in capsys.readouterr().err
    for stage in ("sft", "reward", "online"):
        assert (folder / stage / "stage.json").is_file(), stage
    AutoModelForCausalLM.from_pretrained(folder / "online")
    reward = AutoModelForSequenceClassification.from_pretrained(folder / "reward")
    assert reward.config.num_labels == 1
    rows = rows_of(folder / "online")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    measured = [row["iteration"] for row in rows if "eval/scores" in row]
    assert measured == [2, 4] and rows[-1]["eval/kl"] > 0
    assert rows[1]["eval/ref_scores"] == rows[3]["eval/ref_scores"]
    before = _times(folder)
    capsys.readouterr()
    assert main(pipeline(files, folder)) == 0
    said = capsys.readouterr().err
    assert [f"stage {name} is done" in said for name in ("sft", "reward", "online")] == [True] * 3
    assert before == _times(folder)
    for changed, said in (
        ({"kl_lambda": 1.0}, r"\(kl_lambda 0.5 -> 1.0\)"),
        ({"ref_model": files / "model"}, "ref_model "),
        ({"max_train_samples": 5}, r"\(max_train_samples not given -> 5\)"),
    ):
        assert main(pipeline(files, folder, **changed)) == 2
        error = capsys.readouterr().err
        assert re.search(f"this one was done with others .*{said}", error), error


def _times(folder):
    """When the files of a run were written; whoever looks at a run takes its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {path: path.stat().st_mtime_ns for path in files}


def test_a_full_memory_is_one_line(files, tmp_path, capsys, monkeypatch):
    def full(self, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(OnlineTrainer, "train", full)
    assert main(arguments(files, tmp_path / "out", reward=f"{files}/reward.py:count")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the memory of the device is full after iteration 0: expected a" in line
    assert "--generation_batch_size (now 64)" in line and line.endswith("Tried to allocate 1 GiB.")


def test_interrupted_and_continued_as_the_command_says(files, tmp_path, capsys):
    whole, folder = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(files, whole, reward=f"{files}/reward.py:count")) == 0
    assert main(arguments(files, folder, reward=f"{files}/reward.py:stopping")) == 130
    printed = capsys.readouterr().out
    assert "Interrupted at iteration" in printed and not (folder / "config.json").exists()
    program, *argv = shlex.split(printed.strip().splitlines()[-1])
    assert program == "fastdaa" and argv[-1] == "--resume_from_checkpoint"
    assert main(argv) == 0
    got, expected = (load_file(f / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    names = ("step", "iteration", "objective/scores", "objective/kl", "loss/policy")
    kept, new = ([[row[n] for n in names] for row in rows_of(f)] for f in (whole, folder))
    assert kept == new


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected --reward with a model or a function"),
        ({"reward": "none/here/too"}, "reward: expected a path or a hub id"),
        ({"reward": "x.py:f"}, "there is no x.py"),
        ({"reward": __file__}, ".py is a file; a function is given as file.py:function"),
        ({"reward": "math:sqrt", "kl_lamda": 1}, "did you mean '--kl_lambda'"),
        ({"reward": "math:sqrt", "algorithm": "dpo"}, "expected one of apa, ppo, awr, got 'dpo'"),
        ({"reward": "math:sqrt", "eval_steps": 0}, "eval_steps"),
        ({"reward": "math:sqrt", "max_prompt_length": 2}, "expected at least one prompt"),
        ({"pipeline": True, "sft_options": "{"}, "sft_options: expected a JSON object"),
        ({"pipeline": True, "reward_options": '{"model": "other"}'}, "expected no 'model'"),
        (
            {"pipeline": True, "sft_options": '{"learning_rate": -1}'},
            "error: stage sft (--sft_options): learning_rate: expected at least 0, got -1.0",
        ),
        (
            {"pipeline": True, "reward_options": '{"seed": "x"}'},
            "stage reward (--reward_options): argument \"seed\": invalid int value: 'x'",
        ),
        (
            {"pipeline": True, "sft_options": '{"use_pefd": true}'},
            "stage sft (--sft_options): unknown option \"use_pefd\" (did you mean \"use_peft\"?)",
        ),
        ({"pipeline": True, "test_size": 50}, "error: stage sft: test_size: expected fewer than"),
        ({"reward": "MODEL"}, "error: reward: expected a sequence classifier, "),
        ({"pipeline": True, "gold_reward": "math:no", "test_size": 2}, "gold_reward: expected a f"),
        ({"pipeline": True, "reward": "no.py:f"}, "reward: expected a Python file, there is no"),
        (
            {"reward": "math:sqrt", "attention": "flash_attn"},
            "got 'flash_attn', which needs a cuda device, not cpu",
        ),
    ],
    ids=[
        "no reward", "no model", "no file", "no function", "typo", "choice", "number", "prompts",
        "json", "set", "sft number", "reward type", "sft typo", "shared", "no classifier",
        "no gold", "no reward file", "attention",
    ],
)  # fmt: skip
def test_errors_in_one_line(files, tmp_path, capsys, options, message):
    if options.get("reward") == "MODEL":
        options = {"reward": files / "model"}
    assert main(arguments(files, tmp_path / "out", **options)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("fastdaa online: error: ") and message in printed


def test_options_of_the_second_stage_are_read_before_the_first(files, tmp_path, capsys):
    given = {"reward_options": json.dumps({**STAGE, "max_steps": 0})}
    assert main(pipeline(files, tmp_path / "out", **given)) == 2
    assert "stage reward (--reward_options): max_steps: expected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sft", "reward", "online"])
def test_conversations_without_a_template_name_the_option(files, tmp_path, capsys, command):
    rows = [
        {"prompt": [{"role": "user", "content": "w1"}],
         "chosen": [{"role": "assistant", "content": "w2"}],
         "rejected": [{"role": "assistant", "content": "w3"}]}
    ] * 2  # fmt: skip
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = [f"--model={files}/model", f"--dataset={tmp_path}/talk.jsonl", "--use_cpu"]
    words += ["--reward=math:sqrt"] if command == "online" else []
    assert main([command, *words, f"--output_dir={tmp_path}/out"]) == 2
    assert "expected --chat_template with a Jinja file" in capsys.readouterr().err


def test_a_stage_is_not_told_of_preference_losses(files, tmp_path, capsys):
    words = [f"--model={files}/model", f"--dataset={files}/pairs.jsonl", "--use_cpu"]
    for command in ("train", "sft", "reward"):
        told = command == "train"
        assert main([command, *words, "--label_smoothing_factor=0.1"]) == 2
        assert ("the label_smoothing of" in capsys.readouterr().err) == told


def test_what_the_head_refuses_is_called_by_its_option(files, tmp_path, capsys):
    words = [f"--model={files}/model", f"--dataset={files}/pairs.jsonl", "--use_cpu"]
    assert main(["sft", *words, f"--output_dir={tmp_path}/out", "--head_max_bytes=1"]) == 2
    assert "error: head_max_bytes: expected at least 108" in capsys.readouterr().err


def test_a_pipeline_without_pairs_fails_before_its_first_stage(files, tmp_path, capsys):
    rows = [{"prompt": "w1", "completion": " w2", "label": True}] * 4
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = tmp_path / "out"
    assert main(pipeline(files, folder, dataset=tmp_path / "rows.jsonl")) == 2
    assert "error: dataset: expected preference pairs, on which --pip" in capsys.readouterr().err
    assert not folder.exists()


def test_stages_are_commands_of_their_own(files, tmp_path, capsys):
    options = [
        f"--dataset={files}/pairs.jsonl", "--use_cpu", "--test_size=3", "--max_steps=2",
        "--logging_steps=1", "--disable_tqdm=true",
    ]  # fmt: skip
    sft, reward = str(tmp_path / "sft"), str(tmp_path / "reward")
    assert main(["sft", f"--model={files}/model", f"--output_dir={sft}", *options]) == 0
    assert main(["reward", f"--model={sft}", f"--output_dir={reward}", *options]) == 0
    printed = capsys.readouterr().out
    assert "token accuracy" in printed and "centre of rewards" in printed
    assert rows_of(Path(reward))[-1]["train_runtime"] > 0
    assert main(["reward", f"--model={sft}", f"--output_dir={reward}", "--beta=1"]) == 2


def test_a_file_of_defaults(files, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {files}/model\ndataset: d/d\nreward: r/r\nalgorithm: ppo\n"
        "kl_coef: 1e-2\nsft_options:\n  num_train_epochs: 2\n"
    )
    read, settings = parse(["--config", str(config), "--kl_coef=0.5"])
    assert settings.algorithm == "ppo" and settings.kl_coef == 0.5
    assert read.sft_options == {"num_train_epochs": 2} and read.reward == "r/r"


def test_continuation_keeps_everything_else():
    argv = ["--model", "m", "--resume_from_checkpoint", "old", "--seed=1"]
    expected = "fastdaa sft --model m --seed=1 --resume_from_checkpoint"
    assert continuation("sft", argv, "new") == expected
    assert continuation("sft", argv, None) == "fastdaa sft --model m --seed=1"


def test_prompts_and_how_a_chat_template_closes():
    prompts = Prompts([TokenizedPrompt([1, 2], "a"), TokenizedPrompt([3], "b"),
                       TokenizedPrompt([1, 2], "a")])  # fmt: skip
    assert [ids.tolist() for ids in prompts.ids] == [[1, 2], [3]] and not prompts.conversational
    assert prompts.original(torch.tensor([3])) == "b"
    assert prompts.original(torch.tensor([4])) is None
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    assert chat_ending(tokenizer) == Ending(2, (6,))
    tokenizer.chat_template = "{{ messages[0]['content'] }} </s> {{ messages[1]['content'] }}"
    assert chat_ending(tokenizer) == Ending(None, ())
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match="takes a question and its answer"):
        chat_ending(tokenizer)


def test_one_prompt_is_no_plural(files, tmp_path, capsys):
    line = (files / "pairs.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(f"{line}\n{line}\n")
    given = {"reward": f"{files}/reward.py:count", "dataset": tmp_path / "one.jsonl"}
    assert main(arguments(files, tmp_path / "out", iterations=1, **given)) == 0
    assert "prompts: 1 different prompt, and 1 repetition\n" in capsys.readouterr().err


def test_other_prompts_are_another_run(files, tmp_path, capsys):
    folder = tmp_path / "out"
    given = {"reward": f"{files}/reward.py:count", "iterations": 1}
    assert main(arguments(files, folder, **given)) == 0
    lines = (files / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:-1]))
    given |= {"dataset": tmp_path / "fewer.jsonl", "iterations": 2}
    assert main([*arguments(files, folder, **given), "--resume_from_checkpoint"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "expected the prompts of" in error and "12 prompts" in error and "11 prompts" in error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_one_line(files, tmp_path, capsys):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    assert main(arguments(files, folder, reward=f"{files}/reward.py:count")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("fastdaa online: error: output_dir: expected room on the disk for what")


def test_the_last_numbers_are_written_alike(capsys):
    """Four digits or whole numbers, never powers of ten beside separators."""
    rates = {"rollout_tokens_per_second": 9852.1, "update_tokens_per_second": 11224.9}
    _print_summary({**rates, "objective/raw_scores": 0.0123456}, "out")
    said = capsys.readouterr().out
    assert "9,852" in said and "11,225" in said and "0.01235" in said
