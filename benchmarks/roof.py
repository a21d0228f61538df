"""The roof of this machine, measured in the same run: products a second and bytes a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fastdaa.benchmarks.cost_model import Cost
from fastdaa.benchmarks.measure import time_once
from fastdaa.benchmarks.wording import three_digits

_ROUNDS = 5
# A GPU that was idle takes a moment to reach its clocks, and a little longer to be held back by
# its power limit, as it is while contenders are timed.
_WARM_UP_SECONDS = {"cpu": 0.0, "cuda": 0.3}
# Large enough for the best rate, small enough for a moment.
_PRODUCT = {"cpu": 1536, "cuda": 8192}
_COPIED = {"cpu": 256 << 20, "cuda": 4 << 30}


@dataclass(frozen=True)
class Roof:
    """What the hardware gave to a square matrix product and to a copy."""

    flops: dict[str, float]
    """FLOP a second by dtype."""
    bandwidth: float
    """Bytes a second, reads and writes of a copy together."""

    def seconds(self, cost: Cost) -> float | None:
        """Products and the passes between them one after the other; None for a dtype that was not
        measured."""
        rate = self.flops.get(cost.dtype)
        return None if rate is None else cost.flop / rate + cost.bytes / self.bandwidth

    @property
    def words(self) -> str:
        """In one line, such as ``bfloat16 742 TFLOP/s, copies 4.21 TB/s``."""
        rates = [f"{name} {three_digits(rate / 1e12)} TFLOP/s" for name, rate in self.flops.items()]
        return ", ".join([*rates, f"copies {three_digits(self.bandwidth / 1e12)} TB/s"])


def measure_roof(device: str, dtypes: tuple[str, ...]) -> Roof:
    """Median rates over a few runs: ``[n, n] x [n, n]^T``, the layout of a head's logits (in fp16,
    a CPU takes ten times as long for the other), in every dtype with n = 8192 on CUDA and 1536 on
    CPU, and a copy of 4 GiB (CPU: 256 MiB; a quarter of what a smaller device has free). On CUDA
    each is repeated for 0.3 s before it is timed."""
    size = _PRODUCT[device]
    flops = {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _median(partial(torch.mm, a, b.t(), out=out), device)
        flops[dtype] = 2 * size**3 / seconds
    copied = _COPIED[device]
    if device == "cuda":
        copied = min(copied, torch.cuda.mem_get_info()[0] // 4)
    source = torch.zeros(copied // 4, device=device)
    target = torch.empty_like(source)
    seconds = _median(lambda: target.copy_(source), device)
    return Roof(flops, 2 * source.nbytes / seconds)


def _median(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    while True:
        time_once(run, device)
        if time.perf_counter() - began >= _WARM_UP_SECONDS[device]:
            break
    return statistics.median(time_once(run, device) for _ in range(_ROUNDS))
