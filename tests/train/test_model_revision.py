"""``--model_revision``: weights, tokenizer and base of an adapter come from that revision."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from word_files import word_tokenizer

from fastdaa.cli import (
    arguments,
    building,
    evaluate,
    main,
    online_arguments,
    paths,
    pipeline,
    reward,
)
from fastdaa.train.adapter_files import find_adapter, load_causal_lm, load_merged
from fastdaa.train.reward_models import load_reward_model

REVISIONS = {"main": "a" * 40, "it-SFT": "b" * 40}


@pytest.fixture(scope="module")
def hub(tiny_model):
    """A model in the hub's cache with two revisions, whose weights and tokenizers differ."""
    folder = Path(constants.HF_HUB_CACHE) / "models--owner--revised"
    for seed, (name, commit) in enumerate(REVISIONS.items()):
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / name).write_text(commit)
        snapshot = folder / "snapshots" / commit
        model = tiny_model()
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(seed)
        model.save_pretrained(snapshot)
        tokenizer = word_tokenizer()
        tokenizer.add_tokens([f"of_{name}"])
        tokenizer.save_pretrained(snapshot)
    return "owner/revised"


def parsed(hub, *more):
    return arguments.parse(["--model", hub, "--dataset", "d", "--use_cpu", *more])[0]


def embedding(model):
    return model.get_input_embeddings().weight.detach()


def stored(hub, revision):
    return embedding(load_causal_lm(hub, revision=revision))


