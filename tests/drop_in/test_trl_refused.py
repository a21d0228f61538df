"""What the drop-in trainer refuses, and which versions of TRL."""

from __future__ import annotations

import importlib.metadata
import sys

import pytest
from drop_in.trl_runs import compare

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel: expected False with fastdaa"),
        ({"torch_compile": True}, "torch_compile: expected False with fastdaa"),
    ],
    ids=["liger", "compile"],
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
