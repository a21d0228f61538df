"""Prompts and completions packed back to back, without padding, and models run on such packs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdaa.data import layouts
from fastdaa.data.packing import pack_by_length


def make_packs(
    prompt_ids: Sequence[Tensor],
    completion_ids: Sequence[Tensor],
    *,
    tokens_per_pack: int | None = None,
    attention: str = "auto",
    device: torch.device | str = "cpu",
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
    """
    prompts, completions = (
        [np.asarray(ids, dtype=np.int64) for ids in side] for side in (prompt_ids, completion_ids)
    )
    sizes = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    everything = [list(range(len(sizes)))]
    groups = everything if tokens_per_pack is None else pack_by_length(sizes, tokens_per_pack)
    packs = []
    for group in groups:
        pack = _pack([prompts[i] for i in group], [completions[i] for i in group], attention)
        packs.append((torch.tensor(group), to_device(pack, device)))
    return packs


def _pack(
    prompts: list[np.ndarray], completions: list[np.ndarray], attention: str
) -> dict[str, Any]:
    prompt_len = np.array([len(ids) for ids in prompts])
    completion_len = np.array([len(ids) for ids in completions])
    query_len = prompt_len + completion_len
    start = layouts.exclusive_cumsum(query_len)
    spans = layouts.Spans(start, prompt_len, start + prompt_len, completion_len, start, query_len)
    pieces = [piece for pair in zip(prompts, completions, strict=True) for piece in pair]
    input_ids = torch.from_numpy(np.concatenate(pieces))
    rows, predicted, lengths = layouts.scored_tokens(spans)
    boundaries = np.zeros(len(query_len) + 1, dtype=np.int32)
    np.cumsum(query_len, out=boundaries[1:])
    cu = torch.from_numpy(boundaries)
    return {
        "input_ids": input_ids[None],
        "position_ids": torch.from_numpy(layouts.position_ids(spans))[None],
        "segments": {
            "cu_q": cu,
            "cu_k": cu,
            "kv_index": torch.arange(len(input_ids)),
            "q_lens": query_len.tolist(),
            "k_lens": query_len.tolist(),
            "backend": attention,
        },
        "rows": torch.from_numpy(rows),
        "targets": input_ids[torch.from_numpy(predicted)],
        "lengths": torch.from_numpy(lengths),
        "counts": lengths.tolist(),
        "tokens": len(input_ids),
    }


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
