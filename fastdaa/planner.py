"""Which of the four ways through the head is taken, in which tiles, and why.

The unit of cost is ``U = 2 N V D`` FLOP, one matrix product of the head.

| path | cost | when |
|---|---|---|
| score | 1U | no gradient is wanted |
| frozen | 2U | the head is not trained: the unscaled gradient of the hidden states is made in the
forward pass, and the backward pass is a row scale |
| single pass | 3U | the loss is known inside a chunk of whole pairs (:func:`fastdaa.pair_loss`), or
the whole batch's bf16 gradients of logits fit, see :mod:`fastdaa.kept` |
| recompute | 4U | anything else: the backward pass computes the logits again, vocabulary-major |

Between the products an engine works on tiles of logits, see :mod:`fastdaa.engines`.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from fastdaa.validation import check_choice

PATHS = ("auto", "score", "frozen", "single_pass", "recompute", "reference")
ENGINES = ("auto", "torch", "triton", "fused")
_GEMMS = {"score": 1, "frozen": 2, "single_pass": 3, "recompute": 4, "reference": 3}

# Bytes of fp32 logits held at a time: (statistics and gradient tiles, chunks of the single pass). A
# CPU tile stays in the last-level cache; the single pass holds whole pairs.
_CPU_BYTES = (32 << 20, 256 << 20)
_DEVICE_BYTES = (512 << 20, 1 << 30)
# Bytes of bf16 gradients of logits that the single pass may keep until backward: what
# 8192 tokens over 128256 entries need, and no more than the fp32 sum in their place would.
_KEPT_BYTES = 2 << 30
# A CPU gains nothing from more rows in one product, and its cache does not hold them.
_CPU_BLOCK_ROWS = 256
# Columns of the tiles of recompute's backward pass: wide enough for an efficient product, narrow
# enough for thousands of rows, so that a slice of the weight's gradient is summed in few products.
_CPU_COLUMNS = 4096
_DEVICE_COLUMNS = 16384


@dataclass(frozen=True)
class HeadPlan:
    """A path, its tiles, and the reason for it."""

    path: str
    """One of ``PATHS`` but ``"auto"``."""
    reason: str
    """One clause, for people."""
    block_rows: int
    """Tokens whose statistics are taken at once, from whole rows of logits: so every path gives
    the same log-probs to the last bit."""
    tile_rows: int
    """Tokens of the largest tile of logits: the token budget of a chunk of whole pairs in
    ``single_pass``, a tile of the backward pass in ``recompute``, else ``block_rows``."""
    tile_columns: int
    """Vocabulary entries of that tile."""
    kept_tokens: int = 0
    """Tokens of the whole batch, if ``single_pass`` keeps the gradients of all their logits in bf16
    until the backward pass; else 0."""
    engine: str = "torch"
    """What works on tiles between the products: ``"torch"``, ``"triton"`` for its kernels, or
    ``"fused"`` where products and statistics are one kernel and no tile exists."""
    engine_reason: str = ""
    """One clause, where there was a choice."""

    @property
    def gemms(self) -> int:
        """Cost in ``U`` of forward and backward together."""
        return _GEMMS[self.path]

    @property
    def tile_bytes(self) -> int:
        """Bytes of one fp32 logits tile."""
        return 4 * self.tile_rows * self.tile_columns

    @property
    def kept_bytes(self) -> int:
        """Bytes of the gradients of logits that are kept."""
        return 2 * self.kept_tokens * self.tile_columns

    @property
    def chunk_tokens(self) -> int:
        """Token budget of a chunk of whole pairs in ``single_pass``."""
        return self.kept_tokens or self.tile_rows

    def explain(self) -> str:
        """One line: path, cost, tile and reason, and the engine where there was a choice."""
        kept = (
            f"gradients of the logits of {self.kept_tokens} tokens kept = "
            f"{self.kept_bytes / 2**20:.0f} MiB, "
        )
        line = (
            f"{self.path} ({self.gemms}U, {kept if self.kept_tokens else ''}"
            f"tiles of {self.tile_rows} tokens x "
            f"{self.tile_columns} vocabulary entries = {self.tile_bytes / 2**20:.0f} MiB): "
            f"{self.reason}"
        )
        if not self.engine_reason:
            return line
        return f"{line}; engine {self.engine}: {self.engine_reason}"


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
    tokens: int | None = None,
    operand: torch.dtype | None = None,
) -> HeadPlan:
    """Choose a path and an engine.

    Args:
        vocab_size: ``V``.
        device: where the tensors are.
        hidden_grad: a gradient of the hidden states is wanted.
        head_grad: a gradient of the weight or the bias is wanted.
        loss_inside: the caller hands over the loss as well (:func:`fastdaa.pair_loss`).
        coupled: that loss couples all pairs of the batch, so it is not known inside a chunk.
        impl: ``"auto"``, or the path to take; one that cannot serve raises.
        engine: ``"torch"``, ``"triton"``, ``"fused"`` (path ``score`` alone), or ``"auto"``: torch,
            until the Triton kernels have been measured on a GPU.
        max_bytes: bytes of logits held at a time; None for the default of the device.
        tokens: scored tokens of the whole batch, if the caller can keep the gradients of all their
            logits until backward. It does if they take 2 GiB at most, or half of ``max_bytes``.
        operand: dtype of the factors of the products; gradients are kept in bf16 alone.

    Raises:
        ValueError: an unknown ``impl`` or ``engine``, one that cannot serve this call, or a budget
            below one row of logits.
        ImportError: ``engine="triton"`` or ``"fused"`` without the package triton.
    """
    check_choice("impl", impl, PATHS)
    check_choice("engine", engine, ENGINES)
    device = torch.device(device)
    kept = _kept_tokens(vocab_size, max_bytes, tokens, operand) if loss_inside else 0
    coupled = coupled and not kept  # the loss of the whole batch is known in time
    path, reason = _choose(hidden_grad, head_grad, loss_inside, coupled)
    if impl not in ("auto", path):
        _check_explicit(impl, hidden_grad, head_grad, loss_inside, coupled)
        path, reason = impl, "asked for"
    elif path == "single_pass" and kept:
        reason = "the head is trained and the gradients of the batch's logits fit in memory"
    kept = kept if path == "single_pass" else 0
    tiles = _tiles(vocab_size, device, path, max_bytes, kept)
    return HeadPlan(path, reason, *tiles, kept, *_choose_engine(engine, path, device))


def _choose_engine(engine: str, path: str, device: torch.device) -> tuple[str, str]:
    if engine in ("triton", "fused"):
        _check_triton(engine, path, device)
        return engine, "asked for"
    if engine == "torch":
        return "torch", "asked for"
    if device.type != "cuda":
        return "torch", ""
    return "torch", "the Triton kernels are not yet measured on a GPU"


def _check_triton(engine: str, path: str, device: torch.device) -> None:
    if engine == "fused" and path != "score":
        raise ValueError("engine='fused': expected a call without gradient (path 'score'), got "
                         f"path {path!r}; engine='triton' serves all paths")  # fmt: skip
    if path == "reference":
        raise ValueError(f"engine={engine!r}: expected a path with tiles of logits, got "
                         "impl='reference'")  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"engine={engine!r} needs the package triton, which is not installed: "
                          "pip install 'fastdaa[triton]', or engine='torch'")  # fmt: skip
    if device.type == "cuda":
        return
    from fastdaa.kernels.configs import interpreted

    if device.type != "cpu" or not interpreted():
        raise ValueError(f"engine={engine!r}: expected tensors on a CUDA device, got {device} (CPU "
                         "tensors need Triton's interpreter: TRITON_INTERPRET=1)")  # fmt: skip


def _choose(
    hidden_grad: bool, head_grad: bool, loss_inside: bool, coupled: bool
) -> tuple[str, str]:
    if not (hidden_grad or head_grad):
        return "score", "no gradient is wanted"
    if not head_grad:
        return "frozen", "the head is not trained"
    if not loss_inside:
        return "recompute", "the head is trained and the loss lies outside this call"
    if coupled:
        return "recompute", "the loss couples the pairs of the batch"
    return "single_pass", "the head is trained and the loss is known within a chunk of pairs"


def _check_explicit(
    impl: str, hidden_grad: bool, head_grad: bool, loss_inside: bool, coupled: bool
) -> None:
    if impl == "score" and (hidden_grad or head_grad):
        raise ValueError("impl='score' gives no gradient: detach the inputs or use torch.no_grad()")
    if impl == "frozen" and head_grad:
        raise ValueError("impl='frozen' gives the head no gradient: expected weight and bias "
                         "with requires_grad=False")  # fmt: skip
    if impl == "single_pass" and not loss_inside:
        raise ValueError("impl='single_pass' needs the loss: call fastdaa.pair_loss")
    if impl == "single_pass" and coupled:
        raise ValueError("impl='single_pass' cannot serve a loss that couples the pairs of the "
                         "batch: expected 'recompute', 'frozen' or 'auto'")  # fmt: skip


def _kept_tokens(
    vocab_size: int, max_bytes: int | None, tokens: int | None, operand: torch.dtype | None
) -> int:
    """``tokens`` if the gradients of their logits may be kept, else 0."""
    if tokens is None or operand != torch.bfloat16:
        return 0
    budget = _KEPT_BYTES if max_bytes is None else max_bytes // 2
    return tokens if 2 * vocab_size * tokens <= budget else 0


def _tiles(
    vocab_size: int, device: torch.device, path: str, max_bytes: int | None, kept: int
) -> tuple[int, int, int]:
    on_cpu = device.type == "cpu"
    budget, held = _CPU_BYTES if on_cpu else _DEVICE_BYTES
    row = 4 * vocab_size
    if max_bytes is not None:
        # Beside gradients that are kept, a tile has the other half.
        budget, held = min(budget, max_bytes // 2) if kept else max_bytes, max_bytes
        if max_bytes < row:
            raise ValueError(
                f"max_bytes: expected at least {row} (one fp32 row of {vocab_size} logits), "
                f"got {max_bytes}"
            )
    block = max(budget // row, 1)
    block = min(block, _CPU_BLOCK_ROWS) if on_cpu else block
    if path == "single_pass" and not kept:
        return block, max(held // row, 1), vocab_size
    if path != "recompute":
        return block, block, vocab_size
    columns = min(vocab_size, _CPU_COLUMNS if on_cpu else _DEVICE_COLUMNS)
    return block, max(budget // (4 * columns), 1), columns
