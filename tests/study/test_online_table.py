"""Runs of ``fastdaa online`` as tables, fits and pages."""

from __future__ import annotations

import json
import shutil

import pytest
from word_files import command_line, word_tokenizer, write_pairs_and_reward

from fastdaa.cli import main
from fastdaa.study.curves import series_name
from fastdaa.study.fit import default_group
from fastdaa.study.table import read_table

DIFFERENT = """
def different(prompts, completions):
    return [1.0 * len(set(c.split())) for c in completions]
"""
GOLD = "\ndef long(prompts, completions):\n    return [1.0 * len(c.split()) for c in completions]"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The output folder of a run of six iterations, measured after each."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    files = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(files / "model")
    word_tokenizer().save_pretrained(files / "model")
    write_pairs_and_reward(files)
    with (files / "reward.py").open("a") as file:
        file.write(DIFFERENT + GOLD)
    options = {"algorithm": "ppo", "kl_coef": 0.3, "iterations": 6, "eval_steps": 1, "seed": 4}
    options["reward"] = f"{files}/reward.py:different"
    gold = {"gold_reward": f"{files}/reward.py:long", "test_size": 4, "eval_rollouts": 8}
    argv = command_line(files, "online", files / "model", files / "out", **options, **gold)
    assert main(argv) == 0
    return files / "out"


def test_a_run_is_a_table(run):
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    start, *rows = read_table(run)
    assert (start["checkpoint"], start["kl"], start["score"]) == (
        0,
        0.0,
        logged[0]["eval/ref_gold"],
    )
    assert start["reward"] == logged[0]["eval/ref_scores"]
    assert len(rows) == 6
    for row, source in zip(rows, logged, strict=True):
        assert (row["checkpoint"], row["kl"]) == (source["step"], source["eval/kl"])
        assert (row["score"], row["reward"]) == (source["eval/gold"], source["eval/scores"])
        assert row["score_stderr"] == source["eval/gold_stderr"] > 0
        assert row["kl_k1_stderr"] == source["eval/kl_stderr"]
        assert (row["algorithm"], row["beta"], row["seed"]) == ("ppo", 0.3, 4)
    assert rows[-1]["fraction"] == 1 and rows[0]["fraction"] == pytest.approx(1 / 6)


def test_a_run_is_fitted_and_reported(run, capsys):
    assert main(["study", "fit", str(run)]) == 0
    (group,) = json.loads((run / "fits.json").read_text())["groups"]
    assert group["offset"] == read_table(run)[0]["score"] and group["points"] == 6
    assert main(["study", "fit", str(run), "--score", "reward"]) == 0
    assert main(["study", "report", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "1 run with 7 checkpoints" in page
    assert "intervals over points. Left out" in page and "over points are too short." in page
    figures = {path.stem for path in (run / "report" / "figures").iterdir()}
    assert {"hump", "paths", "fits"} <= figures


def test_several_tables_make_one_page(run, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("run,checkpoint,kl,score\n" + "".join(f"b,{n},{n / 9},1\n" for n in range(9)))
    assert main(["study", "report", str(other), str(run), "--output", str(tmp_path / "page")]) == 0
    assert "2 runs with 16 checkpoints" in (tmp_path / "page" / "index.html").read_text()


def test_a_gold_reward_needs_held_out_prompts(run, capsys):
    files = run.parent
    argv = command_line(files, "online", files / "model", files / "no", gold_reward="a.py:f")
    assert main(argv) == 2
    assert "gold_reward: expected held-out prompts for it" in capsys.readouterr().err


def test_whitened_apa_is_a_curve_of_its_own(run, tmp_path):
    folders = [tmp_path / name for name in ("plain", "whitened")]
    for folder, whitening in zip(folders, ("auto", "masked"), strict=True):
        shutil.copytree(run, folder)
        (file,) = folder.glob("checkpoint-*/online_config.json")
        config = json.loads(file.read_text()) | {"algorithm": "apa"}
        file.write_text(json.dumps(config | {"whiten_advantages": whitening}))
    rows = read_table(folders)
    assert [row["whitened"] for row in rows] == [False] * 7 + [True] * 7
    assert {series_name(row) for row in rows} == {"APA", "whitened APA"}
    assert default_group(rows) == ("whitened",)
    # Between algorithms it says nothing new.
    assert default_group(read_table([run, folders[1]])) == ("algorithm",)
