"""What the drop-in trainer refuses, and which versions of TRL."""

from __future__ import annotations

import functools
import importlib.metadata
import sys

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")


NAMES = ("DPO", "KTO", "SFT", "GRPO", "RLOO")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("setting", ["use_liger_kernel", "torch_compile"])
def test_settings_that_are_refused(make_trainer, drop_in, name, setting):
    message = (
        f"{setting}: expected False with fastdaa.drop_in.trl.{name}Trainer, got True; "
        f"trl.{name}Trainer serves it"
    )
    trainer_class = getattr(drop_in, f"{name}Trainer")
    with pytest.raises(ValueError, match=message):
        make_trainer(name, trainer_class, settings={setting: True})


def test_losses_of_sft_that_trl_takes_from_the_logits_are_refused(make_trainer, drop_in):
    make = functools.partial(make_trainer, "SFT", drop_in.SFTTrainer)
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0 with .* got 0\.1"):
        make(settings={"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match=r"compute_loss_func: expected None with .* a function"):
        make(compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.loss)
    dft = {"label_smoothing_factor": 0.1, "loss_type": "dft"}  # which does not read it
    make(settings=dft)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_trl_are_put_back_after_an_error(trl, make_trainer, drop_in, name):
    module = importlib.import_module(f"trl.trainer.{name.lower()}_trainer")
    names = ("add_fused_lm_head", "hash_module")
    before = [getattr(module, each, None) for each in names]
    trainer_class = getattr(drop_in, f"{name}Trainer")
    with pytest.raises(ValueError, match="train_dataset"):
        make_trainer(name, trainer_class, train_dataset=None)
    assert [getattr(module, each, None) for each in names] == before
    assert before[0].__module__ == "trl.trainer.utils"


def test_a_processor_is_refused(make_dpo, ours, tokenizer):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, patch_size=14)
    with pytest.raises(ValueError, match="processing_class: expected a tokenizer"):
        make_dpo(ours, processing_class=processor)


@pytest.mark.parametrize("budget", [0.5e9, True], ids=str)
def test_a_budget_that_is_no_integer_is_refused(make_dpo, ours, budget):
    with pytest.raises(TypeError, match="head_max_bytes: expected an integer or None, got"):
        make_dpo(ours, head_max_bytes=budget)


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_of_nothing_is_refused_at_construction(make_dpo, ours, budget):
    with pytest.raises(ValueError, match="head_max_bytes: expected a finite number above 0, got"):
        make_dpo(ours, head_max_bytes=budget)


@pytest.mark.parametrize(
    "changed",
    [("is_fsdp_enabled", r"fsdp: expected FSDP2 .* got FSDP1"), ("_is_vlm", "processing_class: ")],
    ids=lambda c: c[0],
)
def test_what_is_known_late_is_refused_too(ours, changed):
    from types import SimpleNamespace

    from fastdaa.drop_in.trl.refusals import check_trainer

    plugin = SimpleNamespace(fsdp_version=1)
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin), parallelism_config=None
    )
    state = {
        "_is_vlm": False, "is_fsdp_enabled": False, "is_deepspeed_enabled": False,
        "accelerator": accelerator,
    }  # fmt: skip
    check_trainer("DPOTrainer", SimpleNamespace(**state))
    name, message = changed
    with pytest.raises(ValueError, match=message):
        check_trainer("DPOTrainer", SimpleNamespace(**{**state, name: True}))
    plugin.fsdp_version = 2
    check_trainer("DPOTrainer", SimpleNamespace(**{**state, "is_fsdp_enabled": True}))


def test_parallelism_is_refused(ours):
    from types import SimpleNamespace

    from fastdaa.drop_in.trl.refusals import check_trainer

    accelerator = SimpleNamespace(
        state=None,
        parallelism_config=SimpleNamespace(tp_size=1, cp_size=2, sp_size=1),
    )
    trainer = SimpleNamespace(
        _is_vlm=False, is_fsdp_enabled=False, is_deepspeed_enabled=False, accelerator=accelerator
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"cp_size: expected 1 with .* got 2"):
        check_trainer("KTOTrainer", trainer)


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
