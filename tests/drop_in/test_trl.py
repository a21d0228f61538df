"""The drop-in trainer gives TRL's losses, metrics and gradients, step by step."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 3
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch")


@pytest.fixture(scope="module")
def ours(trl):
    from fastdaa.drop_in.trl import DPOTrainer

    return DPOTrainer


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = model.named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def train(make_dpo, trainer_class, **options):
    """A trained trainer and its gradients."""
    gradients = Gradients()
    torch.manual_seed(0)  # a new adapter is random
    trainer = make_dpo(trainer_class, callbacks=[gradients], **options)
    trainer.train()
    return trainer, gradients.steps


def compare(make_dpo, trl, ours, make_options):
    """Train both on the same; ``make_options`` builds what a trainer may change, anew for each."""
    expected, expected_gradients = train(make_dpo, trl.DPOTrainer, **make_options())
    trainer, gradients = train(make_dpo, ours, **make_options())
    assert len(gradients) == len(expected_gradients) == STEPS
    for step, wanted in zip(gradients, expected_gradients, strict=True):
        assert step.keys() == wanted.keys()
        for name, gradient in step.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5, msg=name)
    compare_rows(trainer.state.log_history, expected.state.log_history)
    return trainer


def compare_rows(rows, expected_rows):
    assert len(rows) == len(expected_rows)
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - set(TIMES):
            if not name.endswith(("_runtime", "_per_second")):
                assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=2e-5), name


@pytest.fixture
def saved(new_model, tmp_path):
    """A model that TRL can load its reference from."""

    def build(**options):
        model = new_model(**options)
        model.save_pretrained(tmp_path / "model")
        model.config._name_or_path = str(tmp_path / "model")
        return model

    return build


LOSSES = {
    "sigmoid": {},
    "ipo": {"loss_type": "ipo"},
    "hinge": {"loss_type": "hinge"},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "aot": {"loss_type": "aot"},
    "ld-dpo": {"ld_alpha": 0.4},
    "f-divergence": {"f_divergence_type": "js_divergence"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_full_training_is_that_of_trl(make_dpo, trl, ours, saved, loss):
    trainer = compare(make_dpo, trl, ours, lambda: {"model": saved(), "settings": LOSSES[loss]})
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]
    assert margins[0] == 0 and abs(margins[-1]) > 1e-2


OPTIONS = {
    "precomputed": {"precompute_ref_log_probs": True},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "truncated": {"max_length": 8, "truncation_mode": "keep_start"},
    "synchronised": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_trl_work(make_dpo, trl, ours, saved, options):
    compare(make_dpo, trl, ours, lambda: {"model": saved(), "settings": OPTIONS[options]})


def test_another_reference_model(make_dpo, trl, ours, new_model):
    trainer = compare(make_dpo, trl, ours, lambda: {"ref_model": new_model(seed=1)})
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 1e-2


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 8}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
    ids=["softcap", "scale", "tied"],
)
def test_heads_of_other_families(make_dpo, trl, ours, saved, family, config):
    compare(make_dpo, trl, ours, lambda: {"model": saved(family=family, **config)})


@pytest.mark.parametrize("precompute", [False, True], ids=["online", "precomputed"])
def test_new_adapter(make_dpo, trl, ours, precompute):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        lora = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"],
            init_lora_weights=False,
        )  # fmt: skip
        return {"peft_config": lora, "settings": {"precompute_ref_log_probs": precompute}}

    trainer = compare(make_dpo, trl, ours, options)
    # The adapter starts at random numbers, so the reference is the model without it.
    assert abs(trainer.state.log_history[0]["rewards/margins"]) > 1e-3


def test_adapter_trained_further(make_dpo, trl, ours, new_model):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def options():
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["v_proj"], init_lora_weights=False
        )
        torch.manual_seed(3)
        return {"model": peft.get_peft_model(new_model(), config)}

    trainer = compare(make_dpo, trl, ours, options)
    assert "ref" in trainer.model.peft_config
    assert trainer.state.log_history[0]["rewards/margins"] == 0


def test_evaluation(make_dpo, trl, ours, saved, texts):
    rows = []
    for trainer_class in (trl.DPOTrainer, ours):
        trainer = make_dpo(trainer_class, model=saved(), eval_dataset=texts.select(range(6)))
        trainer.train()
        rows.append(trainer.evaluate())
    compare_rows(rows[1:], rows[:1])


def test_precomputed_log_probs_of_trls_head_are_not_read(make_dpo, trl, ours, saved):
    """TRL's cache of them is named after the data and this hash."""
    settings = {"precompute_ref_log_probs": True}
    names = [
        make_dpo(trainer_class, model=saved(), settings=settings)._precompute_model_hash
        for trainer_class in (ours, ours, trl.DPOTrainer)
    ]
    assert names == [f"fastdaa-{names[2]}", f"fastdaa-{names[2]}", names[2]]