@pytest.mark.parametrize("revision", [None, "main", "it-SFT", REVISIONS["it-SFT"]])
def test_weights_and_tokenizer(hub, revision, tmp_path):
    given = parsed(hub, *(["--model_revision", revision] if revision else []))
    paths.check_model("model", given.model, given.model_revision)
    tokenizer = building.load_tokenizer(given)
    name = "main" if revision in (None, "main") else "it-SFT"
    assert f"of_{name}" in tokenizer.get_vocab()
    policy = building.load_model(
        given.model, given, device="cpu", revision=building.model_revision(given)
    )
    assert torch.equal(embedding(policy), stored(hub, name))
    assert not torch.equal(stored(hub, "main"), stored(hub, "it-SFT"))
    # A reference is another model.
    assert torch.equal(embedding(building.load_model(hub, given, "ref_model")), stored(hub, "main"))


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_the_policy_and_its_adapter(hub, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    from peft import get_peft_model

    given = parsed(hub, "--model_revision", "it-SFT", "--use_peft", "--lora_r", "2")
    tokenizer = word_tokenizer()
    policy = building.load_policy(given, tokenizer, str(tmp_path), None, device="cpu")
    assert torch.equal(embedding(policy), stored(hub, "it-SFT"))
    get_peft_model(policy, building.lora_config(given)).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (hub, "it-SFT")
    adapter = find_adapter(str(tmp_path / "adapter"))
    assert torch.equal(embedding(load_causal_lm(adapter.source)), stored(hub, "it-SFT"))
    from transformers import AutoModelForCausalLM

    merged = load_merged(adapter, AutoModelForCausalLM)
    assert torch.equal(embedding(merged), stored(hub, "it-SFT"))
    assert torch.equal(embedding(load_reward_model(adapter.source)), stored(hub, "it-SFT"))
    # Evaluated, it is compared with the base that it was trained on.
    monkeypatch.setattr(building, "load_model", lambda *_, revision=None, **__: revision)
    monkeypatch.setattr("fastdaa.train.evaluation_models.check_finite", lambda *_: None)
    monkeypatch.setattr("fastdaa.train.evaluation_models.warn_of_quantization", lambda *_: None)
    own = evaluate.EvaluateArguments(model=adapter.source, dataset=["d"])
    config = type("Config", (), {"device": torch.device("cpu")})
    assert evaluate._load_models(own, adapter.base, config)[1] == {"revision": "it-SFT"}
    own.ref_model = hub
    assert evaluate._load_models(own, hub, config)[1] == {}
    own.ref_model_revision = "main"
    assert evaluate._load_models(own, hub, config)[1] == {"revision": "main"}


@pytest.mark.parametrize("named", [False, True])
def test_the_reference_of_a_run(hub, tmp_path, monkeypatch, named):
    """Also where it is another revision of the same repository."""
    given = parsed(hub, "--ref_model", hub, *(["--ref_model_revision", "it-SFT"] if named else []))
    seen = []
    monkeypatch.setattr(paths, "check_model", lambda *found: seen.append(found))
    paths.check_paths(given, str(tmp_path), None)
    assert seen == [("model", hub, None), ("ref_model", hub, "it-SFT" if named else None)]
    revision = building.model_revision(given, "ref_model")
    reference = building.load_model(hub, given, "ref_model", revision=revision)
    assert torch.equal(embedding(reference), stored(hub, "it-SFT" if named else "main"))


def test_a_revision_of_no_reference(hub, tmp_path):
    given = parsed(hub, "--ref_model_revision", "it-SFT")
    with pytest.raises(ValueError, match="ref_model_revision: expected ref_model beside it"):
        paths.check_paths(given, str(tmp_path), None)
    with pytest.raises(ValueError, match="ref_model_revision: expected ref_model beside it"):
        evaluate.EvaluateArguments(model=hub, dataset=["d"], ref_model_revision="it-SFT")


def test_two_revisions_are_evaluated_against_each_other(hub, tmp_path):
    """A model against another revision of itself: its reference has other weights."""
    data = tmp_path / "pairs.jsonl"
    row = {"prompt": "w1 w2", "chosen": " w3", "rejected": " w4 w5"}
    data.write_text(json.dumps(row) + "\n")
    found = {}
    for name in REVISIONS:
        output = tmp_path / f"{name}.json"
        line = ["--model", hub, "--model_revision", "it-SFT", "--ref_model", hub, "--use_cpu"]
        line += ["--ref_model_revision", name, "--dataset", str(data), "--output", str(output)]
        assert evaluate.run(line) == 0
        found[name] = json.loads(output.read_text())
    assert found["it-SFT"]["metrics"]["rewards/margins"] == 0.0
    assert found["main"]["metrics"]["rewards/margins"] != 0.0
    assert found["main"]["ref_model_revision"] == "main"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_finished_checkpoints_are_measured_against_it(hub, tmp_path, capsys):
    """Named, or noted by an adapter; against its own weights a model has no KL."""
    load_causal_lm(hub, revision="it-SFT").save_pretrained(tmp_path / "checkpoint-2")
    data, table = tmp_path / "pairs.jsonl", tmp_path / "track.jsonl"
    data.write_text(json.dumps({"prompt": "w1 w2", "chosen": " w3", "rejected": " w4"}) + "\n")
    (tmp_path / "reward.py").write_text("def score(p, c):\n    return [0.0] * len(c)\n")
    line = ["study", "track", "--dataset", str(data), "--reward", f"{tmp_path}/reward.py:score"]
    line += ["--prompts", "1", "--max_new_tokens", "4", "--table", str(table), "--no_start"]
    line += ["--device", "cpu"]

    def kl(run, *more, folder="checkpoint-2"):
        code = main([*line, "--model", str(tmp_path / folder), "--run", run, *more])
        assert code == 0, capsys.readouterr().err
        return json.loads(table.read_text().splitlines()[-1])["kl"]

    assert kl("main", "--ref_model", hub) > 1e-3
    assert kl("own", "--ref_model", hub, "--ref_model_revision", "it-SFT") == 0.0
    assert main([*line, "--model", str(tmp_path), "--ref_model_revision", "it-SFT"]) == 2
    assert "expected --ref_model beside it" in capsys.readouterr().err
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = load_causal_lm(hub, revision="it-SFT")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear", revision="it-SFT")
    get_peft_model(model, adapter).save_pretrained(tmp_path / "a" / "checkpoint-1")
    assert kl("adapter", folder="a") == 0.0  # a new one changes nothing


def test_a_reward_model(hub, tmp_path):
    line = ["--model", hub, "--dataset", "d", "--use_cpu", "--model_revision", "it-SFT"]
    given, config = reward.parse([*line, "--output_dir", str(tmp_path)])
    start = building.Start(None, word_tokenizer(), None, None)
    assert torch.equal(embedding(reward._load_model(given, config, start)), stored(hub, "it-SFT"))


def test_what_has_no_revision(hub, tmp_path, tiny_model):
    tiny_model().save_pretrained(tmp_path)
    paths.check_model("model", str(tmp_path), "main")
    with pytest.raises(ValueError, match=r"model_revision: .* got 'v1' for the folder"):
        paths.check_model("model", str(tmp_path), "v1")
    with pytest.raises(OSError, match="owner/revised"):
        paths.check_model("model", hub, "nowhere")


def test_an_adapter_on_the_hub_at_a_revision(hub, monkeypatch):
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda *_, **__: "there")
    with pytest.raises(ValueError, match="model_revision: expected a whole model, got the adapter"):
        paths.check_model("model", hub, "it-SFT")


def test_the_first_stage_of_a_pipeline_has_it(hub, tmp_path):
    given = online_arguments.OnlineArguments(hub, ["d"], model_revision="it-SFT", pipeline=True)
    config = type("Config", (), {"seed": 0})
    own = pipeline._revision(given)
    words = pipeline._stage_argv(given, config, hub, tmp_path / "sft", own)
    assert words[words.index("--model_revision") + 1] == "it-SFT"
    assert "--model_revision" not in pipeline._stage_argv(given, config, "m", tmp_path / "r", {})
