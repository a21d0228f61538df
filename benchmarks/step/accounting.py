"""Tokens and floating-point operations of a step, and what share of the machine they use.

Only matrix products with weights are counted (two operations a weight and token); attention over
keys, norms and the optimizer are left out, so that utilisations are lower bounds. With P_body and
P_head from :mod:`fastdaa.benchmarks.step.model`:

- useful tokens T: prompt + chosen + rejected of every pair, the prompt once; scored tokens S:
  chosen + rejected. Useful work = k (P_body T + P_head S), with k = 6 for full fine-tuning (forward
  2, gradients of activations 2, of weights 2) and 4 for LoRA (frozen weights need no gradient).
  MFU = useful work / (seconds x measured GEMM rate). Reference and recomputation are not useful.
- hardware tokens: what the contender puts through the backbone and the head, padding and repeated
  prompts included. Hardware work = (k + 2 if the reference runs in the step + 2 if activations are
  recomputed, backbone only) x weights x those tokens. HFU likewise. What a fused head recomputes
  inside itself is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastdaa.benchmarks.step.contenders import Contender
from fastdaa.benchmarks.step.model import Parameters
from fastdaa.benchmarks.step.pairs import PairLengths


class Tokens(NamedTuple):
    """Of some batches."""

    useful: int
    scored: int
    backbone: int
    """Through the policy's backbone in one forward, padding and repeated prompts included."""
    head: int
    """Rows that the head projects in one forward."""


def count(contender: Contender, pairs: Sequence[PairLengths], batch: int, device: str) -> Tokens:
    """Tokens of the batches that ``pairs`` are cut into."""
    batches = [pairs[i : i + batch] for i in range(0, len(pairs), batch)]
    padded = sum(2 * len(rows) * max(pair.widest for pair in rows) for rows in batches)
    useful = sum(sum(pair) for pair in pairs)
    scored = sum(pair.chosen + pair.rejected for pair in pairs)
    backbone = {
        "padded": padded,
        "packed": useful + sum(pair.prompt for pair in pairs),
        "prefix_shared": useful,
    }[contender.layout]
    # TRL drops unscored positions before its head on CUDA only; the last position predicts nothing.
    everywhere = contender.library == "trl" and device == "cpu"
    return Tokens(useful, scored, backbone, padded - 2 * len(pairs) if everywhere else scored)


class Work(NamedTuple):
    """Floating-point operations."""

    useful: float
    hardware: float


def work(
    tokens: Tokens, weights: Parameters, *, lora: bool, online_reference: bool, recomputed: bool
) -> Work:
    """Operations of the batches that ``tokens`` were counted in."""
    trained = 4 if lora else 6
    done = trained + (2 if online_reference else 0)
    useful = trained * (weights.body * tokens.useful + weights.head * tokens.scored)
    backbone = (done + (2 if recomputed else 0)) * weights.body * tokens.backbone
    return Work(float(useful), float(backbone + done * weights.head * tokens.head))


def measured_rate(device: str, threads: int) -> float:
    """Floating-point operations a second of a large matrix product: the roof of this run.

    fp32 on CPU with ``threads`` threads, bf16 on CUDA.
    """
    import torch

    from fastdaa.benchmarks.roof import measure_roof

    dtype = "bfloat16" if device == "cuda" else "float32"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return measure_roof(device, (dtype,)).flops[dtype]
    finally:
        torch.set_num_threads(before)
        if device == "cuda":
            torch.cuda.empty_cache()  # the contenders' processes need the memory
