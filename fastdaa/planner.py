"""The plan of a call: a path, an engine, tiles, and the memory that they take.

Paths are chosen in :mod:`fastdaa.paths`, tiles in :mod:`fastdaa.memory`. Between the products an
engine works on tiles of logits, see :mod:`fastdaa.engines`.
"""

from __future__ import annotations

import importlib.util

import torch

from fastdaa.call_size import CallSize
from fastdaa.engine_check import LEAST_CAPABILITY, triton_obstacle
from fastdaa.head_plan import HeadPlan
from fastdaa.memory import Room, Tiles
from fastdaa.paths import PATHS, choose_path
from fastdaa.single_pass_memory import SinglePassRoom, least_single_pass
from fastdaa.validation import check_choice

ENGINES = ("auto", "torch", "triton", "fused")


def plan_head(
    vocab_size: int,
    device: torch.device | str,
    *,
    hidden_grad: bool,
    head_grad: bool,
    loss_inside: bool = False,
    coupled: bool = False,
    impl: str = "auto",
    engine: str = "auto",
    max_bytes: int | None = None,
    tokens: int = 0,
    hidden_size: int = 0,
    operand: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    hidden_dtype: torch.dtype | None = None,
    softcap: bool = False,
    stats: bool = False,
    sparse: bool = False,
    selected: bool = False,
    divergence: bool = False,
    sharded: bool = False,
    entropy: bool = False,
    bonus: bool = False,
    gathered: bool = False,
    counts: tuple[int, ...] = (),
) -> HeadPlan:
    """Choose a path and an engine.

    Args:
        vocab_size: ``V``, or the slice of it that a process has.
        device: where the tensors are.
        hidden_grad, head_grad: gradients of the hidden states, of weight or bias are wanted.
        loss_inside: the caller hands over the loss as well (:func:`fastdaa.pair_loss`).
        coupled: that loss couples all pairs of the batch, so it is not known inside a chunk.
        impl: ``"auto"``, or the path to take; one that cannot serve raises.
        engine: ``"torch"``, ``"triton"``, ``"fused"`` (path ``score`` alone), or ``"auto"``: triton
            on CUDA devices on which its kernels agree with fp64 (tried once a process), else torch.
        max_bytes: memory beyond inputs and returned gradients; None for the default of the device.
            Sums that a path cannot do without count first, tiles get the rest. ``auto`` takes no
            single pass and no ``frozen`` that takes more, and ``recompute`` does without a sum of
            all tokens, for 1U. Where copies (selected rows, a weight in another dtype) leave next
            to nothing (less than a sixteenth), tiles take a quarter all the same: no batch is too
            long. ``impl="single_pass"`` keeps what fits and computes the rest again.
        tokens: ``N`` scored tokens of the batch; 0 if not known.
        hidden_size: ``D``; 0 if not known, and sums are not counted.
        operand: dtype of the factors of the products. bf16 gradients of logits are kept until
            backward, see :mod:`fastdaa.single_pass_memory`.
        weight_dtype, hidden_dtype: of the head and of the hidden states; None for ``operand``.
        softcap, stats: the head has a cap, token statistics are wanted; an engine may hold more.
        sparse: the loss gives many tokens a coefficient of exactly 0, as a hinge does; such tokens
            are then left out of products on GPUs, too.
        selected: the rows are selected from hidden states of more positions, as
            :func:`fastdaa.pair_loss` does: their copy and its gradient count, too.
        divergence: the call is :func:`fastdaa.token_divergence`: it holds logits of two heads.
        sharded: the head is a slice of the vocabulary.
        entropy, bonus: the call is :func:`fastdaa.token_entropy`, or
            :func:`fastdaa.token_logps_and_entropy` (both with ``stats``).
        gathered: selected rows are copied as they are needed, as :func:`fastdaa.pair_loss` does but
            where gradients of the logits are kept until backward.
        counts: scored tokens of every sequence, pair-major, as of a selection; a pair longer than a
            chunk of a single pass is computed twice. Empty if not known.

    Raises:
        TypeError: a size or budget that is no integer.
        ValueError: an unknown ``impl`` or ``engine``, one that cannot serve this call, a budget
            below one row of logits, or below what ``impl="single_pass"`` or ``"frozen"`` takes.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
    """
    check_choice("impl", impl, PATHS)
    check_choice("engine", engine, ENGINES)
    size = CallSize(
        vocab_size, hidden_size, tokens, operand, weight_dtype, hidden_dtype, softcap, stats,
        sparse, selected, hidden_grad, head_grad, entropy or bonus, gathered, bonus,
    )  # fmt: skip
    _check_sizes(size, max_bytes)
    return _plan(
        size, torch.device(device), impl, engine, max_bytes, loss_inside=loss_inside,
        coupled=coupled, divergence=divergence, sharded=sharded, counts=counts,
    )  # fmt: skip


