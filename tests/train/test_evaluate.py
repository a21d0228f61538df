"""``fastdaa evaluate``: numbers of a finished model, compared with whole logits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset
from word_files import word_tokenizer, write_pairs

from fastdaa.cli import main
from fastdaa.data import tokenize_pairs
from fastdaa.train.adapter_files import load_causal_lm
from fastdaa.train.run_record import new_record, write_record


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model, shifted):
    """A folder with the models ``start`` and ``end``, an adapter on the first, and 7 pairs."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("files")
    start = tiny_model()
    start.save_pretrained(folder / "start")
    shifted.save_pretrained(folder / "end")
    start.name_or_path = str(folder / "start")
    adapter = get_peft_model(start, LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapter.save_pretrained(folder / "new adapter")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapter.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    adapter.save_pretrained(folder / "adapter")
    for name in ("start", "end", "adapter", "new adapter"):
        word_tokenizer().save_pretrained(folder / name)
    rows = write_pairs(folder / "pairs.jsonl", 7)
    tokenized, _ = tokenize_pairs(Dataset.from_list(rows), word_tokenizer(), max_length=None)
    return folder, tokenized


@pytest.fixture
def evaluate(files, tmp_path):
    folder, _ = files

    def run(model="end", **options):
        given = {"dataset": f"{folder}/pairs.jsonl", "output": f"{tmp_path}/numbers.json"}
        argv = ["evaluate", "--model", str(folder / model), "--use_cpu"]
        for name, value in {**given, **options}.items():
            argv += [f"--{name}", str(value)]
        code = main(argv)
        return code, json.loads((tmp_path / "numbers.json").read_text()) if code == 0 else None

    return run


@pytest.fixture(scope="module")
def by_hand(files, naive):
    """``by_hand(model)``: the numbers of it against ``start``, beta 0.5, from whole logits."""
    folder, data = files

    @torch.no_grad()
    def numbers(model):
        end, start = (naive(load_causal_lm(str(folder / n)).eval()) for n in (model, "start"))
        logps, ref = end.logps(data), start.logps(data)
        kls = []
        for row in data:
            for side in ("chosen_ids", "rejected_ids"):
                p, q = (m.logits(row, side).log_softmax(-1) for m in (end, start))
                kls.append((p.exp() * (p - q)).sum(-1))
        chosen, rejected = (0.5 * (a - b) for a, b in zip(logps, ref, strict=True))
        return {
            "loss": -torch.nn.functional.logsigmoid(chosen - rejected).mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": (chosen - rejected).mean(),
            "logps/chosen": logps[0].mean(),
            "logps/rejected": logps[1].mean(),
            "displacement/chosen": 2 * chosen.mean(),
            "kl/token": torch.cat(kls).mean(),
            "kl/sequence": torch.stack([kl.sum() for kl in kls]).mean(),
        }

    return numbers


# 7 pairs: the last batch is smaller, and a mean over batches would be another number.
@pytest.mark.parametrize("batch", [3, 8])
def test_numbers_are_those_of_whole_logits(evaluate, files, by_hand, batch, capsys):
    code, facts = evaluate(
        ref_model=f"{files[0]}/start", beta=0.5, per_device_eval_batch_size=batch
    )
    assert code == 0 and facts["pairs"] == 7 and facts["objective"].startswith("dpo(beta=0.5")
    for name, value in by_hand("end").items():
        assert facts["metrics"][name] == pytest.approx(float(value), rel=1e-4), name
    printed = capsys.readouterr().out
    assert "7 pairs" in printed and f"{facts['metrics']['rewards/margins']:,.6g}" in printed
    assert "step" not in printed.splitlines()[0]


def test_an_adapter_against_its_base(evaluate, files, by_hand):
    """And so two policies against one reference, with the test before."""
    code, facts = evaluate("adapter", beta=0.5)
    assert code == 0 and facts["ref_model"] == f"{files[0]}/start"
    for name, value in by_hand("adapter").items():
        assert facts["metrics"][name] == pytest.approx(float(value), rel=1e-4), name
    # A whole model against an adapter: the sign of every log-ratio turns.
    _, turned = evaluate("start", ref_model=f"{files[0]}/adapter", beta=0.5)
    for name in ("rewards/margins", "rewards/chosen", "displacement/chosen", "kl/k1"):
        assert turned["metrics"][name] == pytest.approx(-facts["metrics"][name], rel=1e-4), name


def test_a_new_adapter_does_nothing(evaluate):
    code, facts = evaluate("new adapter")
    assert code == 0 and facts["metrics"]["rewards/margins"] == 0
    assert facts["metrics"]["kl/token"] == 0


def test_the_first_pairs_alone_and_each_rate_once(evaluate):
    code, facts = evaluate("new adapter", max_samples=3)
    assert code == 0 and facts["pairs"] == 3
    rates = {name for name in facts["metrics"] if "second" in name}
    assert rates == {"throughput/pairs_per_second", "throughput/tokens_per_second"}


def test_a_loss_without_a_reference(evaluate):
    code, facts = evaluate(loss="simpo")
    assert code == 0 and facts["ref_model"] is None and "kl/token" not in facts["metrics"]


def test_pairs_that_do_not_fit_are_counted(evaluate, files, capsys):
    prompts = [len(row["prompt_ids"]) for row in files[1]]
    kept = sum(length < 4 for length in prompts)
    assert 0 < kept < 7
    code, facts = evaluate(loss="simpo", max_length=4, bf16="true")
    assert code == 0 and (facts["pairs"], facts["pairs_left_out"]) == (kept, 7 - kept)
    assert facts["bf16"] is True and facts["dtype"] == "float32"
    assert f"dataset: {kept} of 7 pairs kept" in capsys.readouterr().err


def test_one_process_must_not_be_sharded(evaluate, capsys, monkeypatch):
    monkeypatch.setattr("fastdaa.train.config.PreferenceConfig.world_size", 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert evaluate(ref_model="x/y")[0] == 2
    assert "that each hold the whole model, got FSDP" in capsys.readouterr().err


def other_words(folder):
    """Another tokenizer with as many words, in another order."""
    from tokenizers import Tokenizer

    words = json.loads(word_tokenizer().backend_tokenizer.to_str())
    ids = words["model"]["vocab"]
    ids["w5"], ids["w6"] = ids["w6"], ids["w5"]
    tokenizer = word_tokenizer()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(words))
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"vocab_size": 20}, {}, "expected a vocabulary of 61 as in the policy, got 20"),
        ({"vocab_size": 20}, {"log_exact_kl": "false"}, "expected token ids below 20"),
        ({}, {}, "got other ones for 2 of the"),
    ],
    ids=["another vocabulary", "smaller, without KL", "other words"],
)
def test_a_reference_that_reads_other_tokens(
    evaluate, tiny_model, tmp_path, capsys, change, options, message
):
    tiny_model(**change).save_pretrained(tmp_path / "ref")
    if not change:
        other_words(tmp_path / "ref")
    assert evaluate(ref_model=str(tmp_path / "ref"), **options)[0] == 2
    assert message in capsys.readouterr().err


