"""Training on labelled completions: numbers by hand, evaluation, resuming, several processes."""

from __future__ import annotations

import copy
import json
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, concatenate_datasets
from head_products import HeadProducts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from word_files import word_tokenizer

from fastdaa.cli import main
from fastdaa.data import DataError, load_unpaired, tokenize_unpaired
from fastdaa.data.mismatched import partners
from fastdaa.train import PreferenceConfig, PreferenceTrainer, UnpairedConfig, UnpairedTrainer
from fastdaa.train.callbacks import Curves, read_metrics

RATES = ("throughput/", "memory/", "packing/", "time")
FIELDS = ("prompt_ids", "completion_ids")


@pytest.fixture
def make_unpaired(tmp_path, tiny_model, shifted, unpaired):
    """``make_unpaired(model=None, data=None, **options)``, against the model ``shifted``."""

    def make(
        model=None,
        data=None,
        eval_dataset=None,
        ref_model=None,
        tokenizer=None,
        peft_config=None,
        **options,
    ):
        settings = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4, "max_steps": 1, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
            "train_sampling_strategy": "sequential", "use_cpu": True, "beta": 0.3, **options,
        }  # fmt: skip
        trainer = UnpairedTrainer(
            tiny_model() if model is None else model,
            shifted if ref_model is None else ref_model,
            UnpairedConfig(**settings),
            unpaired() if data is None else data,
            eval_dataset,
            tokenizer,
            peft_config,
        )
        trainer.remove_callback(Curves)
        return trainer

    return make