def _plan(
    size: CallSize, device: torch.device, impl: str, engine: str, max_bytes: int | None, *,
    loss_inside: bool, coupled: bool, divergence: bool, sharded: bool, counts: tuple[int, ...],
) -> HeadPlan:  # fmt: skip
    """The plan for checked sizes."""
    on_cpu = device.type == "cpu"
    name, engine_reason = engine, "asked for"
    if engine == "auto":
        plain = divergence or impl == "reference"
        name, engine_reason = _best_engine(size, device, plain=plain, sharded=sharded)
    path, reason = choose_path(impl, size.hidden_grad, size.head_grad, loss_inside, size.bonus)
    if engine in ("triton", "fused"):
        _check_triton(engine, path, device)
    room, tiles = Room(size, name, on_cpu, max_bytes), None
    if path == "frozen" and not divergence and not room.leaves_room(room.frozen_sums):
        path, reason = _instead_of_frozen(room, impl)
    if path == "single_pass":
        # Slices of the vocabulary add up their parts of the hidden states' gradient in forward.
        may_keep = loss_inside and size.tokens > 0 and not sharded
        ways = SinglePassRoom(room, may_keep=may_keep, in_chunks=not coupled, counts=counts)
        tiles, reason = ways.best() if impl == "auto" else _asked_for(ways)
        path = path if tiles else "recompute"
    tiles = tiles or room.tiles("divergence" if divergence else path)
    sparse = size.sparse or on_cpu
    return HeadPlan(
        path, reason, *tiles, name, engine_reason, sparse, divergence, size.width,
        size.hidden_grad, size.head_grad,
    )  # fmt: skip


def _instead_of_frozen(room: Room, impl: str) -> tuple[str, str]:
    """The path, and why, where the gradients that a frozen head keeps do not fit."""
    if impl == "frozen":
        raise ValueError(
            f"max_bytes: expected {-(-16 * room.frozen_sums // 15)} or more for impl='frozen', got "
            f"{room.max_bytes}; impl='recompute' takes less"
        )
    return "recompute", (
        f"the head is not trained, and gradients of {room.frozen_sums >> 20} MiB would be kept, "
        "more than max_bytes allows"
    )


def _asked_for(ways: SinglePassRoom) -> tuple[Tiles, str]:
    """What ``impl="single_pass"`` takes, and what it costs beyond its products."""
    tiles = ways.any()
    if tiles:
        twice = ways.computed_twice(tiles)
        more = f", and computes the logits of {twice} tokens in longer pairs twice"
        return tiles, "asked for" + more * (twice > 0)
    if ways.room.max_bytes is None or not (ways.may_keep or ways.in_chunks):
        raise ValueError("impl='single_pass' cannot serve a loss that couples the pairs of the "
                         "batch: expected 'recompute', 'frozen' or 'auto'")  # fmt: skip
    room, size = ways.room, ways.size
    least = least_single_pass(
        size, room.engine, on_cpu=room.on_cpu, may_keep=ways.may_keep, in_chunks=ways.in_chunks
    )
    raise ValueError(
        f"max_bytes: expected at least {least} for impl='single_pass', got {room.max_bytes}; "
        "impl='recompute' takes less"
    )


def _check_sizes(size: CallSize, max_bytes: int | None) -> None:
    least = {"vocab_size": (size.width, 1), "tokens": (size.tokens, 0)}
    least |= {"hidden_size": (size.hidden_size, 0)}
    if max_bytes is not None:
        least["max_bytes"] = (max_bytes, 0)
    for name, (value, low) in least.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < low:
            raise ValueError(f"{name}: expected {low} or more, got {value}")


def _best_engine(
    size: CallSize, device: torch.device, *, plain: bool, sharded: bool
) -> tuple[str, str]:
    """The engine that ``auto`` is, and why if there was a choice; ``plain``: there is one alone."""
    if device.type != "cuda" or plain:
        return "torch", ""
    if sharded:  # what a process finds out about its device alone would not do
        return "torch", "processes that share a vocabulary need the same one: ask for 'triton'"
    if size.operand == torch.float64:
        return "torch", "fp64 is for plain torch"
    obstacle = triton_obstacle(device)
    if obstacle:
        return "torch", obstacle
    tried = torch.cuda.is_available()
    return "triton", "its kernels agree with fp64 on this GPU" if tried else "what GPUs take"


def check_engine(engine: str, device: torch.device) -> None:
    """Raise ``ValueError`` or ``ImportError`` for an engine that cannot train on a device."""
    if engine != "torch":
        _check_triton(engine, "recompute", device)


def _check_triton(engine: str, path: str, device: torch.device) -> None:
    if engine == "fused" and path != "score":
        raise ValueError("engine='fused': expected a call without gradient (path 'score'), got "
                         f"path {path!r}; engine='auto' serves all paths")  # fmt: skip
    if path == "reference":
        raise ValueError(f"engine={engine!r}: expected a path with tiles of logits, got "
                         "impl='reference'")  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"engine={engine!r} needs the package triton, which is not installed: "
                          "pip install 'fastdaa[triton]', or engine='torch'")  # fmt: skip
    if device.type == "cuda":
        # A plan for a GPU may be made where there is none.
        here = torch.cuda.is_available()
        least = LEAST_CAPABILITY
        capability = torch.cuda.get_device_capability(device) if here else least
        if capability < least:
            raise ValueError(
                f"engine={engine!r}: expected a GPU of compute capability 8.0 or later, got "
                f"{capability[0]}.{capability[1]}; engine='torch' takes it"
            )
        return
    from fastdaa.kernels.configs import interpreted

    if device.type != "cpu" or not interpreted():
        raise ValueError(f"engine={engine!r}: expected tensors on a CUDA device, got {device} (CPU "
                         "tensors need Triton's interpreter: TRITON_INTERPRET=1)")  # fmt: skip