def test_a_reward_model_has_no_log_probs(evaluate, files, tmp_path, capsys):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(files[0] / "start", num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    word_tokenizer().save_pretrained(tmp_path / "reward")
    assert evaluate(ref_model=str(tmp_path / "reward"))[0] == 2
    assert "ref_model: expected a causal language model" in capsys.readouterr().err


def test_weights_that_are_not_finite(evaluate, tiny_model, tmp_path, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    assert evaluate(ref_model=str(tmp_path / "broken"))[0] == 2
    assert "ref_model: expected finite weights" in capsys.readouterr().err


def test_a_quantised_base(evaluate, files, tiny_model, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    code, whole = evaluate("adapter")
    assert code == 0
    record = new_record({"quantization": "bitsandbytes 8-bit"})
    folder = tmp_path / "trained"
    shutil.copytree(files[0] / "adapter", folder)
    write_record(str(folder), record)
    code, facts = evaluate(folder, load_in_4bit=True)
    assert code == 0 and facts["metrics"]["rewards/margins"] != whole["metrics"]["rewards/margins"]
    said = capsys.readouterr().err
    assert "was trained on a base that was bitsandbytes 8-bit, and is measured on" in said
    assert evaluate(ref_model=f"{files[0]}/start", load_in_4bit=True)[0] == 2
    assert "expected an adapter on a quantised base" in capsys.readouterr().err


def test_nothing_else_is_written_over(evaluate, files, tmp_path, capsys):
    config = files[0] / "end" / "config.json"
    before = config.read_text()
    assert evaluate(loss="simpo", output=config)[0] == 2
    assert "config.json holds something else" in capsys.readouterr().err
    assert config.read_text() == before
    for loss in ("simpo", "sft"):
        code, facts = evaluate(loss=loss)
        assert code == 0 and facts["objective"].startswith(loss)
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]


def test_interrupted(evaluate, files, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastdaa.train.trainer.run_policy", stop)
    assert evaluate(loss="simpo")[0] == 130
    assert capsys.readouterr().err.endswith("fastdaa evaluate: interrupted\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ref_model: expected --ref_model, the model that training began with"),
        ({"ref_model": "nowhere/at all"}, "ref_model: expected a path or a hub id"),
        ({"output": "/nowhere/numbers.json"}, "output: expected a JSON file in a folder"),
        ({"output": "/proc/numbers.json"}, "output: expected a folder to write to"),
        ({"loss": "simpo", "max_length": 1}, "expected at least one pair"),
        ({"learning_rate": 1}, "unknown option '--learning_rate'"),
        ({"test_size": 3}, "unknown option '--test_size'"),
        ({"max_train_samples": 3}, "(did you mean '--max_samples'?)"),
        ({"max_samples": 0}, "max_samples: expected an integer above 0, got 0"),
        ({"loss": "dop"}, "did you mean 'dpo'"),
    ],
    ids=[
        "no reference",
        "no such reference",
        "output",
        "no folder to write to",
        "no pair left",
        "training",
        "split",
        "training rows",
        "no rows",
        "loss",
    ],
)
def test_refused(evaluate, capsys, options, message):
    assert evaluate(**options)[0] == 2
    assert message in capsys.readouterr().err
