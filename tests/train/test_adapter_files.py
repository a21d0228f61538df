"""Adapters in folders: their bases, merging them, and folders that have moved."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fastdaa.cli import paths
from fastdaa.train.adapter_files import (
    find_adapter,
    load_causal_lm,
    load_merged,
    tokenizer_source,
)
from fastdaa.train.merged_base import merged_base
from fastdaa.train.reward_models import load_classifier, load_reward_model
from fastdaa.train.sft import SftConfig, SftTrainer

peft = pytest.importorskip("peft")
IDS = torch.tensor([[1, 5, 6, 7, 8]])


@pytest.fixture
def make_adapter(tiny_model, tmp_path):
    """``make_adapter(name, targets, seed, **model)``: a folder; its base is ``tmp_path/base``."""

    def make(name="adapter", targets=("q_proj", "v_proj"), seed=5, task="CAUSAL_LM", **options):
        if not (tmp_path / "base").is_dir():
            tiny_model(**options).save_pretrained(tmp_path / "base")
        kind = AutoModelForCausalLM
        if task == "SEQ_CLS":
            kind = AutoModelForSequenceClassification
            options["num_labels"] = 1
        torch.manual_seed(seed)
        base = kind.from_pretrained(tmp_path / "base", **options)
        config = peft.LoraConfig(task_type=task, r=2, target_modules=[*targets])
        model = peft.get_peft_model(base, config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    weight.normal_(std=0.5)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def set_base(adapter, value):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": value}
    path.write_text(json.dumps(config))


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def test_its_base_and_its_tokenizer(make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter()
    found = find_adapter(str(adapter))
    assert found is not None and found.base == str(tmp_path / "base")
    assert str(found) == f"LORA r=2 adapter {adapter} on {tmp_path / 'base'}"
    assert find_adapter(str(tmp_path / "base")) is None
    assert tokenizer_source(str(adapter)) == str(tmp_path / "base")
    (adapter / "tokenizer_config.json").touch()
    assert tokenizer_source(str(adapter)) == str(adapter)
    # A relative path counts from where one is, and is saved as an absolute one.
    set_base(adapter, "base")
    monkeypatch.chdir(tmp_path)
    model = load_causal_lm("adapter")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    whole = load_causal_lm("base")
    assert whole.name_or_path == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("base", "error", "message"),
    [
        pytest.param(None, ValueError, "to name base_model_name_or_path, got None", id="none"),
        pytest.param("/no/such", FileNotFoundError, "at /no/such; there is none", id="gone"),
        pytest.param("../no", FileNotFoundError, "at ../no, which counts from", id="relative"),
    ],
)
def test_an_adapter_without_its_base(make_adapter, base, error, message):
    adapter = make_adapter()
    set_base(adapter, base)
    with pytest.raises(error, match=message):
        load_causal_lm(str(adapter))
    with pytest.raises(error, match=f"^ref_model: expected .*{message}"):
        paths.check_model("ref_model", str(adapter))


def test_half_an_adapter(make_adapter):
    adapter = make_adapter()
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"expected adapter_model.safetensors beside .*, there is"):
        load_causal_lm(str(adapter))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="to be an adapter's configuration"):
        load_causal_lm(str(adapter))


def test_an_adapter_on_an_adapter(make_adapter):
    adapter = make_adapter()
    set_base(adapter, str(make_adapter("other")))
    with pytest.raises(ValueError, match="to be a whole model, got the adapter"):
        load_causal_lm(str(adapter))


@pytest.mark.parametrize(
    "other",
    [
        # Fewer layers have no place for some tensors, more are left without any.
        pytest.param({"num_hidden_layers": 1}, id="fewer layers"),
        pytest.param({"num_hidden_layers": 3}, id="more layers"),
        pytest.param({"num_key_value_heads": 2}, id="another size"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_of_another_base(make_adapter, tiny_model, tmp_path, other):
    adapter = make_adapter()
    shutil.rmtree(tmp_path / "base")
    tiny_model(**other).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=f"the adapter {adapter} to fit its base model"):
        load_causal_lm(str(adapter))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merged_it_gives_the_same(make_adapter, tmp_path, dtype):
    adapter = find_adapter(str(make_adapter()))
    assert adapter is not None
    merged = load_merged(adapter, AutoModelForCausalLM, dtype=dtype)
    assert not hasattr(merged, "peft_config") and merged.dtype == dtype
    assert all(weight.requires_grad for weight in merged.parameters())
    whole = logits(load_causal_lm(adapter.source, dtype=torch.float32))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype] * float(whole.abs().max())
    assert torch.allclose(logits(merged).float(), whole, rtol=0, atol=tolerance)
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert float((whole - base).abs().max()) > 2 * tolerance


@pytest.mark.filterwarnings("ignore:.*(tie|save_embedding_layers)")
def test_tied_embeddings_cannot_be_merged(make_adapter):
    adapter = find_adapter(str(make_adapter(targets=("lm_head",), tie_word_embeddings=True)))
    assert adapter is not None
    with pytest.raises(ValueError, match="changes one of two tied embeddings"):
        load_merged(adapter, AutoModelForCausalLM)


def test_virtual_tokens(make_adapter, tmp_path):
    make_adapter()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="expected an adapter of weights such as LoRA"):
        load_causal_lm(str(tmp_path / "prompt"))


def run_dir(tmp_path, name, adapter):
    """What a run leaves: a merged base, and an adapter on it."""
    found = find_adapter(str(adapter))
    model = merged_base(found, tmp_path / name)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    return tmp_path / name


def test_a_folder_that_has_moved(make_adapter, tmp_path):
    out = run_dir(tmp_path, "out", make_adapter())
    start = logits(load_causal_lm(str(out)))
    moved = out.rename(tmp_path / "moved")
    found = find_adapter(str(moved))
    assert found is not None and found.base == str(moved / "base_model")
    checkpoint = shutil.copytree(
        moved, moved / "checkpoint-1", ignore=shutil.ignore_patterns("base_model")
    )
    for folder in (moved, checkpoint):
        assert torch.equal(logits(load_causal_lm(str(folder))), start)
    # Copied, it is the same; but another run may have taken its place.
    shutil.copytree(moved, out)
    assert torch.equal(logits(load_causal_lm(str(moved))), start)
    shutil.rmtree(out)
    run_dir(tmp_path, "out", make_adapter("other", seed=6))
    with pytest.raises(ValueError, match="expected one base model of the adapter"):
        load_causal_lm(str(moved))


def test_a_merged_base_is_loaded_again_and_not_written_over(make_adapter, tmp_path):
    first, other = (find_adapter(str(make_adapter(f"a{s}", seed=s))) for s in (5, 6))
    assert first is not None and other is not None
    out, checkpoint = tmp_path / "out", tmp_path / "out" / "checkpoint-1"
    saved = logits(merged_base(first, out))
    shutil.rmtree(first.base)
    again = merged_base(first, out, checkpoint)
    assert torch.equal(logits(again), saved)
    assert again.name_or_path == str(out / "base_model")
    # The run goes on in another folder: the base comes along.
    merged_base(first, tmp_path / "new", checkpoint)
    assert torch.equal(logits(load_causal_lm(str(tmp_path / "new" / "base_model"))), saved)
    with pytest.raises(ValueError, match=r"expected the adapter .*a5.*, got .*a6 \(digest"):
        merged_base(other, out, checkpoint)
    with pytest.raises(ValueError, match="expected the merged base model of the run"):
        merged_base(first, tmp_path / "third", tmp_path / "third" / "checkpoint-1")
    (out / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="output_dir: expected the adapter"):
        merged_base(other, out)


def test_reward_models(make_adapter, tmp_path):
    adapter = make_adapter()
    expected = load_causal_lm(str(adapter)).get_base_model().model.eval()(IDS).last_hidden_state
    model = load_reward_model(str(adapter))
    assert torch.allclose(model.model(IDS).last_hidden_state, expected, atol=1e-4)
    with pytest.raises(ValueError, match="expected an adapter for SEQ_CLS, got one for CAUSAL_LM"):
        load_classifier(str(adapter))
    classifier = make_adapter("classifier", task="SEQ_CLS")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    reference = peft.PeftModel.from_pretrained(base, classifier)
    for loaded in (load_classifier(str(classifier)), load_reward_model(str(classifier))):
        assert torch.allclose(logits(loaded), logits(reference), atol=1e-5)
    with pytest.raises(ValueError, match="expected an adapter for CAUSAL_LM, got one for SEQ_CLS"):
        load_causal_lm(str(classifier))


def test_other_trainers_do_not_lose_it(make_adapter, pairs, tmp_path):
    native = AutoModelForCausalLM.from_pretrained(make_adapter())
    data = pairs(4).rename_column("chosen_ids", "completion_ids").remove_columns("rejected_ids")
    settings = {"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": "none"}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="without adapters beside a new one"):
        SftTrainer(native, SftConfig(**settings), data, peft_config=config)
    with pytest.raises(ValueError, match=r"expected adapters in a peft\.PeftModel"):
        SftTrainer(native, SftConfig(**settings), data)


def test_an_adapter_on_the_hub(make_adapter, tmp_path, monkeypatch):
    adapter = make_adapter()
    asked = []

    def download(source, **options):
        asked.append((source, options["allow_patterns"]))
        return str(adapter)

    config = str(adapter / "adapter_config.json")
    monkeypatch.setattr("transformers.utils.find_adapter_config_file", lambda source: config)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = find_adapter("owner/name")
    assert found is not None and not asked
    assert (found.source, found.base) == ("owner/name", str(tmp_path / "base"))
    model = logits(load_causal_lm("owner/name"))
    monkeypatch.undo()
    assert torch.equal(model, logits(load_causal_lm(str(adapter))))
    # Neither whole models nor checkpoints beside it.
    assert asked[0][0] == "owner/name" and "adapter_*" in asked[0][1]
    assert not any("model.safetensors" in pattern for pattern in asked[0][1])
