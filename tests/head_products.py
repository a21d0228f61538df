"""FLOP of the matrix products that a head makes."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class HeadProducts(TorchDispatchMode):
    """Counts the FLOP of products with a side of ``vocab_size``."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.flop = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::mm", "aten::addmm")):
            a, b = args[-2:]
            if self.vocab_size in (*a.shape, *b.shape):
                self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))
