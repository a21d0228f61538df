"""What cannot be trained is refused with one clear message, before any work."""

from __future__ import annotations

import copy
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerFast

from fastdaa.train import PreferenceConfig, PreferenceTrainer
from fastdaa.train.reward import RewardTrainer
from fastdaa.train.sft import SftTrainer
from fastdaa.train.sharding import check_one_device, check_parallelism

TEXT = {"prompt": "a", "chosen": " b", "rejected": " c"}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")


DATASETS = {
    "list": (lambda: [TEXT], TypeError, "train_dataset: expected a datasets.Dataset .* got list"),
    "iterable": (
        lambda: Dataset.from_list([TEXT]).to_iterable_dataset(),
        TypeError,
        "train_dataset: expected .* with a length, got IterableDataset",
    ),
    "splits": (
        lambda: DatasetDict(train=Dataset.from_list([TEXT])),
        TypeError,
        "train_dataset: expected a datasets.Dataset .* got DatasetDict",
    ),
    "torch": (
        lambda: torch.utils.data.TensorDataset(torch.arange(3)),
        TypeError,
        "train_dataset: expected .* got TensorDataset",
    ),
    "no tokenizer": (
        lambda: Dataset.from_list([TEXT]),
        ValueError,
        "train_dataset: expected processing_class, a tokenizer for its text, got None",
    ),
    "empty tokens": (
        lambda: Dataset.from_list([{f"{k}_ids": [3] for k in TEXT}]).select([]),
        ValueError,
        "train_dataset: expected at least one pair, got none",
    ),
    "unknown token": (
        lambda: Dataset.from_list([{f"{k}_ids": [3, 61] for k in TEXT}]),
        ValueError,
        "train_dataset: expected token ids below 61, .* got 61 in prompt_ids",
    ),
    "negative token": (
        lambda: Dataset.from_list([{f"{k}_ids": [3, -100] for k in TEXT}]),
        ValueError,
        "expected token ids below 61, .* got -100",
    ),
    "words": (
        lambda: Dataset.from_list([{f"{k}_ids": ["a"] for k in TEXT}]),
        ValueError,
        "train_dataset: column prompt_ids: expected a list of integers .* got list<.*: string>",
    ),
    "fractions": (
        lambda: Dataset.from_list([{f"{k}_ids": [3.5] for k in TEXT}]),
        ValueError,
        "column prompt_ids: expected a list of integers in every row, got list<.*: double>",
    ),
    "missing list": (
        lambda: Dataset.from_list([{f"{k}_ids": ids for k in TEXT} for ids in ([3], None)]),
        ValueError,
        "column prompt_ids: expected a list of integers in every row, got null in some",
    ),
    "missing token": (
        lambda: Dataset.from_list([{f"{k}_ids": [3, None] for k in TEXT}]),
        ValueError,
        "column prompt_ids: expected a list of integers in every row, got null in some",
    ),
}


def test_log_probs_that_no_loss_reads(make_trainer, caplog):
    make_trainer(loss_type="simpo", precompute_ref_log_probs=True)
    assert "precompute_ref_log_probs: without effect, since simpo(" in caplog.text


def test_lists_that_are_all_empty(make_trainer, losses_of):
    row = {"prompt_ids": [], "chosen_ids": [3, 4], "rejected_ids": [5]}
    trainer = make_trainer(data=Dataset.from_list([row] * 4))
    trainer.train()
    assert losses_of(trainer) == [pytest.approx(0.6931472, abs=1e-6)]


@pytest.mark.parametrize("case", DATASETS.values(), ids=DATASETS)
def test_datasets(make_trainer, case):
    build, kind, message = case
    with pytest.raises(kind, match=message):
        make_trainer(data=build())


def test_evaluation_sets_are_named(make_trainer, pairs):
    with pytest.raises(
        TypeError, match=r"eval_dataset b: expected a datasets\.Dataset .* got list"
    ):
        make_trainer(eval_dataset={"a": pairs(2), "b": []})
    with pytest.raises(ValueError, match="eval_dataset a: expected processing_class"):
        make_trainer(eval_dataset={"a": Dataset.from_list([TEXT])})


def test_nothing_left_after_filtering(make_trainer, tokenizer):
    data = Dataset.from_list([{**TEXT, "prompt": "a b c a b c"}])
    with pytest.raises(ValueError, match="expected at least one pair, got none \\("):
        make_trainer(data=data, processing_class=tokenizer, max_length=4)


class Headless(transformers.LlamaForCausalLM):
    def get_output_embeddings(self):
        return None


