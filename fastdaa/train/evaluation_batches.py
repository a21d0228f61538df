"""Which rows the processes of an evaluation see: all of them, each once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fastdaa.train.base import PairTrainer


@contextlib.contextmanager
def every_row_once(trainer: PairTrainer) -> Iterator[None]:
    """Loaders that are made here deal out the batches of one process in turn, the last as it is.

    By themselves they would repeat rows of the beginning until all processes have as many, or drop
    the last ones under ``dataloader_drop_last``.
    """
    accelerator, args = trainer.accelerator, trainer.args
    before = accelerator.even_batches, args.dataloader_drop_last
    accelerator.even_batches, args.dataloader_drop_last = False, False
    try:
        yield
    finally:
        accelerator.even_batches, args.dataloader_drop_last = before


class BatchesInStep:
    """The batches of a loader, as many on every process: there, a forward is a collective.

    Where a process has fewer than others, one of its batches comes again with ``"counted": 0``,
    which says that nothing of it counts.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator):
        self.loader, self.accelerator = loader, accelerator
        self.dataset = loader.dataset

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        mine = torch.tensor(len(self.loader), device=self.accelerator.device)
        most = int(self.accelerator.gather(mine).max())
        batch, count = None, 0
        for batch in self.loader:
            yield batch
            count += 1
        if batch is None:
            rows: Any = self.dataset
            batch = self.loader.collate_fn(rows.__getitems__([0]))
        for _ in range(count, most):
            yield {**batch, "counted": 0}