def logps_of(model, rows, shift=0):
    """Log-probs ``[B]`` of the completions of row ``i - shift`` after the prompts of row ``i``."""
    sums = []
    for number, row in enumerate(rows):
        prompt, completion = row["prompt_ids"], rows[number - shift]["completion_ids"]
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        sums.append(logps.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


def by_hand(model, ref, rows):
    """Log-ratios, labels and z0 of a batch."""
    with torch.no_grad():
        reference = logps_of(ref, rows)
        mismatched = (logps_of(model, rows, 1) - logps_of(ref, rows, 1)).mean().clamp(min=0)
    ratios = logps_of(model, rows) - reference
    return ratios, torch.tensor([row["label"] for row in rows]), mismatched


def shifted_copy(model):
    """Of the module's reference, to be trained."""
    return copy.deepcopy(model).requires_grad_(True)


def kto_by_hand(ratios, labels, z0, beta=0.3):
    signs = 2.0 * labels - 1
    return torch.sigmoid(-beta * signs * (ratios - z0)).mean()


PATHS = [
    {"layout": "packed"},
    {"layout": "padded"},
    {"layout": "packed", "tokens_per_pack": 16},
    {"layout": "packed", "impl": "recompute"},
    {"layout": "padded", "impl": "single_pass", "head_max_bytes": 60_000},
    {"layout": "packed", "gradient_checkpointing": True},
]


@pytest.mark.parametrize("options", PATHS, ids=lambda options: " ".join(map(str, options.values())))
def test_loss_gradients_and_metrics_are_the_naive_ones(
    make_unpaired, tiny_model, shifted, unpaired, options
):
    model, rows = tiny_model(), unpaired().to_list()[:4]
    policy = shifted_copy(shifted)
    ratios, labels, z0 = by_hand(policy, model, rows)
    assert z0 > 1e-2
    expected = kto_by_hand(ratios, labels, z0)
    expected.backward()
    trainer = make_unpaired(
        shifted_copy(shifted), ref_model=tiny_model(), optim="sgd", learning_rate=1.0,
        max_grad_norm=0.0, **options,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    row = trainer.state.log_history[0]
    rewards = 0.3 * ratios.detach()
    wanted = {
        "loss": expected, "kl": z0, "rewards/chosen": rewards[labels].mean(),
        "rewards/rejected": rewards[~labels].mean(), "kl/k1": ratios.mean(),
        "rewards/margins": rewards[labels].mean() - rewards[~labels].mean(),
    }  # fmt: skip
    for name, value in wanted.items():
        assert row[name] == pytest.approx(value.item(), abs=2e-5), name
    for (name, moved), parameter in zip(
        trainer.model.named_parameters(), policy.parameters(), strict=True
    ):
        torch.testing.assert_close(before[name] - moved, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_products(make_unpaired, tiny_model, unpaired, lora):
    """3U, or 2U of a frozen head; beside it 1U for the reference, and 1U each for the baseline."""
    options = {}
    if lora:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        options["peft_config"] = peft.LoraConfig(r=2, task_type="CAUSAL_LM")
    rows = [
        {"prompt_ids": [3] * (6 - i), "completion_ids": [4 + i] * (6 + i), "label": i > 1}
        for i in (0, 1, 2, 5)
    ]
    trainer = make_unpaired(data=Dataset.from_list(rows), log_exact_kl=False, **options)
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(range(4)))
    tokens = sum(batch["packs"][0]["counts"])
    assert tokens == sum(batch["kl_packs"][0]["counts"]) == 32
    weight = trainer.model.get_output_embeddings().weight
    trainer.model.train()
    with HeadProducts(weight.shape[0]) as products:
        trainer.compute_loss(trainer.model, batch).backward()
    assert products.flop / (2 * tokens * weight.numel()) == (2 if lora else 3) + 1 + 2


def test_the_first_baseline_is_exactly_0(make_unpaired, tiny_model):
    trainer = make_unpaired(ref_model=tiny_model())
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["kl"] == row["rewards/chosen"] == row["rewards/rejected"] == 0
    assert row["loss"] == 0.5


def test_a_batch_of_one_row_has_no_baseline(make_unpaired, shifted, tiny_model, unpaired):
    """Its own completion, whose log-ratio is above 0, is no mismatched one."""
    data = unpaired(24)
    ratios, _, _ = by_hand(shifted, tiny_model(), data.to_list())
    ordered = ratios.argsort().tolist()
    rows = data.select([*ordered[-4:], ordered[-5]])
    options = {"ref_model": tiny_model(), "max_steps": 2, "learning_rate": 0.0}
    trainer = make_unpaired(shifted_copy(shifted), rows, **options)
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "loss" in row)
    assert first["kl/k1"] > 0 and second["kl/k1"] == pytest.approx(ratios[ordered[-5]].item())
    assert second["kl/k1"] > 0 and second["kl"] == 0


def test_the_shift_of_bco_is_the_mean_of_rewards_before(make_unpaired, unpaired):
    """Of each label's mean, whatever their numbers are; the first batch is classified around 0."""
    trainer = make_unpaired(
        data=unpaired(12), loss_type="bco", max_steps=3, learning_rate=0.0,
        loss_kwargs={"undesirable_weight": 2.0},
    )  # fmt: skip
    model, ref = trainer.model, trainer.reference.model
    trainer.train()
    rows = unpaired(12).to_list()
    with torch.no_grad():
        rewards = 0.3 * (logps_of(model, rows) - logps_of(ref, rows))
    labels = torch.tensor([row["label"] for row in rows])
    logged = [row for row in trainer.state.log_history if "loss" in row]
    for step, row in enumerate(logged):
        seen, known = rewards[: 4 * step], labels[: 4 * step]
        delta = 0.5 * (seen[known].mean() + seen[~known].mean()) if step else torch.tensor(0.0)
        batch = slice(4 * step, 4 * step + 4)
        signs = 2.0 * labels[batch] - 1
        losses = -F.logsigmoid(signs * (rewards[batch] - delta)) * (1.5 - 0.5 * signs)
        assert row["delta"] == pytest.approx(delta.item(), abs=1e-5)
        assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-5)
    assert logged[-1]["delta"] != 0


