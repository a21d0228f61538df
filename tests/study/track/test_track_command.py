"""The options of ``fastdaa train``, and ``fastdaa study track`` on a finished run."""

from __future__ import annotations

import json
import sys

import pytest

from fastdaa.cli import main
from fastdaa.cli import train as command
from fastdaa.cli.arguments import parse
from fastdaa.train import PreferenceTrainer
from fastdaa.train.callbacks import Curves

NEEDED = ["--model", "m", "--dataset", "d", "--output_dir", "o"]
REWARD = "def words(prompts, completions):\n    return [len(c.split()) for c in completions]\n"
HOW = ["--max_new_tokens", "5", "--prompts", "6", "--batch_size", "4"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny, tokenizer, text_pairs):
    """A folder with a model, its tokenizer, pairs and a reward function."""
    folder = tmp_path_factory.mktemp("files")
    tiny().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    text_pairs().to_json(folder / "pairs.jsonl")
    text_pairs(seed=9).to_json(folder / "held_out.jsonl")
    (folder / "reward.py").write_text(REWARD)
    return folder


class WithoutCurves(PreferenceTrainer):
    """Drawing takes longer than the training here, and has tests of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.remove_callback(Curves)


@pytest.fixture
def train(files, tmp_path, monkeypatch):
    """``train(*options)``: the exit code of a short run into ``tmp_path / "out"``."""
    monkeypatch.setattr(command, "_trainer_class", lambda: WithoutCurves)

    def run(*options):
        return main([
            *("train", "--model", f"{files}/model", "--dataset", f"{files}/pairs.jsonl"),
            *("--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2"),
            *("--max_steps", "4", "--save_steps", "2", "--learning_rate", "0.01", "--use_cpu"),
            *("--track_dataset", f"{files}/held_out.jsonl"),
            *(word.replace("--", "--track_") for word in HOW), *options,
        ])  # fmt: skip

    return run


@pytest.fixture
def measure(files, tmp_path):
    """``measure(*options)``: the exit code of ``fastdaa study track`` on the run."""

    def run(*options, reference=True):
        reference = ["--ref_model", f"{files}/model"] if reference else []
        return main([
            *("study", "track", "--model", str(tmp_path / "out"), *reference),
            *("--dataset", f"{files}/held_out.jsonl", "--device", "cpu"),
            *("--table", str(tmp_path / "later.jsonl"), "--reward", f"{files}/reward.py:words"),
            *HOW, *options,
        ])  # fmt: skip

    return run


def test_a_run_and_its_finished_checkpoints_give_the_same_rows(
    train, measure, files, tmp_path, capsys
):
    assert train("--track_reward", f"{files}/reward.py:words") == 0
    assert "best tracked score: step" in capsys.readouterr().out
    during = rows(tmp_path / "out" / "track.jsonl")
    assert [row["checkpoint"] for row in during] == [0, 2, 4]
    assert measure("--set", "loss=dpo", "beta=0.1") == 0
    after = rows(tmp_path / "later.jsonl")
    for one, other in zip(during, after, strict=True):
        for name in ("run", "checkpoint", "score", "length", "fraction", "final", "loss", "beta"):
            assert one[name] == other[name], name
        for name in ("kl", "kl_k1", "entropy", "kl_rb_stderr"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name
    # Again: nothing is measured twice, and other settings are no continuation.
    capsys.readouterr()
    assert measure() == 0
    assert "measured before: 3 checkpoints in" in capsys.readouterr().out
    assert rows(tmp_path / "later.jsonl") == after
    assert measure("--temperature", "0.5") == 2
    assert "expected temperature = 1.0" in capsys.readouterr().err
    assert measure("--set", "loss=dpo") == 0
    assert measure("--set", "loss=ipo") == 2
    assert "--set: expected loss = 'dpo' as in the row of checkpoint 0" in capsys.readouterr().err
    assert rows(tmp_path / "later.jsonl") == after
    # What errors of the data propose are options here, too.
    held_out = rows(files / "held_out.jsonl")
    other = [{"p": r["prompt"], "win": r["chosen"], "lose": r["rejected"]} for r in held_out]
    path = tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, [*other, {"p": "w1"}])))
    given = ["--dataset", str(path), "--table", str(tmp_path / "other_table.jsonl")]
    assert measure(*given) == 2
    assert "chosen_column and rejected_column say" in capsys.readouterr().err
    given += ["--prompt_column", "p", "--chosen_column", "win", "--rejected_column", "lose"]
    assert measure(*given) == 2
    assert "on_bad_row='skip' leaves such rows out" in capsys.readouterr().err
    assert measure(*given, "--on_bad_row", "skip") == 0
    assert [row["score"] for row in rows(tmp_path / "other_table.jsonl")] == [
        row["score"] for row in after
    ]


def test_adapters_know_where_they_started_and_a_judge_stands_beside_the_reward(
    train, measure, files, tmp_path
):
    code = "import sys, json\nfor line in sys.stdin:\n"
    code += "    print(json.dumps({'id': json.loads(line)['id'], 'winner': 'first'}))\n"
    (files / "judge.py").write_text(code)
    judge = f"{sys.executable} -S {files}/judge.py"
    given = ("--track_reward", f"{files}/reward.py:words", "--track_judge", judge)
    assert train(*given, "--use_peft", "--lora_r", "2") == 0
    during = rows(tmp_path / "out" / "track.jsonl")
    assert all(row["score"] == row["reward"] != row["win_rate"] == 0.5 for row in during)
    assert {row["judge_first_rate"] for row in during} == {1.0}
    assert measure(reference=False) == 0
    after = rows(tmp_path / "later.jsonl")
    assert [row["score"] for row in during] == [row["score"] for row in after]
    assert during[-1]["kl"] == pytest.approx(after[-1]["kl"], abs=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(["--track_prompts", "5"], "expected one of track_reward", id="off"),
        pytest.param(["--track_steps", "0"], "track_steps: expected an integer", id="no steps"),
        pytest.param(
            ["--track_steps", "1", "--track_stop", "1"], "expected track_reward or", id="stop"
        ),
    ],
)
def test_options_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        parse([*NEEDED, *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param(["--track_steps", "2"], "track_dataset: expected held-out pairs", id="pairs"),
        pytest.param(
            ["--track_steps", "2", "--test_size", "2", "--precompute_ref_log_probs"],
            "precompute_ref_log_probs: expected it off while quality is", id="cached reference",
        ),
        pytest.param(
            ["--track_reward", "no_such_module:f", "--test_size", "2"],
            "track_reward: no_such_module cannot be imported", id="reward",
        ),
        pytest.param(
            ["--track_judge", "no-such-judge", "--test_size", "2"],
            "track_judge: expected a program to run, there is no 'no-such-judge'", id="judge",
        ),
        pytest.param(
            ["--track_judge", "cat", "--test_size", "2", "--track_judge_timeout", "0"],
            "track_judge_timeout: expected", id="timeout",
        ),
        pytest.param(
            ["--track_steps", "2", "--test_size", "2", "--track_seed", "-1"],
            "track_seed: expected an integer of at least 0", id="seed",
        ),
        pytest.param(
            ["--track_steps", "2", "--test_size", "2", "--track_temperature", "0"],
            "track_temperature: expected", id="temperature",
        ),
    ],
)  # fmt: skip
def test_errors_come_before_anything_is_loaded(given, message, files, tmp_path, capsys):
    code = main([
        *("train", "--model", f"{files}/model", "--dataset", f"{files}/pairs.jsonl"),
        *("--output_dir", str(tmp_path / "out"), "--use_cpu", *given),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 2 and f"fastdaa train: error: {message}" in printed.err
    assert not (tmp_path / "out").exists() and "pairs kept" not in printed.err


def test_a_table_that_cannot_be_written_is_said_first(measure, train, files, tmp_path, capsys):
    assert train("--track_reward", f"{files}/reward.py:words") == 0
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert measure("--table", str(tmp_path / "file" / "track.jsonl")) == 2
    said = capsys.readouterr().err
    assert said.endswith(f"--table: expected a folder, {tmp_path / 'file'} is a file\n")
    assert "Loading" not in said


def test_what_cannot_be_measured(measure, train, files, tmp_path, capsys):
    assert measure() == 2
    assert "there is no" in capsys.readouterr().err
    assert train() == 2  # track_prompts alone
    (tmp_path / "out").mkdir()
    assert measure() == 2
    assert "expected a folder with config.json or adapter_config.json" in capsys.readouterr().err


def test_without_options_nothing_is_tracked():
    arguments, _ = parse(NEEDED)
    assert not arguments.track.on
    arguments, _ = parse([*NEEDED, "--track_steps", "7", "--track_temperature", "0.7"])
    assert arguments.track.on and arguments.track.settings().temperature == 0.7
