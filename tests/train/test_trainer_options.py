"""Options of the Trainer's own: those that could not do what they say are refused at once."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdaa.train import PreferenceConfig, PreferenceTrainer, trainer_options
from fastdaa.train.backbone import has_head_task, install_head_task
from fastdaa.train.trainer_options import _liger_config

REFUSED = {
    "no step": ({"max_steps": 0}, "max_steps: expected steps above 0, or -1"),
    "negative steps": ({"max_steps": -5}, "max_steps: .* got -5"),
    "no epoch": ({"num_train_epochs": 0.0}, "num_train_epochs: expected a number above 0, got 0.0"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: .* 0"),
    "logging": ({"logging_steps": -1}, "logging_steps: expected a number above 0, got -1"),
    "saving": ({"save_steps": 0}, "save_steps: expected a number above 0, got 0"),
    "evaluation": ({"eval_strategy": "steps", "eval_steps": -2}, "eval_steps: .* got -2"),
    "modules of another optimizer": (
        {"optim_target_modules": ["mlp"]}, "optim_target_modules: .* got 'adamw_torch_fused'"
    ),
    "columns": ({"remove_unused_columns": True}, "remove_unused_columns: expected False"),
    "unequal batches": (
        {"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy: expected random"
    ),
    "workers that stay": (
        {"dataloader_persistent_workers": True}, "expected dataloader_num_workers above 0"
    ),
    "predictions": ({"include_for_metrics": ["inputs"]}, r"got \['inputs'\]"),
    "bf16 evaluation": ({"bf16_full_eval": True}, "bf16_full_eval: expected False"),
    "fp16 evaluation": ({"fp16_full_eval": True}, "fp16_full_eval: expected False"),
    "fp16 on a CPU": ({"fp16": True}, "fp16: expected a GPU for it, got the CPU"),
    "liger on a CPU": ({"use_liger_kernel": True}, "use_liger_kernel: expected a GPU"),
    "noise in packed rows": (
        {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected layout 'padded'.* got 'auto'"
    ),
    "one process": ({"ddp_backend": "gloo"}, "ddp_backend: expected several processes"),
    "cut batches": (
        {"accelerator_config": {"dispatch_batches": True}}, "expected dispatch_batches off"
    ),
    "unknown tracker": ({"report_to": "foo"}, "report_to: expected none, .* got 'foo'"),
    "schedule without its number": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        "lr_scheduler_kwargs: expected what cosine_with_min_lr needs, got None",
    ),
    "schedule with another's": (
        {"lr_scheduler_kwargs": {"min_lr": 1e-7}}, "lr_scheduler_kwargs: .* linear needs"
    ),
}  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)

    def build(**options):
        return PreferenceConfig(output_dir=str(tmp_path), **{"use_cpu": True, **options})

    return build


@pytest.mark.parametrize("case", REFUSED)
def test_refused(config, case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"eval_strategy": "steps", "eval_steps": 0}, id="evaluation as logging"),
        pytest.param({"max_steps": 3, "num_train_epochs": 0}, id="steps count"),
        pytest.param({"logging_strategy": "no", "logging_steps": -1}, id="not asked"),
        pytest.param({"neftune_noise_alpha": 5.0, "layout": "padded"}, id="noise in rows"),
        pytest.param(
            {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 0.1,
             "lr_scheduler_kwargs": {"num_decay_steps": 10}}, id="schedule"
        ),
        pytest.param({"accelerator_config": {"split_batches": True}}, id="batches split by rows"),
    ],
)  # fmt: skip
def test_taken(config, options):
    config(**options)


def test_fp16_as_accelerate_launch_asks(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16: expected a GPU"):
        config()


def test_as_many_batches_for_all_processes(config, monkeypatch):
    """One with fewer than the others would let them wait for ever."""
    uneven = {"even_batches": False}
    assert not config(accelerator_config=uneven).accelerator_config.even_batches
    monkeypatch.setattr(trainer_options, "launched_processes", lambda: 2)
    with pytest.raises(ValueError, match="accelerator_config: expected even_batches on"):
        config(accelerator_config=uneven)


def test_a_tracker_that_is_not_installed(config, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_comet_available", lambda: False)
    with pytest.raises(ImportError, match=r"report_to: .* of comet_ml, .*: pip install comet_ml"):
        config(report_to=["comet_ml"])
    monkeypatch.setattr(integration_utils, "is_comet_available", lambda: True)
    assert config(report_to=["comet_ml"]).report_to == ["comet_ml"]


def test_a_device_that_checkpoints_can_be_read_onto(config, tmp_path):
    """accelerate gives the CPU of several processes a number, which torch.load does not know."""
    args = config()
    vars(args)["_setup_devices"] = torch.device("cpu", 0)
    torch.save(torch.ones(1), tmp_path / "optimizer.pt")
    assert torch.load(tmp_path / "optimizer.pt", map_location=args.device).device.type == "cpu"


def test_processes_that_would_run_alone(config, monkeypatch):
    """As on a device that no two processes share."""
    monkeypatch.setattr(trainer_options, "launched_processes", lambda: 2)
    message = "use_cpu: expected it, or devices that 2 processes can share, got cpu in each"
    with pytest.raises(ValueError, match=message):
        config()


def test_liger_leaves_the_head_alone(config, monkeypatch):
    """Its loss would replace the forward that knows the head task."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(PreferenceConfig, "device", torch.device("cpu"), raising=False)
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    got = config(use_cpu=False, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert got.liger_kernel_config == {"rope": False, **off}
    with pytest.raises(ValueError, match="liger_kernel_config: expected fused_linear_cross"):
        config(
            use_cpu=False, use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func"),
        *("data_collator", "model_init"),
    ],
)
def test_what_nothing_here_would_ask(tiny_model, pairs, tmp_path, name):
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=f"{name}: expected None"):
        PreferenceTrainer(tiny_model(), args=args, train_dataset=pairs(2), **{name: lambda *_: 0})


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tokenizer", "got 'tokenizer'; give it as processing_class"),
        ("beta", "got 'beta'; give it to PreferenceConfig, as args"),
        ("model_init_kwargs", "load the model with it"),
        ("calbacks", "did you mean 'callbacks'?"),
        ("nothing_like_it", "got 'nothing_like_it'$"),
    ],
)
def test_what_other_trainers_take(pairs, tmp_path, name, hint):
    args = PreferenceConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=f"expected options of transformers.Trainer, .*{hint}"):
        PreferenceTrainer("nowhere/no-model", args=args, train_dataset=pairs(2), **{name: 0})