@pytest.mark.parametrize("loss", ["kto", "bco", "apo_zero"])
def test_learns_what_is_desirable(make_unpaired, tiny_model, loss):
    rows = [
        {"prompt_ids": [3 + i, 4], "completion_ids": [7 if i % 2 else 9, 2], "label": bool(i % 2)}
        for i in range(16)
    ]
    trainer = make_unpaired(
        data=Dataset.from_list(rows), ref_model=tiny_model(), loss_type=loss, max_steps=40,
        per_device_train_batch_size=8, train_sampling_strategy="random",
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[-1]["rewards/margins"] > 2 > rows[0]["rewards/margins"]
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]
    trainer.save_model()
    trainer.create_model_card()
    folder = trainer.args.output_dir
    with open(f"{folder}/README.md") as card:
        text = card.read()
    assert f"- {loss}: " in text and "unpaired preferences" not in text
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(reloaded.lm_head.weight, trainer.model.lm_head.weight)


def test_evaluation_counts_every_row_once(make_unpaired, shifted, tiny_model, unpaired):
    """7 rows in batches of 4 and 3, each with its own z0."""
    data = unpaired(7, seed=2)
    trainer = make_unpaired(shifted_copy(shifted), eval_dataset=data, ref_model=tiny_model())
    metrics = trainer.evaluate()
    rows = data.to_list()
    parts = [by_hand(shifted, tiny_model(), part) for part in (rows[:4], rows[4:])]
    losses = [kto_by_hand(*part).item() for part in parts]
    ratios, labels = (torch.cat([part[i] for part in parts]).detach() for i in (0, 1))
    assert metrics["eval_loss"] == pytest.approx((4 * losses[0] + 3 * losses[1]) / 7, abs=1e-5)
    for side, which in (("chosen", labels), ("rejected", ~labels)):
        wanted = 0.3 * ratios[which].mean().item()
        assert metrics[f"eval_rewards/{side}"] == pytest.approx(wanted, abs=1e-5)
    zs = [part[2].item() for part in parts]
    assert metrics["eval_kl"] == pytest.approx((4 * zs[0] + 3 * zs[1]) / 7, abs=1e-5)
    known = {name.removeprefix("eval_") for name in metrics} - {"epoch", "model_preparation_time"}
    assert known == set(trainer.metric_names())


