"""Several processes: which ways of training in parallel work, and where the reference goes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastdaa.counted import counted
from fastdaa.head import LmHead
from fastdaa.train.backbone import causal_lm
from fastdaa.train.quantization import is_quantized, quantization_of
from fastdaa.train.zero3 import check_whole, gathered, holds_cut

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from fastdaa.train.base import PairTrainer
    from fastdaa.train.packed_config import PackedConfig

_GATHERS = "stage3_gather_16bit_weights_on_model_save"


def check_one_device(args: PackedConfig) -> None:
    """Raise ``ValueError`` where one process would drive several GPUs."""
    if args.n_gpu > 1:
        raise ValueError(
            f"expected one process a GPU, got torch.nn.DataParallel over {args.n_gpu} devices; "
            "start with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one of "
            "them"
        )


def check_parallelism(trainer: PairTrainer) -> None:
    """Raise ``ValueError`` for parallelism that cuts what the loss needs whole."""
    state = trainer.accelerator.state
    config = getattr(trainer.accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        size = getattr(config, f"{name}_size", 1)
        if size > 1:
            raise ValueError(
                f"{name}_size: expected 1, got {size}; pairs and the LM head cannot be cut. Train "
                "with DDP, FSDP2 or DeepSpeed"
            )
    if zero_stage(trainer) == 3:
        _check_zero3(trainer)
    if trainer.is_fsdp_enabled and getattr(state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError("FSDP: expected version 2 (fsdp_version: 2), got version 1")
    if trainer.is_fsdp_enabled and is_quantized(trainer.model):
        raise ValueError(
            f"FSDP: expected a model whose weights can be cut, got a quantised one "
            f"({quantization_of(trainer.model)}); train with DDP, which needs it whole on every GPU"
        )


def _check_zero3(trainer: PairTrainer) -> None:
    """Raise ``ValueError`` for what does not go together with weights that lie in pieces."""
    check_whole(trainer.model, "model")
    if is_quantized(trainer.model):
        raise ValueError(
            "DeepSpeed ZeRO-3: expected a model whose weights can be cut, got a quantised one "
            f"({quantization_of(trainer.model)}); train with DDP or ZeRO-2, which keep it whole"
        )
    if trainer.args.torch_compile:
        raise ValueError("torch_compile: expected False with DeepSpeed ZeRO-3, got True")
    if getattr(trainer.args, "auto_find_batch_size", False):
        raise ValueError("auto_find_batch_size: expected False with DeepSpeed ZeRO-3, got True")
    zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if zero.setdefault(_GATHERS, True) is False:
        raise ValueError(
            f"DeepSpeed: expected {_GATHERS} to be true, or left out, got false, with which no "
            "model would be saved (`accelerate launch` needs --zero3_save_16bit_model true)"
        )


def zero_stage(trainer: PairTrainer) -> int | None:
    """The ZeRO stage; None without DeepSpeed."""
    if not trainer.is_deepspeed_enabled:
        return None
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage)


def pieces_fact(trainer: PairTrainer) -> dict[str, str]:
    """How DeepSpeed cuts what checkpoints hold; it can read them in that way alone."""
    stage = zero_stage(trainer)
    if stage is None:
        return {}
    processes = f" over {counted(trainer.args.world_size, 'process')}" if stage else ""
    return {"DeepSpeed": f"ZeRO {stage}{processes}"}


def is_sharded(trainer: PairTrainer) -> bool:
    """Whether FSDP or DeepSpeed places the models, when they are prepared and not before."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def forwards_meet(trainer: PairTrainer) -> bool:
    """Whether weights lie in pieces, so that every forward is a collective of all processes."""
    return trainer.is_fsdp_enabled or zero_stage(trainer) == 3


def meets_in_packs(trainer: PairTrainer) -> bool:
    """Whether the forward or the backward of every pack is a collective of all processes."""
    return forwards_meet(trainer) or zero_stage(trainer) == 2


