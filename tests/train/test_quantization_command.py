"""``--load_in_4bit`` and its like: commands from fine-tuning on, killed, continued, refused."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
)
from word_files import command_line, word_tokenizer, write_pairs_and_reward

from fastdaa.cli import doctor, main, quantization
from fastdaa.study.track.finished import load_policy
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.reward_models import load_classifier

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
FOUR = {"use_peft": True, "load_in_4bit": True, "lora_r": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A model, the same quantised, pairs, a reward, and a QLoRA adapter by ``fastdaa sft``."""
    folder = tmp_path_factory.mktemp("files")
    tiny_model().save_pretrained(folder / "model")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    stored = AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=config)
    stored.save_pretrained(folder / "stored")
    for name in ("model", "stored"):
        word_tokenizer().save_pretrained(folder / name)
    write_pairs_and_reward(folder)
    options = {**FOUR, "max_steps": 6, "learning_rate": 0.05}
    assert main(command_line(folder, "sft", folder / "model", folder / "sft", **options)) == 0
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_killed_and_continued_to_the_bit(files, start_run, tmp_path):
    def run(folder, **options):
        settings = {**FOUR, "max_steps": 6, "save_steps": 2, "learning_rate": 0.01}
        resume = options.pop("resume", None)
        argv = command_line(
            files, "train", files / "model", folder, **settings, resume_from_checkpoint=resume
        )
        process = start_run(argv=argv, log=str(tmp_path / "log.txt"), **options)
        process.join(90)
        return process.exitcode

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(whole) == 0
    assert run(out, end={"step": 3, "number": signal.SIGKILL}) == -signal.SIGKILL
    assert not (out / "checkpoint-4").exists()
    assert run(out, resume=True) == 0
    got, expected = (load_file(folder / "adapter_model.safetensors") for folder in (out, whole))
    assert got.keys() == expected.keys() and all("lora_" in name for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert any(float(tensor.abs().max()) for name, tensor in got.items() if "lora_B" in name)
    kept = json.loads((out / "fastdaa_run.json").read_text())["facts"]["quantization"]
    assert kept == "bitsandbytes 4-bit nf4, computed in float32"


@pytest.mark.slow
def test_two_processes(files, start_run, tmp_path):
    """DDP: two processes with half a batch each train as one with the whole batch."""
    folders = [tmp_path / "one", tmp_path / "two"]
    settings = {**FOUR, "max_steps": 4, "learning_rate": 0.01, "save_strategy": "no"}
    settings["train_sampling_strategy"] = "sequential"
    argv = command_line(files, "train", files / "model", folders[0], **settings)
    one = start_run(argv=argv, log=str(tmp_path / "log.txt"))
    one.join(90)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port
    }  # fmt: skip
    settings |= {"per_device_train_batch_size": 2, "ddp_backend": "gloo"}
    argv = command_line(files, "train", files / "model", folders[1], **settings)
    two = [
        start_run(
            argv=argv, log=str(tmp_path / f"log{rank}.txt"),
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in two:
        process.join(90)
    assert [one.exitcode, *(process.exitcode for process in two)] == [0, 0, 0]
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_an_adapter_goes_on_quantised(files, tmp_path, capsys):
    train = partial(command_line, files, "train", files / "sft")
    options = {"learning_rate": 0, "max_steps": 2, "load_in_4bit": True}
    assert main(train(tmp_path / "out", **options)) == 0
    rows = [row for row in rows_of(tmp_path / "out") if "loss" in row]
    assert [row["rewards/margins"] for row in rows] == [0.0, 0.0]
    assert "was trained on a base" not in capsys.readouterr().err
    # On the whole base it is another model, which is said.
    options["load_in_4bit"] = None
    assert main(train(tmp_path / "whole", **options)) == 0
    said = capsys.readouterr().err
    assert "sft was trained on a base that was quantised, bitsandbytes 4-bit nf4" in said
    assert "and goes on with another one" in said
    whole = [row for row in rows_of(tmp_path / "whole") if "loss" in row]
    assert abs(whole[0]["logps/chosen"] - rows[0]["logps/chosen"]) > 1e-3


def test_a_new_adapter_on_the_merged_base_quantised_afterwards(files, tmp_path, capsys):
    out = tmp_path / "out"
    train = partial(command_line, files, "train", files / "sft", out, **FOUR, save_steps=1)
    assert main(train(max_steps=1, learning_rate=0.01)) == 0
    assert "and was merged into the whole one" in capsys.readouterr().err
    merged = json.loads((out / "base_model" / "config.json").read_text())
    assert "quantization_config" not in merged
    kept = load_file(out / "base_model" / "model.safetensors")
    base = load_file(files / "model" / "model.safetensors")
    assert not torch.equal(*(w["model.layers.0.mlp.up_proj.weight"] for w in (kept, base)))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base_model")
    # The same base again, where the run goes on; another quantisation is another run.
    again = {"max_steps": 2, "learning_rate": 0.01, "resume_from_checkpoint": True}
    assert main(train(**again)) == 0
    assert main(train(**again, use_bnb_nested_quant=True)) == 2
    assert "quantization 'bitsandbytes 4-bit nf4, comp" in capsys.readouterr().err


def test_a_reference_of_its_own(files, tmp_path):
    argv = command_line(
        files, "train", files / "model", tmp_path / "out", **FOUR, ref_model=files / "model",
        max_steps=1, learning_rate=0,
    )  # fmt: skip
    assert main(argv) == 0
    first = rows_of(tmp_path / "out")[0]
    assert first["rewards/chosen"] == 0.0 and first["kl/token"] == 0.0


def test_dtype_auto_asks_the_model(files, tmp_path, capsys):
    model = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(files / "model", dtype="bfloat16").save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((files / "model" / name).read_bytes())
    argv = command_line(files, "sft", model, tmp_path / "out", **FOUR, dtype="auto", max_steps=1)
    assert main(argv) == 0
    assert "4-bit nf4, computed in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options"),
    [
        pytest.param("train", {"track_reward": "{}/reward.py:count", "test_size": 4}, id="tracked"),
        pytest.param("online", {}, id="online"),
        pytest.param("online", {"critic": "shared"}, id="online, shared critic"),
    ],
)
def test_generation(command, options, files, tmp_path, capsys):
    given = {k: v.format(files) if isinstance(v, str) else v for k, v in options.items()}
    if command == "train":
        given |= {"max_steps": 2, "save_steps": 1, "track_max_new_tokens": 4, "logging_steps": 1}
    assert (
        main(command_line(files, command, files / "model", tmp_path / "out", **FOUR, **given)) == 0
    )
    rows = rows_of(tmp_path / "out")
    if command == "online":
        assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
        # The rest of the run would be refused on another base.
        argv = command_line(files, command, files / "model", tmp_path / "out", **FOUR, **given)
        argv += ["--resume_from_checkpoint", "--iterations=3"]
        assert main([*argv, "--use_bnb_nested_quant"]) == 2
        assert "expected the reference of" in capsys.readouterr().err
        assert main(argv) == 0
        assert rows_of(tmp_path / "out")[-1]["iteration"] == 3
        return
    assert next(row for row in rows if "loss" in row)["rewards/margins"] == 0.0
    table = (tmp_path / "out" / "track.jsonl").read_text().splitlines()
    assert len(table) == 3
    with pytest.raises(ValueError, match=r"trained on one that was quantised when it was loaded"):
        load_policy(tmp_path / "out" / "checkpoint-2", "auto", "cpu")