MODELS = {
    "number": (
        lambda model: 3,
        TypeError,
        "model: expected a path, hub id or torch module, got int",
    ),
    "module": (
        lambda model: torch.nn.Linear(2, 2),
        TypeError,
        "model: expected a transformers model, got Linear",
    ),
    "no head": (
        lambda model: Headless(model.config),
        ValueError,
        "Headless: expected a causal LM with output embeddings, got None",
    ),
    "nothing to train": (
        lambda model: model.requires_grad_(False),
        ValueError,
        "model: expected parameters to train, got none",
    ),
    "other logits": (
        lambda model: scaled(model),
        ValueError,
        "does something to its logits that fastdaa does not know",
    ),
    "sees what it predicts": (
        lambda model: bidirectional(model),
        ValueError,
        "expected a causal model, got hidden states that change by",
    ),
}


def scaled(model):
    forward = model.forward

    def changed(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 1.5
        return outputs

    model.forward = changed
    return model


def bidirectional(model):
    model.config.is_causal = False
    return model


@pytest.mark.parametrize("case", MODELS.values(), ids=MODELS)
def test_models(make_trainer, tiny_model, case):
    build, kind, message = case
    with pytest.raises(kind, match=message):
        make_trainer(model=build(tiny_model()))


def test_references(make_trainer, tiny_model):
    with pytest.raises(TypeError, match="ref_model: expected a path, hub id"):
        make_trainer(ref_model=3)
    with pytest.raises(ValueError, match=r"ref_model: expected a vocabulary of 61 .* got 64"):
        make_trainer(ref_model=tiny_model(vocab_size=64))
    trainer = make_trainer(ref_model=tiny_model(vocab_size=64), log_exact_kl=False)
    trainer.train()
    assert "kl/token" not in trainer.state.log_history[0]


def test_a_reference_that_is_part_of_the_policy(make_trainer, tiny_model):
    peft = pytest.importorskip("peft")
    base = tiny_model()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    policy = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match="ref_model: expected a model with weights of its own"):
        make_trainer(model=policy, ref_model=base)
    assert any(p.requires_grad for p in policy.parameters())


def test_adapters(make_trainer, tiny_model):
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PROMPT_TUNING, which puts virtual tokens"):
        make_trainer(peft_config=prompt)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = tiny_model()
    model.add_adapter(config)
    with pytest.raises(ValueError, match=r"expected adapters in a peft\.PeftModel"):
        make_trainer(model=model)


def test_several_devices_in_one_process():
    with pytest.raises(ValueError, match=r"expected one process a GPU, got .*DataParallel over 2"):
        check_one_device(SimpleNamespace(n_gpu=2))
    check_one_device(SimpleNamespace(n_gpu=1))


_ONE_LAYER = transformers.LlamaConfig(
    vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
)


def parallel(*, zero=None, fsdp=None, settings=None, gather=None, **sizes):
    """What the check looks at, of a trainer under some parallelism."""
    gathers = {} if gather is None else {"stage3_gather_16bit_weights_on_model_save": gather}
    config = {"zero_optimization": {"stage": zero, **gathers}}
    state = SimpleNamespace(
        deepspeed_plugin=SimpleNamespace(zero_stage=zero, deepspeed_config=config),
        fsdp_plugin=SimpleNamespace(fsdp_version=fsdp),
    )
    config = SimpleNamespace(**sizes) if sizes else None
    accelerator = SimpleNamespace(state=state, parallelism_config=config)
    return SimpleNamespace(
        args=SimpleNamespace(
            **{"torch_compile": False, "auto_find_batch_size": False, **(settings or {})}
        ),
        accelerator=accelerator,
        model=transformers.LlamaForCausalLM(_ONE_LAYER),
        is_deepspeed_enabled=zero is not None,
        is_fsdp_enabled=fsdp is not None,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero": 3, "settings": {"torch_compile": True}}, "torch_compile: expected False with D"),
        (
            {"zero": 3, "settings": {"auto_find_batch_size": True}},
            "auto_find_batch_size: expected False with DeepSpeed ZeRO-3",
        ),
        (
            {"zero": 3, "gather": False},
            "gather_16bit_weights_on_model_save to be true, or left out",
        ),
        ({"fsdp": 1}, "FSDP: expected version 2"),
        ({"tp_size": 2}, "tp_size: expected 1, got 2"),
        ({"cp_size": 4}, "cp_size: expected 1, got 4"),
    ],
    ids=[
        "ZeRO-3 compiled",
        "ZeRO-3 and batch sizes",
        "ZeRO-3 without a model",
        "FSDP1",
        "tensor parallel",
        "context parallel",
    ],
)
def test_parallelism(options, message):
    with pytest.raises(ValueError, match=message):
        check_parallelism(parallel(**options))