@pytest.mark.parametrize(
    ("loss", "own"), [("kto", {"kl"}), ("bco", {"delta"}), ("apo_zero", set())]
)
def test_rows_have_the_documented_names(make_unpaired, repository_root, loss, own):
    trainer = make_unpaired(loss_type=loss)
    trainer.train()
    text = Path(repository_root, "docs", "metrics.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE)
    documented = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    names = trainer.state.log_history[0].keys()
    names -= {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert "`throughput/examples_per_second`" in text
    assert names - documented == {"throughput/examples_per_second"}
    absent = {name for name in documented - names if not name.startswith("displacement/")}
    assert absent == {
        "rewards/accuracies",
        "weights/mean",
        "throughput/pairs_per_second",
        "aux_loss",
    } | ({"kl", "delta"} - own)


def test_evaluation_does_not_move_the_shift(make_unpaired, unpaired):
    options = {"data": unpaired(12), "loss_type": "bco", "max_steps": 3}
    plain = make_unpaired(**options)
    plain.train()
    often = make_unpaired(
        **options, eval_dataset=unpaired(5, seed=1), eval_strategy="steps", eval_steps=1
    )
    often.train()
    losses = [
        [row["loss"] for row in trainer.state.log_history if "loss" in row]
        for trainer in (plain, often)
    ]
    assert losses[0] == losses[1]
    # An evaluation has the rewards of the batch before it, as the next batch has.
    deltas = [
        [r[name] for r in often.state.log_history if name in r] for name in ("delta", "eval_delta")
    ]
    assert deltas[1][:2] == pytest.approx(deltas[0][1:], rel=1e-6) and len({*deltas[1]}) > 1


def logged(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def assert_agree(two, one, **tolerance):
    got, expected = (load_file(folder / "final.safetensors") for folder in (two, one))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], **tolerance)
    assert len(logged(two)) == len(logged(one)) > 0
    for row, wanted in zip(logged(two), logged(one), strict=True):
        for name, value in wanted.items():
            if not name.startswith(RATES):
                assert row[name] == pytest.approx(value, abs=1e-4), (row["step"], name)


@pytest.mark.parametrize(
    ("loss", "cached"), [("kto", False), ("bco", False), ("kto", True)], ids=str
)
def test_killed_and_continued_to_the_bit(run, tmp_path, unpaired, loss, cached):
    options = {
        "precompute_ref_log_probs": cached, "ref_cache_dir": str(tmp_path / "cache"),
        "pairs": unpaired(12).to_list(), "loss_type": loss, "beta": 0.5,
        "model": {"attention_dropout": 0.2}, "disable_dropout": False,
        "eval": unpaired(5, seed=1).to_list(), "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    assert run(tmp_path / "whole", **options) == 0
    end = {"step": 3, "number": signal.SIGKILL}
    assert run(tmp_path / "out", end=end, **options) == -signal.SIGKILL
    assert run(tmp_path / "out", resume=True, **options) == 0
    assert_agree(tmp_path / "out", tmp_path / "whole", rtol=0, atol=0)
    name = {"kto": "kl", "bco": "delta"}[loss]
    assert logged(tmp_path / "whole")[-1][name] != 0


def test_other_labels_are_other_data(run, tmp_path, unpaired):
    rows = unpaired(12).to_list()
    assert run(tmp_path, pairs=rows, end={"step": 3, "number": signal.SIGKILL}) < 0
    rows[0]["label"] = not rows[0]["label"]
    assert run(tmp_path, pairs=rows, resume=True) == 1


FSDP = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "kto"},
        {"loss_type": "bco"},
        {"loss_type": "kto", "tokens_per_pack": 20, "gradient_accumulation_steps": 2},
        {"loss_type": "kto", "lora": {"r": 2, "init_lora_weights": False}},
        {"loss_type": "kto", "precompute_ref_log_probs": True},
        {"loss_type": "kto", **FSDP},
        {"loss_type": "kto", "tokens_per_pack": 20, **FSDP},
    ],
    ids=["kto", "bco", "packs", "adapter", "cache", "fsdp2", "fsdp2 packs"],
)
def test_two_processes_are_one_with_twice_the_batch(run, run_two, tmp_path, unpaired, options):
    # Steps of SGD do not blow up rounding errors as those of Adam do.
    common = {
        "pairs": unpaired(24, seed=4).to_list(), "save_strategy": "no", "beta": 0.5,
        "optim": "sgd", "learning_rate": 0.3, "eval": unpaired(8, seed=1).to_list(),
        "eval_strategy": "epoch", "per_device_eval_batch_size": 4,
        "ref_cache_dir": str(tmp_path / "cache"), **options,
    }  # fmt: skip
    in_batch = options["loss_type"] == "kto" and "precompute_ref_log_probs" not in options
    groups = {"groups": 4} if in_batch else {}
    alone = {name: value for name, value in common.items() if name not in FSDP}
    assert run(tmp_path / "one", per_device_train_batch_size=8, **groups, **alone) == 0
    assert run_two(tmp_path / "two", **common) == [0, 0]
    assert_agree(tmp_path / "two", tmp_path / "one", rtol=1e-4, atol=1e-5)
    name = {"kto": "kl", "bco": "delta"}[options["loss_type"]]
    assert max(abs(row[name]) for row in logged(tmp_path / "two")) > 1e-3
    evaluations = [
        [row for row in read_metrics(tmp_path / folder / "metrics.jsonl") if "eval_loss" in row]
        for folder in ("one", "two")
    ]
    for row, wanted in zip(*reversed(evaluations), strict=True):
        for name in {"eval_loss", "eval_rewards/margins", "eval_kl/token"} & wanted.keys():
            assert row[name] == pytest.approx(wanted[name], abs=1e-4), name


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("loss", ["bco", "apo_zero"])
def test_cached_reference(make_unpaired, unpaired, tmp_path, caplog, loss, layout):
    options = {
        "loss_type": loss, "layout": layout, "max_steps": 4, "eval_dataset": unpaired(5, seed=1),
        "eval_strategy": "steps", "eval_steps": 2, "ref_cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    online = make_unpaired(**options)
    online.train()
    with caplog.at_level("INFO", "fastdaa"):
        cached = make_unpaired(precompute_ref_log_probs=True, **options)
        assert "0 of 8 examples" in caplog.text
        assert not hasattr(cached.reference, "model")
        # The same weights, another order, layout and loss.
        other = {"padded": "packed", "packed": "padded"}[layout]
        again = {"data": unpaired().select([*range(4, 8), *range(4)]), "layout": other}
        make_unpaired(precompute_ref_log_probs=True, **{**options, **again})
    assert "8 of 8 examples" in caplog.text and "5 of 5 examples" in caplog.text
    cached.train()
    for row, wanted in zip(cached.state.log_history, online.state.log_history, strict=True):
        for name in ("loss", "rewards/margins", "eval_loss", "eval_rewards/chosen"):
            if name in wanted:
                assert row[name] == pytest.approx(wanted[name], abs=1e-5), name
        assert not any(name.endswith("kl/token") for name in row)
    with pytest.raises(ValueError, match="no reference model is kept"):
        cached.evaluate(Dataset.from_list([*unpaired(3, seed=5)]))


def with_partners(data):
    """The rows with the completions that a run with cached log-probs gives their prompts."""
    rows = data.to_list()
    given = [rows[place]["completion_ids"] for place in partners(data)]
    return data.add_column("mismatched_ids", given)


@pytest.mark.parametrize("options", [*PATHS[:3], {"layout": "packed", "max_length": 12}], ids=str)
def test_cached_reference_of_kto(make_unpaired, unpaired, tiny_model, tmp_path, options):
    """The numbers of a run whose reference scores the same mismatched completions as it goes."""
    options = {
        "ref_model": tiny_model(), "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2,
        "train_sampling_strategy": "random", "seed": 3, "ref_cache_dir": str(tmp_path / "cache"),
        **options,
    }  # fmt: skip
    data = {"data": unpaired(10), "eval_dataset": unpaired(5, seed=1)}
    fixed = {name: with_partners(part) for name, part in data.items()}
    online = make_unpaired(**fixed, **options)
    online.train()
    cached = make_unpaired(precompute_ref_log_probs=True, **data, **options)
    assert not hasattr(cached.reference, "model")
    cached.train()
    names = ("loss", "kl", "rewards/margins", "eval_loss", "eval_kl", "eval_rewards/chosen")
    compared = 0
    for row, wanted in zip(cached.state.log_history, online.state.log_history, strict=True):
        for name in set(names) & wanted.keys():
            assert row[name] == pytest.approx(wanted[name], abs=1e-5), name
            compared += name.endswith("kl") and wanted[name] > 1e-3
    assert compared > 2
    with pytest.raises(ValueError, match="mismatched_ids, ref_mismatched_logps: with precompute"):
        cached.evaluate(Dataset.from_list([*unpaired(3, seed=5)]))


def test_the_cached_baseline_by_hand(make_unpaired, unpaired, shifted, tiny_model, tmp_path):
    """Of a batch of one row, too: its mismatched completion is another row's all the same."""
    data, ref = unpaired(9), tiny_model()
    rows = data.to_list()
    mismatched = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": rows[place]["completion_ids"]}
        for row, place in zip(rows, partners(data), strict=True)
    ]
    with torch.no_grad():
        ratios = logps_of(shifted, mismatched) - logps_of(ref, mismatched)
    order = ratios.argsort().tolist()
    ratios, data = ratios[order], data.select(order)
    trainer = make_unpaired(
        shifted_copy(shifted), data, ref_model=ref, learning_rate=0.0, max_steps=3,
        precompute_ref_log_probs=True, ref_cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    trainer.train()
    wanted = [ratios[start : start + 4].mean().clamp(min=0).item() for start in (0, 4, 8)]
    found = [row["kl"] for row in trainer.state.log_history if "loss" in row]
    assert found == pytest.approx(wanted, abs=1e-5) and found[2] > found[1] > 1e-2


def test_the_cache_of_mismatched_completions_is_shared(make_unpaired, unpaired, tmp_path, caplog):
    """By other orders, and mostly by larger data."""
    options = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    make_unpaired(data=unpaired(20), **options)
    for data in (
        unpaired(20).shuffle(seed=1),
        concatenate_datasets([unpaired(20), unpaired(1, 9)]),
    ):
        with caplog.at_level("INFO", "fastdaa"):
            make_unpaired(data=data, per_device_train_batch_size=5, layout="padded", **options)
    found = re.findall(r"train_dataset, mismatched: .* (\d+) of (\d+) examples", caplog.text)
    assert found[0] == ("20", "20") and found[1] == ("19", "21")


def test_a_run_with_a_cache_is_continued_with_it(run, tmp_path, unpaired):
    options = {"pairs": unpaired(12).to_list(), "ref_cache_dir": str(tmp_path / "cache")}
    end = {"step": 3, "number": signal.SIGKILL}
    folder = tmp_path / "out"
    assert run(folder, end=end, precompute_ref_log_probs=True, **options) == -signal.SIGKILL
    assert run(folder, resume=True, **options) == 1
    assert run(folder, resume=True, precompute_ref_log_probs=True, **options) == 0


def test_batches_that_were_found_have_a_baseline(make_unpaired, monkeypatch):
    """The Trainer would halve them down to lone examples."""
    trainer = make_unpaired(auto_find_batch_size=True)
    sizes = []

    def full(model, inputs, **_):
        sizes.append(len(inputs["row_ids"]))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    monkeypatch.setattr(trainer, "compute_loss", full)
    with pytest.raises(MemoryError, match="auto_find_batch_size: expected memory for at least 2"):
        trainer.train()
    assert sizes[0] == 4 and 1 not in sizes


def test_a_lone_example(make_unpaired, unpaired, tmp_path, caplog):
    """It has no mismatched completion in its batch."""

    def warnings(**options):
        caplog.clear()
        make_unpaired(**options)
        return [text for *_, text in caplog.record_tuples if "is alone" in text]

    (said,) = warnings(data=unpaired(9))
    assert said.startswith("train_dataset: 1 of 9 examples is alone in the last batch of an epoch")
    assert "z0 is 0" in said and "per_device_train_batch_size than 4" in said
    (said,) = warnings(eval_dataset=unpaired(5))
    assert said.startswith("eval_dataset: 1 of 5 examples is alone in the last batch, ")
    cached = {"precompute_ref_log_probs": True, "ref_cache_dir": str(tmp_path / "cache")}
    for options in ({"loss_type": "bco"}, {"dataloader_drop_last": True}, cached):
        assert not warnings(data=unpaired(9), **options)
    (said,) = warnings(eval_dataset=unpaired(1))
    assert said.endswith("z0 is 0")
    for options in ({"data": unpaired(1)}, {"eval_dataset": unpaired(1), **cached}):
        with pytest.raises(ValueError, match="_dataset: expected at least 2 examples for kto"):
            make_unpaired(**options)


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model, shifted):
    """A folder with two models and their tokenizer, labelled completions, and pairs."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in (("start", tiny_model()), ("end", shifted)):
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    rows = [
        {"prompt": f"w1 w{i}", "completion": f" w{i % 7} w{i % 3}", "label": i % 3 > 0}
        for i in range(12)
    ]
    pairs = [{"prompt": "w1", "chosen": f" w{i}", "rejected": " w19"} for i in range(12)]
    for name, written in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, written)))
    return folder


def command(files, *words, data="rows"):
    return main(
        [words[0], "--dataset", str(files / f"{data}.jsonl"), "--use_cpu", *map(str, words[1:])]
    )


def test_the_command_takes_what_the_data_are(files, tmp_path, capfd):
    """Of losses that are there for both; the table at the end says which it was."""
    options = ("--model", files / "start", "--max_steps", 2, "--per_device_train_batch_size", 4)
    (tmp_path / "run.yaml").write_text("loss: kto\nlogging_steps: 1\n")
    for data, said in (("rows", "on unpaired data"), ("pairs", "kto(")):
        folder = tmp_path / data
        given = ("--config", tmp_path / "run.yaml", "--output_dir", folder)
        assert command(files, "train", *options, *given, data=data) == 0
        printed = capfd.readouterr()
        assert said in printed.out and ("KL baseline z0" in printed.out) == (data == "rows")
        record = json.loads((folder / "fastdaa_run.json").read_text())
        assert record["facts"]["objective"].endswith("on unpaired data") == (data == "rows")
    assert "8 desirable and 4 undesirable completions" not in printed.err
    card = (tmp_path / "rows" / "README.md").read_text()
    assert "on the unpaired preferences (labelled completions) of `rows.jsonl`" in card
    assert "| KL baseline z0 (nats) |" in card


COMMANDS = [
    (("rows", "--loss", "dpo"), "rows with a label are unpaired data, for --loss kto, bco or"),
    (("rows", "--loss", "kto", "dpo"), "rows with a label are .*, without other losses"),
    (("pairs", "--loss", "apo_zero_unpaired"), "expected unpaired data, .* got a preference pair"),
    (("rows", "--loss", "kto", "--layout", "prefix_shared"), "layout: expected auto, packed or"),
    (("rows", "--loss", "kto", "--track_reward", "x.py:f", "--test_size", "2"), "track_reward, "),
    (("rows", "--loss", "kto", "--label_column", "liked"), "label_column: expected a column"),
]


@pytest.mark.parametrize(("words", "message"), COMMANDS, ids=[" ".join(w) for w, _ in COMMANDS])
def test_errors_of_the_command(files, tmp_path, capfd, words, message):
    data, *options = words
    given = ("--model", files / "start", "--output_dir", tmp_path / "out")
    assert command(files, "train", *given, *options, data=data) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert re.match(f"fastdaa train: error: .*{message}", line)
    assert not (tmp_path / "out").exists()


def test_evaluate(files, tmp_path, capfd, tiny_model, shifted):
    def numbers(*options):
        given = ("--model", files / "end", "--ref_model", files / "start", "--beta", 0.3)
        words = ("evaluate", *given, "--output", tmp_path / "numbers.json", *options)
        return command(files, *words), json.loads((tmp_path / "numbers.json").read_text())

    code, found = numbers("--loss", "kto", "--per_device_eval_batch_size", 12)
    assert code == 0 and found["examples"] == 12 and "12 examples" in capfd.readouterr().out
    rows, _ = tokenize_unpaired(load_unpaired(files / "rows.jsonl"), word_tokenizer())
    ratios, labels, z0 = by_hand(shifted, tiny_model(), rows.to_list())
    wanted = {
        "loss": kto_by_hand(ratios, labels, z0), "kl": z0, "kl/k1": ratios.mean(),
        "rewards/margins": 0.3 * (ratios[labels].mean() - ratios[~labels].mean()),
    }  # fmt: skip
    for name, value in wanted.items():
        assert found["metrics"][name] == pytest.approx(value.item(), abs=1e-5), name
    assert numbers("--loss", "bco")[0] == 2
    assert "loss_type: expected kto or apo_zero" in capfd.readouterr().err


REFUSED = [
    ({"layout": "prefix_shared"}, "layout: expected auto, packed or padded"),
    ({"per_device_train_batch_size": 1}, "per_device_train_batch_size: expected at least 2"),
    ({"per_device_eval_batch_size": 1}, "per_device_eval_batch_size: expected at least 2"),
    ({"loss_type": "dpo"}, "loss_type: expected one of kto, bco, apo_zero .* got 'dpo'"),
    ({"loss_type": ["kto", "bco"]}, "loss_type: .* without a mixture, got kto bco"),
    ({"loss_weights": [2.0]}, "loss_type: .* got kto with loss_weights"),
    ({"use_weighting": True}, "use_weighting: expected none with unpaired data"),
    ({"ld_alpha": 0.5}, "ld_alpha: expected none with unpaired data"),
    ({"label_smoothing": 0.1}, "no chosen loss uses"),
    ({"loss_kwargs": {"desirable_weight": -1}}, "desirable_weight of kto to be .* >= 0"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_refused_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        UnpairedConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def test_one_row_a_batch_is_enough_without_a_kl_baseline(tmp_path):
    for loss in ("bco", "apo_zero_unpaired"):
        config = UnpairedConfig(
            output_dir=str(tmp_path), use_cpu=True, loss_type=loss, per_device_train_batch_size=1
        )
        assert str(config.objective()).startswith(loss.removesuffix("_unpaired"))


def test_settings_and_trainers_belong_together(tiny_model, tmp_path, unpaired, pairs):
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    with pytest.raises(TypeError, match="expected a PreferenceConfig, got UnpairedConfig"):
        PreferenceTrainer(tiny_model(), args=UnpairedConfig(**options), train_dataset=pairs())
    with pytest.raises(TypeError, match="expected a UnpairedConfig, got PreferenceConfig"):
        UnpairedTrainer(tiny_model(), args=PreferenceConfig(**options), train_dataset=unpaired())


def test_data_of_one_label(make_unpaired, unpaired, caplog):
    one = unpaired(12).filter(lambda row: row["label"])
    with pytest.raises(ValueError, match="expected completions of both labels, got 8 desirable"):
        make_unpaired(data=one, loss_type="bco")
    with caplog.at_level("WARNING", "fastdaa"):
        trainer = make_unpaired(data=one)
    assert "expected completions of both labels" in caplog.text
    trainer.train()
    # Evaluation data may be anything.
    make_unpaired(eval_dataset=one, loss_type="bco").evaluate()


@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        ({}, "desirable_weight 0.5"),
        ({"desirable_weight": 0.6}, None),
        ({"undesirable_weight": 1.6}, None),
        ({"undesirable_weight": 0.0}, None),
        ({"desirable_weight": 0.25, "undesirable_weight": 0.25}, "desirable_weight 0.125"),
    ],
)
def test_the_papers_advice_about_weights(make_unpaired, unpaired, caplog, weights, advice):
    with caplog.at_level("INFO", "fastdaa"):
        make_unpaired(data=unpaired(12), loss_kwargs=weights)
    assert "8 desirable and 4 undesirable completions" in caplog.text
    assert ("is advised" in caplog.text) == (advice is not None)
    assert (
        advice is None or f"2 : 1, where 1 to 4/3 : 1 is advised, as with {advice}" in caplog.text
    )


def test_mismatched_sequences_stay_within_the_table_of_positions(tmp_path, tiny_model):
    """A long prompt meets a long completion, though no row is longer than the table."""
    rows = [
        {"prompt_ids": [3] * size, "completion_ids": [4] * (30 - size), "label": size > 9}
        for size in (2, 28, 3, 27)
    ]
    model = tiny_model("GPT2", max_position_embeddings=32)
    config = UnpairedConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none")
    trainer = UnpairedTrainer(model, args=config, train_dataset=Dataset.from_list(rows))
    assert trainer.data_collator.max_length == 32
    trainer.remove_callback(Curves)
    trainer.train()


def test_text_and_pairs(make_unpaired, tiny_model):
    rows = [
        {"prompt": "w1 w2", "completion": f" w{i}", "label": [True, "false"][i % 2]}
        for i in range(4)
    ]
    rows = [{**row, "label": str(row["label"])} for row in rows]
    trainer = make_unpaired(data=Dataset.from_list(rows), tokenizer=word_tokenizer())
    assert [row["label"] for row in trainer.train_dataset] == [True, False, True, False]
    paired = Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 4)
    with pytest.raises(DataError, match=r"expected unpaired data.*got a preference pair"):
        make_unpaired(data=paired, tokenizer=word_tokenizer())
    with pytest.raises(ValueError, match="processing_class"):
        make_unpaired(data=Dataset.from_list(rows))
