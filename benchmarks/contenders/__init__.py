"""Who is compared. A contender is a small adapter (:mod:`.base`); ``ALL`` is the whole field."""

from __future__ import annotations

from fastdaa.benchmarks.contenders import cce
from fastdaa.benchmarks.contenders.base import Absent, Contender, Outputs, TokenScorer
from fastdaa.benchmarks.contenders.fastdaa import ENGINES_OF, LESS_BYTES, Fastdaa
from fastdaa.benchmarks.contenders.liger import FusedLinearCrossEntropy, FusedLinearDPO
from fastdaa.benchmarks.contenders.pytorch import (
    Compiled,
    LinearCrossEntropy,
    Materialised,
    MaterialisedWide,
)
from fastdaa.benchmarks.contenders.quack import Quack
from fastdaa.benchmarks.contenders.trl import FusedHead

__all__ = ["ALL", "Absent", "Contender", "Outputs", "TokenScorer"]

ALL: list[Contender] = [
    Materialised(),
    MaterialisedWide(),
    Compiled(),
    LinearCrossEntropy(),
    FusedHead(),
    FusedHead(metrics=True),
    FusedLinearDPO(),
    FusedLinearCrossEntropy(),
    *cce.CONTENDERS,
    Quack(),
    *(
        Fastdaa(path, engine)
        for engine in ("torch", "triton", "fused")
        for path, engines in ENGINES_OF.items()
        if engine in engines
    ),
    *(Fastdaa("recompute", engine, max_bytes=64 << 20) for engine in ("torch", "triton")),
    *(
        Fastdaa(path, engine, max_bytes=LESS_BYTES, kinds=())
        for engine in ("torch", "triton")
        for path in ("score", "frozen", "single_pass", "recompute")
    ),
]
"""In the order of tables."""
