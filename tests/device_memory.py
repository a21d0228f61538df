"""What a call would hold on a GPU, counted on meta tensors: real shapes, no data, no GPU.

Meta tensors take the code paths of CUDA tensors (half-precision factors, fp32 results). Counted are
tensors' storages while they live, and the FLOP of products; not what a library takes for itself
inside an operation. Triton's kernels are not run: their outputs exist, which is all that counts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")


class HeldBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that are still alive; FLOP of products."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}  # by address: its number
        self._sizes: list[int] = []  # by number
        self._seen: list[list[int]] = []  # numbers alive after every operation
        self.flop = 0
        self.active = 1.0
        """Share of the entries that ``nonzero`` is to find."""
        self.questions = 0
        """How often ``nonzero`` was asked, for which the host waits."""

    def restart(self) -> None:
        """Forget what was held so far."""
        self._seen, self.flop = [], 0

    def number(self, tensor: Tensor) -> int:
        """Of the storage of a tensor."""
        return self._alive[tensor.untyped_storage()._cdata][1]

    def peak(self, without: list[Tensor]) -> int:
        """The most bytes alive at a time, other than those of some tensors."""
        left_out = {self.number(t) for t in without}
        return max(sum(self._sizes[i] for i in seen if i not in left_out) for seen in self._seen)

    @property
    def highest(self) -> int:
        """The most bytes alive at a time."""
        return self.peak([])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name()
        if name.startswith(("aten::mm", "aten::addmm")):
            a, b = args[:2] if name.startswith("aten::mm") else args[1:3]
            self.flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        if name == "aten::addmm.dtype_out":  # in place; the meta kernel makes a copy
            return kwargs["out"]
        if name == "aten::segment_reduce":  # has no meta kernel
            segments, columns = kwargs["lengths"].shape, args[0].shape[1:]
            result = args[0].new_empty(segments + columns)
        elif name == "aten::nonzero":  # its size is that of the data
            self.questions += 1
            result = torch.empty(int(self.active * args[0].shape[0]), 1, dtype=torch.int64,
                                 device=META)  # fmt: skip
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                key = storage._cdata
                if key not in self._alive or self._alive[key][0].expired():
                    self._alive[key] = (StorageWeakRef(storage), len(self._sizes))
                    self._sizes.append(storage.nbytes())
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self._seen.append([number for _, number in self._alive.values()])
        return result


@contextlib.contextmanager
def counted() -> Iterator[HeldBytes]:
    """Meta tensors in the place of CUDA tensors, Triton's kernels without a launch."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fastdaa import planner

    def autocast(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    with (
        patch.object(torch, "autocast", autocast),
        patch.object(torch, "is_autocast_enabled", lambda *_: False),
        patch.object(planner, "_check_triton", lambda *_: None),
        patch.object(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata),
        patch.object(InterpretedFunction, "run", lambda *_, **__: None),
        patch.object(JITFunction, "run", lambda *_, **__: None),
        HeldBytes() as held,
    ):
        yield held