def test_the_head_is_that_of_fastdaa_and_trl_keeps_its_own(make_dpo, trl, ours, saved, monkeypatch):
    from trl.trainer import dpo_trainer, utils

    from fastdaa.drop_in.trl import head

    scored = []
    real = head.head_logps_and_stats
    monkeypatch.setattr(
        head, "head_logps_and_stats",
        lambda *args, **options: scored.append(args[0].requires_grad) or real(*args, **options),
    )  # fmt: skip
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)  # TRL's head would fail
    make_dpo(ours, model=saved(), settings={"max_steps": 2}).train()
    assert scored == [True, False, True, False]
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head


def test_trl_keeps_its_own_head_after_an_error(make_dpo, trl, ours):
    from trl.trainer import dpo_trainer, utils

    with pytest.raises(ValueError, match="train_dataset"):
        make_dpo(ours, train_dataset=None)
    assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
    assert dpo_trainer.hash_module is utils.hash_module


def test_other_calls_of_the_model_are_as_before(make_dpo, ours, saved):
    model = saved()
    ids = torch.tensor([[5, 9, 3, 7]])
    before = model(input_ids=ids, labels=ids)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False)
    make_dpo(ours, model=model)
    after = model.eval()(input_ids=ids, labels=ids)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), generated)
    parameters = inspect.signature(model.forward).parameters
    assert {"input_ids", "labels"} <= parameters.keys()


def test_nothing_scored_gives_a_gradient_of_zero(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    model = new_model()
    add_head(model, ("log_probs", "entropy", "mean_logits", "is_top1"))
    ids = torch.tensor([[5, 9, 3]])
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.loss == 0 and not model.lm_head.weight.grad.any()


def test_outputs_of_the_head_are_those_of_the_logits(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    model = new_model().double()
    ids = torch.tensor([[5, 9, 3, 8], [1, 7, 7, 0]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0], [1, 0, 0, 1]]) == 1, -100)
    logits = model(input_ids=ids).logits[:, :-1]
    add_head(model, ("log_probs", "entropy", "mean_logits", "is_top1"))
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    scored = labels[:, 1:] != -100
    expected = logits.log_softmax(-1)
    chosen = expected.gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(out.log_probs, chosen * scored)
    entropy = -(expected.exp() * expected).sum(-1)
    torch.testing.assert_close(out.entropy, entropy * scored, check_dtype=False)
    torch.testing.assert_close(out.mean_logits, logits.mean(-1) * scored, check_dtype=False)
    assert torch.equal(out.is_top1, (logits.argmax(-1) == ids[:, 1:]) & scored)
    torch.testing.assert_close(out.loss, -chosen[scored].mean())
    assert out.label_mask.equal(scored)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_weighting": True}, "use_weighting: expected False with fastdaa"),
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False with fastdaa"),
        ({"torch_compile": True}, "torch_compile: expected False with fastdaa"),
    ],
    ids=["weighting", "liger", "compile"],
)
def test_settings_that_are_refused(make_dpo, ours, settings, message):
    with pytest.raises(ValueError, match=message):
        make_dpo(ours, settings=settings)


