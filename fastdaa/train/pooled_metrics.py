"""Metrics of an evaluation: every pair or token counts the same, in whatever batch it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from fastdaa.train.metrics import MetricStore, Sums, peak_gib

if TYPE_CHECKING:
    from accelerate import Accelerator


class PooledStore(MetricStore):
    """Sums of a whole evaluation in fp64, over all batches of all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = MetricStore()

    def end_batch(self, batch: Mapping[str, Any]) -> None:
        """Close the micro-batch."""
        for sums in self.batch.values():
            self.pool.add(Sums(sums.names, sums.totals.double(), sums.counts))
        self.batch = {}
        self.throughput.add(batch)

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """The averages over all pairs of all processes; starts a new evaluation.

        Every process has to call it, and waits here for the others. One that had no batch does not
        know the names of the metrics, so sums are gathered by name.
        """
        rows, self.pool = [*self.pool.batch.values()], MetricStore()
        own = {
            name: (total, count)
            for sums in rows
            for name, total, count in zip(
                sums.names, sums.totals.tolist(), sums.counts, strict=True
            )
        }
        parts = gather_object([(own, self.throughput.counts(), peak_gib())])
        found: dict[str, list[tuple[float, float]]] = {}
        for sums_of, _, _ in parts:
            for name, pair in sums_of.items():
                found.setdefault(name, []).append(pair)
        values = {name: _mean(pairs) for name, pairs in found.items()}
        counts = [sum(column) for column in zip(*(part[1] for part in parts), strict=True)]
        values |= self.throughput.read(*counts)
        return values | {"memory/peak_gib": max(peak for *_, peak in parts)}


def _mean(sums: list[tuple[float, float]]) -> float:
    total, count = (sum(column) for column in zip(*sums, strict=True))
    return total / count if count > 0 else float("nan")
