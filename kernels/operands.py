"""What the launchers of GEMM kernels ask of their operands, and how they hand them over."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastdaa.kernels.final_logits import logit_factors

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16
_ROW_LIMIT = 2**31


def _fences(version: str) -> bool:
    """Whether a version of Triton puts a fence before a copy to memory that threads have used.

    Reductions share their scratch memory with the tiles. Before 3.5 nothing orders those accesses
    before the copy engine's (triton-lang/triton#7262).
    """
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (3, 5)


_FENCED = _fences(triton.__version__)


def check_operands(hidden_states: Tensor, weight: Tensor, prefix: str = "") -> None:
    """Raise ``ValueError`` unless ``[N, D]`` and ``[V, D]`` can be multiplied by a kernel."""
    if hidden_states.dtype not in _DTYPES or weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"{prefix}hidden_states, {prefix}weight: expected one dtype of bf16, fp16 and fp32, "
            f"got {hidden_states.dtype} and {weight.dtype}"
        )
    if hidden_states.ndim != 2 or weight.ndim != 2 or hidden_states.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}hidden_states, {prefix}weight: expected [N, D] and [V, D], "
            f"got {list(hidden_states.shape)} and {list(weight.shape)}"
        )
    if not weight.numel() or max(hidden_states.shape[0], weight.shape[0]) >= _ROW_LIMIT:
        raise ValueError(
            f"{prefix}weight: expected V and D above 0 and fewer than 2^31 rows, "
            f"got {list(hidden_states.shape)} and {list(weight.shape)}"
        )
    # A descriptor of memory that the device cannot read would end the process, not raise.
    if weight.device != hidden_states.device:
        raise ValueError(
            f"{prefix}weight: expected device {hidden_states.device} as {prefix}hidden_states, "
            f"got {weight.device}"
        )
    for name, tensor in (("hidden_states", hidden_states), ("weight", weight)):
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(
                f"{prefix}{name}: expected contiguous rows, got strides {tensor.stride()}"
            )


def fits_descriptor(tensor: Tensor) -> bool:
    """Whether the copy engine can read ``tensor [rows, D]``: 16-byte aligned base and rows.

    Rows that overlap, as those of an expanded tensor, are left to pointers: which strides below the
    length of a row the driver takes is not documented. So is everything before Triton 3.5.
    """
    return (
        TensorDescriptor is not None
        and _FENCED
        and tensor.data_ptr() % _ALIGNMENT == 0
        and tensor.stride(0) >= tensor.shape[1]
        and tensor.stride(0) * tensor.element_size() % _ALIGNMENT == 0
        and tensor.stride(1) == 1
    )


def operand(tensor: Tensor, block_rows: int, block_d: int, use_tma: bool) -> Any:
    """The tensor itself, or a descriptor of its tiles.

    Descriptors are made on the host and passed by value: made on the device they would need a
    global allocator for scratch memory, which a library should not install.
    """
    if not use_tma:
        return tensor
    return TensorDescriptor.from_tensor(tensor, [block_rows, block_d])


def tile_factors(
    logit_scale: float, softcap: float | None, temperature: float
) -> tuple[float | None, float | None]:
    """``inner`` and ``outer`` of ``logit_factors``, None where a kernel can leave the step out."""
    inner, outer = logit_factors(float(logit_scale), softcap, float(temperature))
    if softcap is None:
        return (None if inner == 1.0 else inner), None
    return inner, outer


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the current device; make it that of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def mark_written(tensor: Tensor) -> None:
    """Tell autograd that a kernel has written to a tensor that it was given.

    PyTorch sees no store through a pointer: what saved the tensor before (selective activation
    checkpointing keeps results of products) would take the new entries for the old ones.
    """
    torch.autograd.graph.increment_version(tensor)


def multiprocessors(device: torch.device) -> int:
    """What the programs of a persistent grid share; 3 in the interpreter."""
    return _multiprocessors(device) if device.type == "cuda" else 3


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