def test_a_weighted_auxiliary_loss_is_refused_and_none_is_served(make_dpo, trl, ours, saved):
    sizes = {"family": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0 for a mixture"):
        make_dpo(ours, model=saved(**sizes))
    compare(
        make_dpo, trl, ours,
        lambda: {"model": saved(**sizes), "settings": {"router_aux_loss_coef": 0.0}},
    )  # fmt: skip


def test_a_processor_is_refused(make_dpo, ours, tokenizer):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14)
    with pytest.raises(ValueError, match="processing_class: expected a tokenizer"):
        make_dpo(ours, processing_class=processor)


@pytest.mark.parametrize(
    "changed",
    [("is_fsdp_enabled", "fsdp: "), ("_is_vlm", "processing_class: ")],
    ids=lambda c: c[0],
)
def test_what_is_known_late_is_refused_too(ours, changed):
    from types import SimpleNamespace

    from fastdaa.drop_in.trl.trainer import _check_trainer

    accelerator = SimpleNamespace(state=None, parallelism_config=None)
    state = {
        "_is_vlm": False, "aux_loss_enabled": False, "is_fsdp_enabled": False,
        "is_deepspeed_enabled": False, "accelerator": accelerator,
    }  # fmt: skip
    _check_trainer(SimpleNamespace(**state))
    name, message = changed
    with pytest.raises(ValueError, match=message):
        _check_trainer(SimpleNamespace(**{**state, name: True}))


def test_parallelism_is_refused(ours):
    from types import SimpleNamespace

    from fastdaa.drop_in.trl.trainer import _check_trainer

    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3)),
        parallelism_config=SimpleNamespace(tp_size=1, cp_size=2, sp_size=1),
    )
    trainer = SimpleNamespace(
        _is_vlm=False, aux_loss_enabled=False, is_fsdp_enabled=False, is_deepspeed_enabled=False,
        accelerator=accelerator,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cp_size: expected 1 with .* got 2"):
        _check_trainer(trainer)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"deepspeed: expected ZeRO stage 0, 1 or 2 .* got 3"):
        _check_trainer(trainer)


def test_a_trl_that_does_not_ask_for_a_head_is_noticed(trl, ours, monkeypatch):
    monkeypatch.setattr(trl.DPOTrainer, "__init__", lambda self, model=None, args=None: None)
    with pytest.raises(RuntimeError, match=r"expected trl\.DPOTrainer to call add_fused_lm_head"):
        ours()


def import_anew(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastdaa.drop_in.trl", raising=False)
    importlib.import_module("fastdaa.drop_in.trl")


@pytest.mark.parametrize("installed", ["1.15.0", "1.17.0", "2.0.0", "0.29.1", "1.17.0.dev0", "one"])
def test_other_versions_are_refused(monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    with pytest.raises(ImportError, match=rf"expected trl >= 1.16, < 1.17, got {installed}"):
        import_anew(monkeypatch)


def test_no_trl_is_said(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"got none; pip install 'trl>=1.16,<1.17'"):
        import_anew(monkeypatch)


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.3", "1.16"])
def test_versions_that_fit(ours, monkeypatch, installed):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: installed)
    import_anew(monkeypatch)


def test_a_head_with_more_outputs_is_refused(trl, new_model):
    from fastdaa.drop_in.trl.head import add_head

    with pytest.raises(ValueError, match="outputs: expected some of log_probs"):
        add_head(copy.deepcopy(new_model()), ("log_probs", "log_sum_sq_probs"))


def test_the_block_of_the_page_runs(trl, new_model, tokenizer, tmp_path, monkeypatch, texts):
    page = Path(__file__).resolve().parents[2] / "docs" / "drop_in.md"
    (block,) = re.findall(r"^```python no-run: TRL[^\n]*\n(.*?)^```", page.read_text(), re.M | re.S)
    new_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts.to_json(tmp_path / "pairs.jsonl")
    # What the page leaves to TRL wants a GPU.
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    monkeypatch.setattr(trl, "DPOConfig", functools.partial(trl.DPOConfig, **settings))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(page), "exec"), done := {})
    assert done["trainer"].state.global_step == 1
