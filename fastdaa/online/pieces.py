"""FSDP2: every process holds a piece of all weights, gradients and states of the optimizer.

A layer is whole while it computes. Forward and backward passes are collectives of all processes,
so each runs as many as the others; not so while :func:`whole` keeps a model in one piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdaa.counted import counted
from fastdaa.online.ranks import number, processes
from fastdaa.train.quantization import is_quantized, quantization_of


def check_processes(found: int) -> None:
    """Raise ``ValueError`` where there is only one process."""
    if found == 1:
        raise ValueError(
            "fsdp: expected several processes, over which models are cut, got one; start with "
            "`torchrun --nproc_per_node` or `accelerate launch --multi_gpu`"
        )


def check_pieces(models: Mapping[str, nn.Module]) -> None:
    """Look at processes and models, whole and by the names of options, before they are cut.

    Raises:
        ValueError: one process, quantised weights, or weights that are trained in several dtypes.
    """
    check_processes(processes())
    for name, model in models.items():
        if is_quantized(model):
            raise ValueError(
                f"fsdp: expected models whose weights can be cut, got {name} quantised "
                f"({quantization_of(model)}); without fsdp every GPU holds it whole"
            )
        dtypes = {weight.dtype for weight in model.parameters() if weight.requires_grad}
        if len(dtypes) > 1:
            said = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
            raise ValueError(
                f"fsdp: expected weights of one dtype to train, got {said} in {name}; give --dtype "
                "float32"
            )


def cut(model: nn.Module, *, bf16: bool) -> None:
    """Cut a whole model, on its device and the same in every process, in place.

    Args:
        model: a model of transformers, below any wrapper of PEFT, or a small module.
        bf16: it computes in bf16, from weights in their own dtype; gradients are summed in fp32.
    """
    # What a forward returns keeps its dtype: there are log-probs among it.
    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),)),
        "mp_policy": narrow if bf16 else MixedPrecisionPolicy(),
        "reshard_after_forward": True,
    }
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in reversed([*model.modules()]):  # inner ones before those around them
        if type(module).__name__ in names and module is not model:
            fully_shard(module, **options)
    fully_shard(model, **options)


def is_cut(model: nn.Module) -> bool:
    """Whether :func:`cut` was applied to the model or to something in it."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """All weights of a model are whole in every process, which may run it as it likes, without
    gradient; beginning is a collective."""
    pieces = [module for module in model.modules() if isinstance(module, FSDPModule)]
    try:
        for piece in pieces:
            piece.unshard()
            piece.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for piece in pieces:
            piece.set_reshard_after_forward(True, recurse=False)
            piece.reshard()


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model that is cut, on the CPU of the first process; elsewhere empty.

    Weights that are tied are one tensor. A collective.
    """
    found: dict[int, Tensor] = {}
    state = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in found:
            found[id(weight)] = _whole(weight.detach())
        state[name] = found[id(weight)]
    return state if number() == 0 else {}


@torch.no_grad()
def load_state(model: nn.Module, path: str | Path) -> None:
    """Every process takes its pieces of a whole state, one weight at a time.

    Args:
        path: a safetensors file, which has one name of weights that are tied.

    Raises:
        ValueError: the state is another model's.
    """
    targets = model.state_dict(keep_vars=True)
    with safe_open(path, framework="pt") as file:
        names = {*file.keys()}
        loaded = {id(targets[name]) for name in names & targets.keys()}
        lacking = {name for name, weight in targets.items() if id(weight) not in loaded}
        wrong = sorted(lacking | (names - targets.keys()))
        if wrong:
            raise ValueError(
                f"resume: expected the weights of the model in {path}, but only one of them has "
                f"{counted(len(wrong), 'tensor')}, such as {wrong[0]}"
            )
        for name in names:
            targets[name].copy_(_like(file.get_tensor(name), targets[name]))


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """As :func:`whole_state`, of an optimizer; of one whose weights are whole, its own state."""
    found = optimizer.state_dict()
    if not any(isinstance(weight, DTensor) for weight in _weights(optimizer)):
        return found
    found["state"] = {
        place: {name: _whole(value) for name, value in entry.items()}
        for place, entry in found["state"].items()
    }
    return found


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Goes on from :func:`whole_optimizer_state`."""
    weights = _weights(optimizer)
    state = {
        place: {
            name: _like(value, weights[place]) if value.shape == weights[place].shape else value
            for name, value in entry.items()
        }
        for place, entry in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def _weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _whole(value: Any) -> Any:
    """All of it, on the CPU of the first process alone."""
    if not isinstance(value, DTensor):
        return value
    gathered = value.full_tensor()
    return gathered.cpu() if number() == 0 else gathered.new_empty(0)


def _like(value: Tensor, weight: Tensor) -> Tensor:
    """A process's pieces of a whole value, cut as a weight is."""
    if not isinstance(weight, DTensor):
        return value
    placed = value.to(weight.device, weight.dtype)
    return distribute_tensor(placed, weight.device_mesh, weight.placements, src_data_rank=None)