def test_online_goes_on_to_the_bit(files, tmp_path):
    online = partial(command_line, files, "online", files / "model", **FOUR)
    assert main(online(tmp_path / "whole", iterations=3)) == 0
    assert main(online(tmp_path / "out", iterations=2)) == 0
    assert main(online(tmp_path / "out", iterations=3, resume_from_checkpoint=True)) == 0
    saved = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "whole")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    checkpoint = next((tmp_path / "out").glob("checkpoint-*"))
    assert all("lora_" in name for name in load_file(checkpoint / "model.safetensors"))


STORED = {"model": "stored", "lora_r": 4}
REFUSED = [
    pytest.param({"load_in_4bit": True}, r"load_in_4bit: expected LoRA", id="no LoRA"),
    pytest.param({**FOUR, "load_in_8bit": True}, r"expected one of .* got both", id="both"),
    pytest.param(
        {"use_peft": True, "use_bnb_nested_quant": True},
        r"use_bnb_nested_quant: expected load_in_4bit beside it",
        id="nested alone",
    ),
    pytest.param(
        {"use_peft": True, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"},
        r"bnb_4bit_quant_type: expected load_in_4bit beside it, got 'fp4'",
        id="fp4 in 8 bits",
    ),
    pytest.param(
        {**FOUR, "model": "stored"},
        r"load_in_4bit: expected a model that is not quantised yet, .*/stored is \(bits",
        id="twice",
    ),
    pytest.param(
        {"model": "stored"}, r"model: .*/stored is quantised .*: expected LoRA", id="whole"
    ),
    pytest.param(
        {**FOUR, "ref_model": "stored"}, r"not quantised yet, .*/stored is", id="reference twice"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused_before_anything_is_loaded(options, message, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastdaa.cli.building.load_tokenizer", lambda *_: pytest.fail("too late"))
    given = {"model": "model", **options}
    for name in ("model", "ref_model"):
        if name in given:
            given[name] = files / given[name]
    argv = command_line(files, "train", given.pop("model"), tmp_path / "out", **given)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_a_reward_model_is_not_trained_in_codes(files, tmp_path, capsys):
    assert main(command_line(files, "reward", files / "stored", tmp_path / "out")) == 2
    assert "stored is quantised (bitsandbytes 4-bit nf4" in capsys.readouterr().err


def test_a_stored_quantised_base(files, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    argv = command_line(files, "train", files / "stored", out, use_peft=True, max_steps=2)
    assert main(argv) == 0
    assert rows_of(out)[0]["rewards/margins"] == 0.0
    assert main(command_line(files, "train", out, again, max_steps=1)) == 0
    assert (
        main(command_line(files, "train", out, tmp_path / "new", max_steps=1, use_peft=True)) == 2
    )
    error = capsys.readouterr().err
    assert "expected an adapter that can be merged, the base" in error
    assert "; leave --use_peft out to train it further" in error
    # A reward model is trained on the merged model in any case.
    for use_peft in (True, False):
        argv = command_line(files, "reward", out, tmp_path / "new", use_peft=use_peft)
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "expected an adapter that can be merged, the base" in error
        assert "use_peft" not in error
    # It is measured on the base that it was trained on.
    assert load_policy(out / "checkpoint-2", "auto", "cpu") is not None


@pytest.mark.parametrize("model", ["model", "stored"])
def test_without_bitsandbytes(model, files, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        quantization, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    options = {**FOUR, "load_in_4bit": True if model == "model" else None}
    assert main(command_line(files, "train", files / model, tmp_path / "out", **options)) == 2
    error = capsys.readouterr().err
    assert error.endswith("not installed: pip install 'fastdaa[quantization]'\n")
    assert len(error.splitlines()) == 1


def test_doctor_counts_what_the_base_takes(tmp_path, capsys):
    """Llama 3 8B: 6.98e9 weights in linear layers under the head, 1.05e9 in its two ends."""
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336}
    config = LlamaConfig(**sizes, num_hidden_layers=32, num_key_value_heads=8)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    row = doctor._base_row(doctor.empty_model(str(tmp_path)))
    coded, ends = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336), 2 * (2 * 128256 + 65) * 4096
    expected = (coded * 4.5 / 8 + ends) / 2**30
    assert f"; 4 bits {expected:.2f}; " in row.value and expected == pytest.approx(5.61, abs=0.01)


def test_vllm_is_refused(files, tmp_path, capsys):
    argv = command_line(files, "online", files / "model", tmp_path / "out", **FOUR, rollouts="vllm")
    assert main(argv) == 2
    assert "expected transformers for a quantised policy" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}], ids=["whole base", "4 bits"])
def test_a_reward_model_as_an_adapter(options, files, tmp_path, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    given = {"use_peft": True, "learning_rate": 0.02, "save_steps": 4, **options}
    reward = partial(command_line, files, "reward", files / "model", **given)
    assert main(reward(out, max_steps=8)) == 0
    rows = [row for row in rows_of(out) if "loss" in row]
    assert rows[-1]["loss"] < 0.2 < 0.4 < rows[0]["loss"]
    saved = load_file(out / "adapter_model.safetensors")
    plain = {name for name in saved if "lora_" not in name}
    assert plain == {"base_model.model.score.weight"}
    # Continued to the bit, from half of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardTrainer, "_save_checkpoint", _stopping(RewardTrainer._save_checkpoint))
        assert main(reward(again, max_steps=8)) == 130
    assert not (again / "checkpoint-8").exists()
    assert main(reward(again, max_steps=8, resume_from_checkpoint=True)) == 0
    other = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], other[name]) for name in saved)
    # It is a reward model: merged, it prefers what the pairs prefer.
    model = load_classifier(str(out)).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    margins = []
    for line in (files / "pairs.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for side in ("chosen", "rejected")]
        with torch.no_grad():
            scores = [model(**tokenizer(text, return_tensors="pt")).logits[0, 0] for text in texts]
        margins.append(float(scores[0] - scores[1]))
    assert sum(margin > 0 for margin in margins) >= 11
    argv = command_line(
        files, "online", files / "model", tmp_path / "online", reward=out, iterations=1
    )
    assert main(argv) == 0
    assert main(command_line(files, "reward", out, tmp_path / "new", use_peft=True)) == 2
    assert "got the reward model LORA r=16 adapter" in capsys.readouterr().err


def _stopping(save):
    """Ctrl-C comes while a checkpoint is written."""

    def stopped(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    return stopped


def test_a_reward_adapter_on_a_merged_base(files, tmp_path):
    out = tmp_path / "out"
    reward = partial(command_line, files, "reward", files / "sft", out, **FOUR, save_steps=1)
    assert main(reward(max_steps=1)) == 0
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base_model")
    assert config["task_type"] == "SEQ_CLS"
    assert main(reward(max_steps=2, resume_from_checkpoint=True)) == 0
    assert load_classifier(str(out)).config.num_labels == 1
