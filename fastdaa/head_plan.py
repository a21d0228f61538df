"""What was decided for a call on the head: a path, an engine, tiles, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

from fastdaa.paths import GEMMS


@dataclass(frozen=True)
class HeadPlan:
    """A path, its tiles, and the reason for it.

    Attributes:
        path: One of ``PATHS`` but ``"auto"``.
        reason: One clause, for people.
        block_rows: Tokens whose statistics are taken at once, as many on all paths: so every one
            gives the same log-probs to the last bit.
        tile_rows: Tokens of the largest tile of logits: a tile of the backward pass where it
            computes logits again; the token budget of a chunk of whole pairs in a ``single_pass``
            that keeps no gradients; else ``block_rows``.
        tile_columns: Vocabulary entries of that tile.
        extra_bytes: The most that the call holds beyond its inputs, the gradients that it returns
            and a few numbers a token, as far as its sizes were given; not counted (0) for
            ``reference``.
        kept_tokens: Tokens the gradients of whose logits ``single_pass`` keeps in bf16 at a time;
            0 for none.
        kept_columns: Vocabulary entries of these gradients. Where they are not all, backward
            computes the logits of the others again.
        kept_whole: Those are all tokens of the batch, and they are kept until the backward pass.
            If not, they are a chunk of whole pairs, kept until its loss is known.
        hidden_rows: Tokens whose gradient of the hidden states ``recompute`` makes at once, apart
            from the head's; 0 where both are made of the same tiles.
        hidden_columns: Vocabulary entries of the tiles that it is made of.
        packs_sum: ``recompute`` sums the gradient of the hidden states in the memory of what it
            returns, see :mod:`fastdaa.waiting_rows`.
        engine: What works on tiles between the products: ``"torch"``, ``"triton"`` for its
            kernels, or ``"fused"`` where products and statistics are one kernel and no tile
            exists.
        engine_reason: One clause, where there was a choice.
        sparse: Tokens with a coefficient of 0 are left out of the products that make gradients; a
            GPU's host waits to learn their number.
        divergence: Logits of two heads are compared.
        vocab_size: ``V``, or the slice of it that a process has.
        hidden_grad, head_grad: A gradient of the hidden states, of weight or bias is wanted.
    """

    path: str
    reason: str
    block_rows: int
    tile_rows: int
    tile_columns: int
    extra_bytes: int = 0
    kept_tokens: int = 0
    kept_columns: int = 0
    kept_whole: bool = False
    hidden_rows: int = 0
    hidden_columns: int = 0
    packs_sum: bool = False
    engine: str = "torch"
    engine_reason: str = ""
    sparse: bool = False
    divergence: bool = False
    vocab_size: int = 0
    hidden_grad: bool = True
    head_grad: bool = True

    @property
    def gemms(self) -> float:
        """Cost in ``U`` of forward and backward together, a whole number unless a part of the
        logits is computed again."""
        if self.path != "reference" and not (self.hidden_grad or self.head_grad):
            return 1 + self.divergence  # no backward pass
        # The reference's logits, wherever the policy's are computed.
        more = (2 if self.path == "recompute" else 1) if self.divergence else 0
        again = 1 - self.kept_columns / self.vocab_size if self.keeps_part else 0
        if self.path in ("single_pass", "recompute"):
            more -= not (self.hidden_grad and self.head_grad)
        if self.hidden_rows and self.head_grad:  # logits once for each of the two gradients
            more += 1
        return GEMMS[self.path] + more + again

    @property
    def keeps_part(self) -> bool:
        """Gradients of some of the logits are kept."""
        return 0 < self.kept_columns < self.vocab_size

    @property
    def tile_bytes(self) -> int:
        """Bytes of one fp32 logits tile."""
        return 4 * self.tile_rows * self.tile_columns

    @property
    def kept_bytes(self) -> int:
        """Bytes of the gradients of logits that are kept."""
        return 2 * self.kept_tokens * self.kept_columns

    @property
    def chunk_tokens(self) -> int:
        """Token budget of a chunk of whole pairs in ``single_pass``."""
        return self.kept_tokens or self.tile_rows

    def explain(self) -> str:
        """One line: path, cost, tiles, memory, reason, and the engine if there was a choice."""
        part = f"{self.kept_columns} of {self.vocab_size}" if self.keeps_part else "the"
        kept = f"gradients of {part} logits of {self.kept_tokens} tokens kept = "
        kept += f"{_mib(self.kept_bytes)}, "
        tiles = (
            f"tiles of {self.tile_rows} tokens x "
            f"{self.tile_columns} vocabulary entries = {_mib(self.tile_bytes)}"
        )
        if self.engine == "fused":
            tiles = "no tiles of logits"
        if self.hidden_rows and self.head_grad:  # one U more than the path is known for
            tiles += f", gradient of the hidden states apart, {self.hidden_rows} tokens at a time"
        held = f"{tiles}, at most {_mib(self.extra_bytes)} in all"
        if self.path == "reference":
            held = "all logits at once"
        kept = kept if self.kept_tokens else ""
        line = f"{self.path} ({self.gemms:.3g}U, {kept}{held}): {self.reason}"
        if not self.engine_reason:
            return line
        return f"{line}; engine {self.engine}: {self.engine_reason}"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