def more_to_come(trainer: PairTrainer, model: nn.Module) -> AbstractContextManager[None]:
    """Around the backward of a pack that is not the last of its batch.

    DDP ranks may have different numbers of packs; they meet in the last backward. FSDP meets in
    each: the gradients of whole weights would not fit. DeepSpeed steps in the backward of what
    accelerate takes for the last batch of a step.
    """
    if trainer.is_fsdp_enabled:
        return contextlib.nullcontext()
    if trainer.is_deepspeed_enabled:
        return _without_step(trainer.accelerator)
    return trainer.accelerator.no_sync(model)


@contextlib.contextmanager
def _without_step(accelerator: Accelerator) -> Iterator[None]:
    before = accelerator.sync_gradients
    accelerator.sync_gradients = False
    try:
        yield
    finally:
        accelerator.sync_gradients = before


def settle_ddp(args: PackedConfig, model: nn.Module) -> None:
    """Have DDP not look for unused parameters where a model uses all, unless the user wants it.

    It would walk the whole graph in every step to find none, and warn about it. Experts may get no
    token, dropped layers run not at all, and the vision tower of a multimodal model has nothing to
    do here: those keep the Trainer's default.
    """
    if args.ddp_find_unused_parameters is None and _uses_all(causal_lm(model), args):
        args.ddp_find_unused_parameters = False


def _uses_all(core: PreTrainedModel, args: PackedConfig) -> bool:
    config = core.config
    if config.get_text_config() is not config:
        return False
    dropped = getattr(config, "layerdrop", 0) and not args.disable_dropout
    return not dropped and not any("expert" in name for name in config.to_dict())


@contextlib.contextmanager
def head_in_force(core: PreTrainedModel, temperature: float = 1.0) -> Iterator[LmHead]:
    """The LM head inside a forward of the model, whole where FSDP2 keeps it in shards.

    It does so where the head is a unit of its own (accelerate makes it one under PEFT), which FSDP2
    would put together around the head's own forward. Its gradient is reduced as any other.
    """
    module: Any = core.get_output_embeddings()
    alone = isinstance(module, FSDPModule) and isinstance(getattr(module, "weight", None), DTensor)
    if alone:
        module.unshard()
    try:
        yield LmHead.from_model(core, temperature=temperature)
    finally:
        # With gradient, the backward does it.
        if alone and not torch.is_grad_enabled():
            module.reshard()


def head_afterwards(core: PreTrainedModel) -> LmHead:
    """The LM head outside of a forward, without gradient; its shards are put together."""
    module: Any = core.get_output_embeddings()
    if holds_cut(module):
        with gathered(module.parameters()):
            head = LmHead.from_model(core).detach()
            bias = None if head.bias is None else head.bias.clone()
            return replace(head, weight=head.weight.clone(), bias=bias)
    head = LmHead.from_model(core).detach()
    if not isinstance(head.weight, DTensor):
        return head
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return replace(head, weight=head.weight.full_tensor(), bias=bias)


def place_early(model: nn.Module, trainer: PairTrainer) -> None:
    """Put a whole model on the device before it is checked, where checks are fast."""
    quantized = is_quantized(model)
    mapped = getattr(model, "hf_device_map", None) is not None
    if not (quantized or mapped or is_sharded(trainer)):
        model.to(trainer.args.device)


def keep_results_wide(accelerator: Accelerator) -> None:
    """Have FSDP2 return log-probs and losses from a forward as they are, before it cuts a model.

    With mixed precision, accelerate has it round all that a forward returns to 16 bits: a log-prob
    of -300 nats to a whole number.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def prepare_reference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model: on the device, or sharded as the policy is."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _deepspeed_inference(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model)
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    # An accelerator that holds a model takes the policy for prepared, too, and would keep this one
    # alive after the last use.
    accelerator._models = [held for held in accelerator._models if held is not prepared]
    return prepared


def _deepspeed_inference(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The reference under DeepSpeed, without optimizer and scheduler: in pieces under ZeRO-3, else
    replicated."""
    import deepspeed

    config: dict[str, Any] = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    zero = config["zero_optimization"]
    if accelerator.state.deepspeed_plugin.zero_stage != 3:
        zero = {"stage": 0}
    zero.pop("offload_optimizer", None)
    # What the Trainer derives from the policy is not known yet; DeepSpeed's own defaults do.
    config["zero_optimization"] = {name: v for name, v in zero.items() if v != "auto"}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()  # returns None, unlike a module's
    return engine
