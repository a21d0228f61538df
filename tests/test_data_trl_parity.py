"""Token for token what TRL's DPOTrainer feeds its model, on real chats and on plain text."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace

import pytest
import torch

from fastdaa.data import PairCollator, PairRows, load_pairs, tokenize_pairs

datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As some reasoning models do: the prompt alone ends with what the whole conversation lacks.
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n{% endif %}")
ROWS = 60


@pytest.fixture(scope="module")
def dpo_trainer():
    try:
        release = tuple(int(part) for part in version("trl").split(".")[:2])
    except PackageNotFoundError:
        pytest.skip("trl is not installed")
    if release < (1, 14):
        pytest.skip("the split point that we follow came with TRL 1.14")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.trainer import dpo_trainer
    return dpo_trainer


@pytest.fixture(scope="module")
def chats(shared_pairs_path):
    return load_pairs(shared_pairs_path, limit=ROWS)


@pytest.fixture(scope="module")
def base_tokenizer(chats):
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(
        (turn["content"] for row in chats for turn in row["prompt"] + row["chosen"]), trainer
    )
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    return words


def as_text(chats):
    """Prompts cut inside a word, so that tokens merge across the boundary."""
    rows = []
    for index, row in enumerate(chats):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        shared = "Answer: " + row["prompt"][-1]["content"]
        cut = 7 if index % 2 else 12
        ending = "<|im_end|>" if index % 3 == 0 else ""
        rows.append({
            "prompt": shared[:-2] if index % 4 else shared[:cut],
            "chosen": shared[-2:] + chosen + ending,
            "rejected": shared[-2:] + rejected,
        })  # fmt: skip
    return datasets.Dataset.from_list(rows)


def as_implicit(chats):
    return chats.map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns=["prompt"],
    )


def as_implicit_text(chats):
    return as_text(chats).map(
        lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")},
        remove_columns=["prompt"],
    )


def with_tools(chats):
    tools = ['[{"name": "search"}]' if index % 2 else None for index in range(len(chats))]
    options = [{"mood": "calm" if index % 3 else "loud"} for index in range(len(chats))]
    return chats.add_column("tools", tools).add_column("chat_template_kwargs", options)


def prepared_by_trl(module, dataset, tokenizer, max_length, mode):
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=mode)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    return module.DPOTrainer._prepare_dataset(trainer, dataset, tokenizer, args, "train")


CASES = [
    pytest.param(lambda chats: chats, CHATML, id="chats"),
    pytest.param(lambda chats: chats, THINKING, id="template that renders the prompt differently"),
    pytest.param(with_tools, "{{ tools }}{{ mood }}" + CHATML, id="tools and template options"),
    pytest.param(as_implicit, CHATML, id="implicit prompts"),
    pytest.param(as_text, None, id="text"),
    pytest.param(as_implicit_text, None, id="implicit prompts in text"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize(("make", "template"), CASES)
def test_tokens_are_those_of_trl(dpo_trainer, chats, base_tokenizer, make, template, mode) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base_tokenizer, eos_token="<|im_end|>", chat_template=template
    )
    dataset, max_length = make(chats), 400
    theirs = prepared_by_trl(dpo_trainer, dataset, tokenizer, max_length, mode)
    ours, report = tokenize_pairs(dataset, tokenizer, max_length=max_length, truncation_mode=mode)
    assert len(ours) == len(theirs) == report.kept
    assert report.truncated, "the limit must bite for this test to mean something"
    if mode == "keep_start":
        assert report.kept < len(dataset)
        assert list(ours["prompt_ids"]) == list(theirs["prompt_ids"])

    collate = dpo_trainer.DataCollatorForPreference(0, max_length, mode)
    expected = collate([theirs[index] for index in range(len(theirs))])
    rows = PairRows(ours)
    (pack,) = PairCollator("padded", 0)([rows[index] for index in range(len(rows))])["packs"]
    order = torch.arange(2 * len(rows)).view(2, -1).T.flatten()
    assert torch.equal(pack["input_ids"], expected["input_ids"][order])
    assert torch.equal(pack["attention_mask"], expected["attention_mask"][order])
    mask = expected["completion_mask"][order]
    assert torch.equal(pack["completion_lengths"], mask.sum(1))
    scored = mask[:, 1:].flatten().nonzero().flatten()
    width = mask.shape[1]
    assert torch.equal(pack["rows"], scored + scored // (width - 1))
