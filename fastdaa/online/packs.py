"""Prompts and completions packed back to back, without padding, and where their tokens lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdaa.data.packing import pack_by_length
from fastdaa.data.packs import packed
from fastdaa.online.ranks import most, share


def make_packs(
    prompt_ids: Sequence[Tensor],
    completion_ids: Sequence[Tensor],
    *,
    tokens_per_pack: int | None = None,
    attention: str = "auto",
    device: torch.device | str = "cpu",
    only: Sequence[int] | None = None,
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Packs of whole sequences, each with the numbers of its sequences ``[s]`` int64 (ascending).

    A pack is what :func:`fastdaa.train.backbone.run_head_task` takes: ``input_ids`` and
    ``position_ids`` ``[1, L]``, ``segments``, and of the scored tokens (all completion tokens, in
    order) ``rows`` and ``targets`` ``[n]``, ``lengths`` ``[s]`` and ``counts``; also ``tokens``,
    the length ``L``.

    Args:
        prompt_ids, completion_ids: ``S`` tensors ``[n]`` int64, none empty.
        tokens_per_pack: prompts and completions of one pack; a longer sequence is one by itself.
            None for a single pack.
        attention: one of ``fastdaa.train.segment_backends.BACKENDS``, or ``"auto"``.
        only: the numbers of the sequences that are wanted; None for all.
    """
    prompts, completions = (
        [np.asarray(ids, dtype=np.int64) for ids in side] for side in (prompt_ids, completion_ids)
    )
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    wanted = list(range(len(sizes))) if only is None else list(only)
    groups = [wanted] if wanted else []
    if tokens_per_pack is not None:
        found = pack_by_length([sizes[i] for i in wanted], tokens_per_pack)
        groups = [[wanted[i] for i in group] for group in found]
    packs = []
    for group in groups:
        pack = packed([prompts[i] for i in group], [completions[i] for i in group])
        pack["segments"]["backend"] = attention
        packs.append((torch.tensor(group), to_device(pack, device)))
    return packs


def packs_of_process(
    prompt_ids: Sequence[Tensor],
    completion_ids: Sequence[Tensor],
    *,
    device: torch.device,
    in_step: bool,
    **options: Any,
) -> list[tuple[Tensor, dict[str, Any]]]:
    """As :func:`make_packs`, of this process's share of the sequences.

    Args:
        in_step: every process gets as many packs, since each is a collective. What a process has
            too many is marked ``"counted": False``; the shortest sequence does for that.
    """
    sizes = [len(p) + len(c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    options |= {"device": device}
    packs = make_packs(prompt_ids, completion_ids, only=share(sizes), **options)
    lacking = most(len(packs), device) - len(packs) if in_step else 0
    if lacking:
        shortest = min(range(len(sizes)), key=sizes.__getitem__)
        ((sequences, pack),) = make_packs(prompt_ids, completion_ids, only=[shortest], **options)
        packs += [(sequences, {**pack, "counted": False})] * lacking
    return packs


def to_device(pack: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The pack with its tensors on ``device``; lengths on the host stay there."""
    if torch.device(device).type == "cpu":
        return pack
    moved: dict[str, Any] = {}
    for name, value in pack.items():
        if isinstance(value, dict):
            moved[name] = to_device(value, device)
        else:
            moved[name] = value.to(device) if isinstance(value, Tensor) else value
    return moved


def token_index(lengths: Tensor, sequences: Tensor) -> Tensor:
    """``[n]`` int64: where the tokens of some sequences lie in ``[N]``, in the order asked for.

    Args:
        lengths: ``[S]`` int64 of all sequences, on the CPU.
        sequences: ``[s]`` int64.
    """
    starts = lengths.cumsum(0) - lengths
    counts = lengths[sequences]
    within = torch.arange(int(counts.sum())) - torch.repeat_interleave(
        counts.cumsum(0) - counts, counts
    )
    return torch.repeat_interleave(starts[sequences], counts) + within
