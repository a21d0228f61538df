"""The truth of a case in fp64, and the same computation as plain PyTorch does it in fp32.

Gradients are held against the truth in ``PROBES`` random directions: with ``R [D, 8]`` normal,
``||(dW - truth) R||`` over ``||truth R||`` estimates the relative Frobenius error, every entry of
dW takes part, and the truth costs one fp64 product of the head instead of three. Each row of dW (a
vocabulary entry) and of dH (a token) also has an error of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastdaa.benchmarks.inputs import HeadInputs
from fastdaa.benchmarks.pair_objectives import pair_objective

PROBES = 8
_TILE_BYTES = {"cpu": 128 << 20, "cuda": 4 << 30}
# A tile has some five of its size beside it, and all tiles of a loss are kept.
_FREE_SHARE = 16


class Answer(NamedTuple):
    """What a case asks for. Gradients are None where it wants none."""

    logps: Tensor
    """``[N]``."""
    loss: Tensor | None
    """Scalar, or None for ``"logps"`` and ``"score"``."""
    coefficients: Tensor | None
    """``[N]``: derivative of what is differentiated by the log-probs."""
    dh: Tensor | None
    """``[N, 8]`` of the truth: the gradient of the hidden states times ``probes``. ``[N, D]`` of
    plain PyTorch."""
    dw: Tensor | None
    """``[V, 8]`` or ``[V, D]``, likewise."""
    entropy: float
    """Mean entropy of the predictions, in nats."""
    largest_logit: float
    """Largest absolute final logit."""


class Truth(NamedTuple):
    """The answer in fp64, and the directions of its gradients."""

    answer: Answer
    probes: Tensor
    """``[D, 8]``."""


@torch.no_grad()
def find_truth(inputs: HeadInputs) -> Truth:
    """Log-probs, loss, and gradients in random directions, from fp64 copies of the inputs."""
    hidden, weight = inputs.hidden.double(), inputs.weight.double()
    generator = torch.Generator(inputs.device).manual_seed(1)
    shape = (inputs.case.hidden, PROBES)
    probes = torch.randn(shape, generator=generator, device=inputs.device, dtype=torch.float64)
    return Truth(_solve(inputs, hidden, weight, hidden @ probes, weight @ probes), probes)


@torch.no_grad()
def plain_pytorch(inputs: HeadInputs, *, round_logits: bool) -> Answer:
    """The case in fp32 with materialised logits, one tile of rows after the other.

    Args:
        round_logits: logits are rounded to the dtype of the inputs before the softmax, as
            ``(hidden @ weight.T).float()`` does; without, they stay fp32.

    Returns:
        The answer; gradients rounded once, to the dtype of the inputs.
    """
    hidden, weight = inputs.hidden.float(), inputs.weight.float()
    rounded = inputs.hidden.dtype if round_logits else None
    answer = _solve(inputs, hidden, weight, hidden, weight, rounded)
    dh, dw = (None if g is None else g.to(inputs.hidden.dtype) for g in (answer.dh, answer.dw))
    return answer._replace(dh=dh, dw=dw)


class _Tile(NamedTuple):
    """A few rows after the softmax."""

    rows: slice
    logps: Tensor
    dz: Tensor
    """``[r, V]``: derivative of each log-prob by the raw products."""
    entropy: float
    largest: float


def _solve(
    inputs: HeadInputs,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    hidden_factor: Tensor,  # [N, K]: what the gradient of the weight is made of
    weight_factor: Tensor,  # [V, K]: the same for the hidden states
    rounded: torch.dtype | None = None,
) -> Answer:
    case = inputs.case
    tiles: Iterable[_Tile] = _tiles(inputs, hidden, weight, rounded)
    logps = weight.new_empty(case.tokens)
    loss = coefficients = None
    if case.is_loss:  # its coefficients are known after the last tile
        tiles = list(tiles)
        for tile in tiles:
            logps[tile.rows] = tile.logps
        loss, coefficients = _loss_and_coefficients(inputs, logps)
    elif case.wants_grad:
        coefficients = inputs.cotangent.to(logps.dtype)
        if case.work == "ce":
            coefficients = torch.full_like(logps, -1 / case.tokens)
    dh = torch.zeros_like(hidden_factor) if case.wants_grad else None
    dw = torch.zeros_like(weight_factor) if case.wants_head_grad else None
    entropy = largest = 0.0
    for tile in tiles:
        rows = tile.rows
        logps[rows] = tile.logps
        entropy, largest = entropy + tile.entropy, max(largest, tile.largest)
        if dh is not None and coefficients is not None:
            dz = tile.dz.mul_(coefficients[rows, None])
            dh[rows] = dz @ weight_factor
            if dw is not None:
                dw.addmm_(dz.T, hidden_factor[rows])
    if case.work == "ce":
        loss = -logps.mean()
    return Answer(logps, loss, coefficients, dh, dw, entropy / case.tokens, largest)


def _tiles(
    inputs: HeadInputs, hidden: Tensor, weight: Tensor, rounded: torch.dtype | None
) -> Iterator[_Tile]:
    case = inputs.case
    size = max(_tile_bytes(inputs.device) // (case.vocab * hidden.element_size()), 1)
    for start in range(0, case.tokens, size):
        rows = slice(start, min(start + size, case.tokens))
        targets = inputs.targets[rows, None]
        z = hidden[rows] @ weight.T
        if rounded is not None:
            z = z.to(rounded).to(hidden.dtype)
        slope = None
        if case.softcap is not None:
            z = torch.tanh(z / case.softcap)
            slope = 1 - z.square()
            z *= case.softcap
        log_p = torch.log_softmax(z, dim=1)
        largest = float(z.abs().amax())
        del z
        p = log_p.exp()
        logps = log_p.gather(1, targets)[:, 0]
        entropy = -float(log_p.mul_(p).sum(dtype=torch.float64))
        # 1 - p would round to 0 for a confident target.
        dz = p.neg_().scatter_(1, targets, -torch.expm1(logps)[:, None])
        yield _Tile(rows, logps, dz if slope is None else dz.mul_(slope), entropy, largest)


def _tile_bytes(device: torch.device) -> int:
    """Less than usual where the device has not much left."""
    most = _TILE_BYTES[device.type]
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what is cached is free, too
        most = min(most, torch.cuda.mem_get_info(device)[0] // _FREE_SHARE)
    return most


def _loss_and_coefficients(inputs: HeadInputs, logps: Tensor) -> tuple[Tensor, Tensor]:
    assert inputs.ref_logps is not None
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        ref_logps = inputs.ref_logps.to(logps.dtype)
        loss = pair_objective(inputs.case.work, leaf, ref_logps, inputs.lengths)
        (coefficients,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), coefficients
