"""``fastdaa evaluate``: numbers of a finished model, compared with whole logits."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdaa.cli import main
from fastdaa.data import tokenize_pairs

WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A folder with the models ``start`` and ``end``, an adapter on the first, and 7 pairs."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("files")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    start, end = tiny_model(), tiny_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in end.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    start.save_pretrained(folder / "start")
    end.save_pretrained(folder / "end")
    start.name_or_path = str(folder / "start")
    get_peft_model(start, LoraConfig(r=2, task_type="CAUSAL_LM")).save_pretrained(folder / "lora")
    for name in ("start", "end", "lora"):
        tokenizer.save_pretrained(folder / name)

    def text():
        length = int(torch.randint(2, 7, (), generator=generator))
        picked = torch.randint(len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picked)

    rows = [{"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(7)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenized, _ = tokenize_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    return folder, tokenized


@pytest.fixture
def evaluate(files, tmp_path):
    folder, _ = files

    def run(model="end", **options):
        given = {"dataset": f"{folder}/pairs.jsonl", "output": f"{tmp_path}/numbers.json"}
        argv = ["evaluate", "--model", f"{folder}/{model}", "--use_cpu"]
        for name, value in {**given, **options}.items():
            argv += [f"--{name}", str(value)]
        code = main(argv)
        return code, json.loads((tmp_path / "numbers.json").read_text()) if code == 0 else None

    return run


@pytest.fixture(scope="module")
def expected(files, naive, tiny_model):
    """The numbers by hand, beta 0.5."""
    from transformers import AutoModelForCausalLM

    folder, data = files
    end, start = (
        naive(AutoModelForCausalLM.from_pretrained(folder / name).eval())
        for name in ("end", "start")
    )
    with torch.no_grad():
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


# 7 pairs: the last batch is smaller, and a mean over batches would be another number.
@pytest.mark.parametrize("batch", [3, 8])
def test_numbers_are_those_of_whole_logits(evaluate, files, expected, batch, capsys):
    code, facts = evaluate(
        ref_model=f"{files[0]}/start", beta=0.5, per_device_eval_batch_size=batch
    )
    assert code == 0 and facts["pairs"] == 7 and facts["objective"].startswith("dpo(beta=0.5")
    for name, value in expected.items():
        assert facts["metrics"][name] == pytest.approx(float(value), rel=1e-4), name
    printed = capsys.readouterr().out
    assert "7 pairs" in printed and f"{facts['metrics']['rewards/margins']:,.6g}" in printed


def test_of_an_adapter_the_base_is_the_reference(evaluate, files):
    code, facts = evaluate("lora")
    assert code == 0 and facts["ref_model"] == f"{files[0]}/start"
    assert facts["metrics"]["rewards/margins"] == 0  # a new adapter does nothing


def test_a_loss_without_a_reference(evaluate):
    code, facts = evaluate(loss="simpo")
    assert code == 0 and facts["ref_model"] is None and "kl/token" not in facts["metrics"]


def test_one_process_measures(evaluate, capsys, monkeypatch):
    monkeypatch.setattr("fastdaa.train.config.PreferenceConfig.world_size", 2)
    assert evaluate(ref_model="x/y")[0] == 2
    assert "expected one process, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "ref_model: expected --ref_model, the model that training began with"),
        ({"ref_model": "nowhere/at all"}, "ref_model: expected a path or a hub id"),
        ({"output": "/nowhere/numbers.json"}, "output: expected a JSON file in a folder"),
        ({"learning_rate": 1}, "unknown option '--learning_rate'"),
        ({"test_size": 3}, "unknown option '--test_size'"),
        ({"loss": "dop"}, "did you mean 'dpo'"),
    ],
    ids=["no reference", "no such reference", "output", "training", "split", "loss"],
)
def test_refused(evaluate, capsys, options, message):
    assert evaluate(**options)[0] == 2
    assert message in capsys.readouterr().err