@pytest.mark.parametrize(
    "options",
    [{}, {"zero": 2}, {"zero": 3, "gather": True}, {"fsdp": 2}, {"dp_replicate_size": 2}],
    ids=str,
)
def test_parallelism_that_works(options):
    check_parallelism(parallel(**options))


def test_zero_3_saves_a_model_unless_told_otherwise():
    trainer = parallel(zero=3)
    check_parallelism(trainer)
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True


SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
UNSUPPORTED = {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(
            **SMALL, hidden_size=16, n_layer=2, n_head=2, hidden_dropout=0.1, attention_dropout=0.1
        )
    ),
    "gptj": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(
            **SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64, rotary_dim=4, attn_pdrop=0.1
        )
    ),
}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_models_that_cannot_take_packed_rows(
    make_trainer, naive, pairs, caplog, capfd, tmp_path, family
):
    torch.manual_seed(0)
    data, model = pairs(4), UNSUPPORTED[family]().eval()
    start = copy.deepcopy(model)
    with pytest.raises(ValueError, match="layout: expected 'padded' or 'auto', got 'packed' for "):
        make_trainer(model=copy.deepcopy(model), layout="packed")
    with caplog.at_level(logging.INFO, logger="fastdaa"):
        trainer = make_trainer(model=model, data=data, max_steps=2)
    assert trainer.layout == "padded"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and lines[0].startswith("layout: padded, because of ")
    assert type(model).__name__ in lines[0]
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(0.6931472, abs=1e-6) and row["kl/token"] == 0.0
    with torch.no_grad():
        chosen, _ = naive(start).logps(data)
    assert row["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert trainer.state.log_history[1]["loss"] != row["loss"]
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: v for k, v in saved.items() if "drop" in k} == {
        k: v for k, v in start.config.to_dict().items() if "drop" in k
    }


def test_a_reference_that_cannot_take_packed_rows(make_trainer):
    trainer = make_trainer(ref_model=UNSUPPORTED["bloom"]())
    assert trainer.layout == "padded" and "Bloom" in trainer.layout_reason
    trainer.train()


def test_falcon_reads_dropout_from_its_configuration(make_trainer, pairs):
    """Where the number lies in the configuration, it is 0 while the model is trained."""
    config = transformers.FalconConfig(
        **SMALL, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, alibi=False,
        hidden_dropout=0.3, attention_dropout=0.3,
    )  # fmt: skip
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            seen.append((model.config.hidden_dropout, model.config.attention_dropout))

    trainer = make_trainer(
        model=transformers.FalconForCausalLM(config), data=pairs(4), callbacks=[Watch()]
    )
    trainer.train()
    assert seen == [(0.0, 0.0)]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert (config.hidden_dropout, config.attention_dropout) == (0.3, 0.3)
    kept = make_trainer(
        model=transformers.FalconForCausalLM(config), data=pairs(4), disable_dropout=False
    )
    kept.train()
    assert kept.state.log_history[0]["loss"] != pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("trainer", [PreferenceTrainer, SftTrainer, RewardTrainer])
def test_settings_of_another_trainer(trainer, tmp_path):
    """The commonest slip of who comes from TRL: its configuration for our trainer."""
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    kind = trainer.__name__.replace("Trainer", "Config")
    with pytest.raises(
        TypeError, match=rf"args: expected a {kind}, got TrainingArguments; .*{kind}"
    ):
        trainer("no/such/model", args=args)


def test_settings_are_checked_first(tmp_path):
    with pytest.raises(ValueError, match="tokens_per_pack: expected None"):
        PreferenceTrainer(
            "no/such/model",
            args=PreferenceConfig(
                output_dir=str(tmp_path), use_cpu=True, loss_type=["aot"], tokens_per_pack=9
            ),
        )


def test_no_dataset_to_train_on(make_trainer, tmp_path, tiny_model):
    trainer = PreferenceTrainer(
        tiny_model(), args=PreferenceConfig(output_dir=str(tmp_path), use_cpu=True)
    )
    with pytest.raises(ValueError, match="training requires a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="evaluation requires an eval_dataset"):
        trainer.evaluate()


def test_a_model_given_by_name_brings_its_tokenizer(tokenizer, make_trainer, tiny_model, tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    data = Dataset.from_list([TEXT])
    with pytest.raises(OSError, match=r"model: expected a tokenizer in '.*model', got:"):
        make_trainer(str(folder), data)
    tokenizer.save_pretrained(folder)
    trainer = make_trainer(str(folder), data)
    assert trainer.processing_class.get_vocab() == tokenizer.get_vocab()
    assert make_trainer(str(folder)).processing_class is None  # of tokens, none is needed
