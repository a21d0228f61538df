"""Several processes: which ways of training in parallel work, and where the reference goes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastdaa.head import LmHead
from fastdaa.train.backbone import causal_lm
from fastdaa.train.quantization import is_quantized, quantization_of

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from fastdaa.train.base import PairTrainer
    from fastdaa.train.packed_config import PackedConfig


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
                "with DDP, FSDP2 or DeepSpeed ZeRO 1 or 2"
            )
    if trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            "DeepSpeed: expected ZeRO stage 0, 1 or 2, got 3, which leaves the weight of the LM "
            "head empty wherever the head itself does not run; train with FSDP2 instead"
        )
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded and getattr(trainer.args, "precompute_ref_log_probs", False):
        raise ValueError(
            "precompute_ref_log_probs: expected an unsharded run, got FSDP or DeepSpeed; fill the "
            "cache with a run on whole models first, or leave the option out"
        )
    if trainer.is_fsdp_enabled and getattr(state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError("FSDP: expected version 2 (fsdp_version: 2), got version 1")
    if trainer.is_fsdp_enabled and is_quantized(trainer.model):
        raise ValueError(
            f"FSDP: expected a model whose weights can be cut, got a quantised one "
            f"({quantization_of(trainer.model)}); train with DDP, which needs it whole on every GPU"
        )


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
def head_in_force(core: PreTrainedModel) -> Iterator[LmHead]:
    """The LM head inside a forward of the model, whole where FSDP2 keeps it in shards.

    It does so where the head is a unit of its own (accelerate makes it one under PEFT), which FSDP2
    would put together around the head's own forward. Its gradient is reduced as any other.
    """
    module: Any = core.get_output_embeddings()
    alone = isinstance(module, FSDPModule) and isinstance(getattr(module, "weight", None), DTensor)
    if alone:
        module.unshard()
    try:
        yield LmHead.from_model(core)
    finally:
        # With gradient, the backward does it.
        if alone and not torch.is_grad_enabled():
            module.reshard()


def head_afterwards(core: PreTrainedModel) -> LmHead:
    """The LM head outside of a forward, without gradient; its shards are put together."""
    head = LmHead.from_model(core).detach()
    if not isinstance(head.weight, DTensor):
        return head
    bias = head.bias.full_tensor() if isinstance(head.bias, DTensor) else head.bias
    return replace(head, weight=head.weight.full_tensor(), bias=bias)


def place_early(model: nn.Module, trainer: PairTrainer) -> None:
    """Put a whole model on the device before it is checked, where checks are fast."""
    quantized = is_quantized(model)
    mapped = getattr(model, "hf_device_map", None) is not None
    if not (quantized or mapped or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        model.to(trainer.args.device)


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
    """The reference under DeepSpeed: replicated, without optimizer and scheduler."""
    import deepspeed

    config: dict[str, Any] = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for block in ("optimizer", "scheduler"):
        config.pop(block, None)
    config["zero_optimization"] = {"stage": 0}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine.eval()