def test_the_head_task_outlives_liger(tiny_model):
    kernels = pytest.importorskip("liger_kernel.transformers")
    model = tiny_model()
    install_head_task(model)
    # It changes the classes of the family, too, for every model of this process.
    family = vars(sys.modules[type(model).__module__])
    before = dict(family)
    try:
        kernels._apply_liger_kernel_to_instance(model=model, **_liger_config({"rope": False}))
    finally:
        family.update(before)
    assert has_head_task(model)
    assert "Liger" in model.model.layers[0].mlp.forward.__qualname__


def test_too_few_rows_for_a_batch(make_trainer, pairs):
    trainer = make_trainer(data=pairs(3), dataloader_drop_last=True)
    with pytest.raises(ValueError, match=r"dataloader_drop_last: expected at least 4 rows.* got 3"):
        trainer.train()
    make_trainer(data=pairs(4), dataloader_drop_last=True).train()


@pytest.fixture
def small_memory(make_trainer, pairs):
    """``small_memory(most, first=0)``: no room for batches of more pairs, from a step on."""

    def build(most, first=0, **options):
        trainer = make_trainer(data=pairs(8), auto_find_batch_size=True, max_steps=2, **options)
        compute = trainer.compute_loss

        def limited(model, inputs, **kwargs):
            if len(inputs["row_ids"]) > most and trainer.state.global_step >= first:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return compute(model, inputs, **kwargs)

        trainer.compute_loss = limited
        return trainer

    return build


def test_smaller_batches_from_the_start(small_memory):
    trainer = small_memory(2, gradient_accumulation_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert trainer._train_batch_size <= 2 and [row["step"] for row in rows] == [1, 2]
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_no_new_start_from_trained_weights(small_memory):
    """The Trainer would begin at step 0 again with what step 1 has learnt."""
    with pytest.raises(
        MemoryError, match=r"auto_find_batch_size: .* full after step 1; .*tokens_p"
    ):
        small_memory(2, first=1).train()
