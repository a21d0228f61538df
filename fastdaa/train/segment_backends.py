"""Which kernel attends over segments, why, and the two variable-length kernels for CUDA."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdaa.train import cpu_attention

BACKENDS = ("flash_attn", "torch_varlen", "cpu_blocks", "sdpa_loop", "eager_loop")
"""Fastest first: one flash-attn call; one call of PyTorch's own; cut-up CPU flash; a loop over
segments through ``scaled_dot_product_attention``; a loop with explicit scores."""

_FLASH_ATTN_FLOOR = (2, 3)
_FLASH_ATTN_SOFTCAP_FLOOR = (2, 6)
_FLASH_COMPUTE_CAPABILITY = (8, 0)
_FLASH_HEAD_DIM = 256


class BackendChoice(NamedTuple):
    """Which implementation attends over segments, and why."""

    name: str
    reason: str


class _Call(NamedTuple):
    """What a call of segment attention asks of a backend."""

    device_type: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    softcap: float | None
    dropout: float


@lru_cache(maxsize=64)
def choose_backend(
    device_type: str,
    dtype: torch.dtype,
    *,
    head_dim: int,
    value_dim: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    requested: str = "auto",
) -> BackendChoice:
    """The fastest backend that serves such a call, with the reason.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
        dtype: dtype of queries, keys and values.
        head_dim: size of a query or key head.
        value_dim: size of a value head; ``None`` if it is the same.
        softcap: cap of the attention scores (Gemma 2), or ``None``.
        dropout: probability of dropping an attention weight.
        requested: ``"auto"`` or one of ``BACKENDS``.

    Raises:
        ValueError: ``requested`` is unknown or cannot serve this call.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(
            f"expected a segment attention backend out of {('auto', *BACKENDS)}, got {requested!r}"
        )
    call = _Call(device_type, dtype, head_dim, value_dim or head_dim, softcap, dropout)
    if requested != "auto":
        obstacle = _obstacle(requested, call)
        if obstacle:
            raise ValueError(
                f"expected the segment attention backend {requested!r} to serve this call, "
                f"but it {obstacle}"
            )
        return BackendChoice(requested, "requested")
    passed_over = []
    for name in BACKENDS:
        obstacle = _obstacle(name, call)
        if obstacle is None:
            break
        if _DEVICES.get(name, device_type) == device_type:
            passed_over.append(f"{name} {obstacle}")
    return BackendChoice(name, "; ".join(passed_over) or "it is the fastest one")


def missing_for(name: str, device_type: str) -> str | None:
    """What keeps a backend from serving any call on such a device, as the rest of a sentence.

    Calls of a common kind are asked about: without softcap and dropout, in bf16.
    """
    return _obstacle(name, _Call(device_type, torch.bfloat16, 64, 64, None, 0.0))


def varlen_runner(name: str) -> Callable[..., Tensor]:
    """The function behind ``"flash_attn"`` or ``"torch_varlen"``, on ``[tokens, heads, d]``."""
    return {"flash_attn": _run_flash_attn, "torch_varlen": _run_torch_varlen}[name]


def _run_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    options: dict[str, Any] = {"softcap": softcap} if softcap else {}
    kernel: Any = flash_attn_varlen()
    return kernel(
        query,
        key,
        value,
        cu_q,
        cu_k,
        max_q,
        max_k,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )


def _run_torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    # (-1, 0) is PyTorch's spelling of causal, aligned to the bottom right as in flash-attn.
    kernel: Any = torch_varlen()
    options: dict[str, Any] = {}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and varlen_groups_heads(kernel):
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    return kernel(
        query,
        key,
        value,
        cu_q,
        cu_k,
        max_q,
        max_k,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
        **options,
    )


@lru_cache(maxsize=1)
def flash_attn_varlen() -> Callable[..., Any] | None:
    """``flash_attn.flash_attn_varlen_func``, or ``None`` where flash-attn is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@lru_cache(maxsize=1)
def torch_varlen() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen.varlen_attn`` if it takes a scale and windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size"} <= set(known) else None


@lru_cache(maxsize=1)
def varlen_groups_heads(kernel: Callable[..., Any]) -> bool:
    """Whether PyTorch's kernel takes fewer heads of keys than of queries; 2.11's does not."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def flash_attn_version() -> tuple[int, ...]:
    """Version of the installed flash-attn as numbers."""
    import flash_attn

    return tuple(int(part) for part in flash_attn.__version__.split(".")[:2])


def _obstacle(name: str, call: _Call) -> str | None:
    """What keeps a backend from serving the call, as the rest of a sentence about it."""
    device = _DEVICES.get(name, call.device_type)
    if device != call.device_type:
        return f"needs a {device} device, not {call.device_type}"
    return _OBSTACLES[name](call)


def _flash_obstacle(call: _Call) -> str | None:
    """What keeps any flash kernel of the CUDA kind from serving the call."""
    if call.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16, not {call.dtype}"
    if call.head_dim != call.value_dim or call.head_dim > _FLASH_HEAD_DIM or call.head_dim % 8:
        return (
            f"needs equal key and value heads of at most {_FLASH_HEAD_DIM}, a multiple of 8, "
            f"not {call.head_dim} and {call.value_dim}"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _FLASH_COMPUTE_CAPABILITY:
        return "needs compute capability 8.0 or newer"
    return None


def _flash_attn_obstacle(call: _Call) -> str | None:
    obstacle = _flash_obstacle(call)
    if obstacle:
        return obstacle
    if flash_attn_varlen() is None:
        return "is not installed"
    floor = _FLASH_ATTN_SOFTCAP_FLOOR if call.softcap else _FLASH_ATTN_FLOOR
    if flash_attn_version() < floor:
        return f"needs flash-attn {floor[0]}.{floor[1]} or newer"
    return None


def _torch_varlen_obstacle(call: _Call) -> str | None:
    obstacle = _flash_obstacle(call)
    if obstacle:
        return obstacle
    if torch_varlen() is None:
        return "needs a PyTorch whose varlen_attn takes a scale and windows"
    if call.softcap:
        return "has no softcap of the scores"
    return "has no attention dropout" if call.dropout else None


def _cpu_blocks_obstacle(call: _Call) -> str | None:
    if call.softcap:
        return "has no softcap of the scores"
    if call.dropout:
        return "has no attention dropout"
    if call.head_dim != call.value_dim:
        return f"needs equal key and value heads, not {call.head_dim} and {call.value_dim}"
    return None if cpu_attention.is_available() else "needs PyTorch's CPU flash kernel"


def _sdpa_loop_obstacle(call: _Call) -> str | None:
    return "has no softcap of the scores" if call.softcap else None


def _eager_loop_obstacle(call: _Call) -> str | None:
    return None


_DEVICES = {"flash_attn": "cuda", "torch_varlen": "cuda", "cpu_blocks": "cpu"}
_OBSTACLES: dict[str, Callable[[_Call], str | None]] = {
    "flash_attn": _flash_attn_obstacle,
    "torch_varlen": _torch_varlen_obstacle,
    "cpu_blocks": _cpu_blocks_obstacle,
    "sdpa_loop": _sdpa_loop_obstacle,
    "eager_loop": _eager_loop_obstacle,
}
