"""Variants of the score, divergence and objective kernels that are compiled ahead of time.

Part of ``aot_entries.ENTRIES``; see ``aot.Entry``.
"""

from __future__ import annotations

from typing import Any

from fastdaa.kernels.aot import TARGETS, Entry
from fastdaa.kernels.divergence import _merge_gaps_kernel, _sum_gaps_kernel
from fastdaa.kernels.jensen_shannon import _sum_js_kernel, _sum_splits_kernel
from fastdaa.kernels.merge_splits import _merge_splits_kernel
from fastdaa.kernels.objective import _evaluate_pairs_kernel, _evaluate_tokens_kernel
from fastdaa.kernels.objective_functions import PAIR_OBJECTIVES, TOKEN_OBJECTIVES
from fastdaa.kernels.score import _score_tiles_kernel
from fastdaa.kernels.score_configs import (
    DIVERGENCE_CONFIGS,
    ODD_ROWS,
    SCORE_CONFIGS,
    TileConfig,
)


def _tables(
    table: dict[Any, TileConfig], half: bool, long: bool, odd: bool = False
) -> dict[TileConfig, list[str]]:
    """Every configuration with the targets that it has to compile for.

    Other architectures take the entry of sm_80 where the copy engine cannot read the operands.
    """
    if odd:
        return {ODD_ROWS[half]: list(TARGETS)}
    found: dict[TileConfig, list[str]] = {}
    for target, architecture in TARGETS.items():
        for config in dict.fromkeys((table[architecture, half, long], table[80, half, long])):
            found.setdefault(config, []).append(target)
    return found


def _operand(config: TileConfig, block: int, dtype: str) -> str:
    return f"tensordesc<{dtype}[{block}, {config.block_d}]>" if config.tma else f"*{dtype}:16"


def _sizes(config: TileConfig, even: bool) -> dict[str, Any]:
    return {
        "SPLIT_V": config.split_v, "BLOCK_N": config.block_n, "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d, "GROUP_N": config.group_n, "PARTS": config.parts,
        "EVEN_D": even, "USE_TMA": config.tma,
    }  # fmt: skip


def _entry(
    name: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    config: TileConfig,
    targets: list[str],
    dtype: str,
) -> Entry:
    uses = ("wgmma",) * (dtype != "fp32") + ("tma",) * config.tma
    return Entry(
        name, kernel, arguments, constants, config.num_warps, config.num_stages, tuple(targets),
        uses, config.maxnreg,
    )  # fmt: skip


def _given(**arguments: str | None) -> tuple[dict[str, str], dict[str, None]]:
    """Arguments that are there, and those that are None."""
    present = {name: kind for name, kind in arguments.items() if kind is not None}
    return present, {name: None for name, kind in arguments.items() if kind is None}


def _score(
    name: str, dtype: str = "bf16", cap: bool = False, stats: bool = False, even: bool = True
) -> list[Entry]:
    made, m = [], ":16" if even else ""
    for config, targets in _tables(SCORE_CONFIGS, dtype != "fp32", cap or stats, not even).items():
        arguments, absent = _given(
            hidden=_operand(config, config.block_n, dtype),
            weight=_operand(config, config.block_v, dtype),
            bias_ptr="*bf16:16" if cap else None, targets_ptr="*i64:16", states_ptr="*fp32:16",
            N="i32", V="i32", D=f"i32{m}", stride_hn=f"i32{m}", stride_wv=f"i32{m}",
            inner="fp32" if cap else None, outer="fp32" if cap else None,
        )  # fmt: skip
        shape = f"{config.block_n}x{config.block_v}x{config.block_d}"
        name_of = f"score/{name}/{shape}{'-tma' if config.tma else ''}"
        constants = {**absent, **_sizes(config, even), "STATS": stats}
        made.append(
            _entry(name_of, _score_tiles_kernel, arguments, constants, config, targets, dtype)
        )
    return made


def _divergence(
    name: str, kernel: Any, dtype: str = "bf16", cap: bool = False, even: bool = True
) -> list[Entry]:
    made, m = [], ":16" if even else ""
    rows = {"rows_ptr": "*fp32:16", "sums_ptr": "*fp32:16"}
    out = rows if kernel is _sum_js_kernel else {"states_ptr": "*fp32:16"}
    long = cap or kernel is _sum_js_kernel
    extra = dict.fromkeys(("inner", "outer", "ref_inner", "ref_outer"), "fp32" if cap else None)
    for config, targets in _tables(DIVERGENCE_CONFIGS, dtype != "fp32", long, not even).items():
        hidden, weight = (_operand(config, b, dtype) for b in (config.block_n, config.block_v))
        arguments, absent = _given(
            hidden=hidden, weight=weight, ref_hidden=hidden, ref_weight=weight,
            bias_ptr="*bf16:16" if cap else None, ref_bias_ptr="*bf16:16" if cap else None,
            N="i32", V="i32", D=f"i32{m}", ref_D=f"i32{m}", **out, **extra,
        )  # fmt: skip
        shape = f"{config.block_n}x{config.block_v}x{config.block_d}"
        name_of = f"divergence/{name}/{shape}{'-tma' if config.tma else ''}"
        constants = {**absent, **_sizes(config, even)}
        made.append(_entry(name_of, kernel, arguments, constants, config, targets, dtype))
    return made


def _merges() -> list[Entry]:
    states = {"states_ptr": "*fp32:16", "N": "i32", "splits": "i32"}
    return [
        Entry(
            "score/merge", _merge_splits_kernel,
            {**states, "targets_ptr": "*i64", "out_ptr": "*fp32:16", "V": "i32"},
            {"BLOCK": 128, "STATS": True}, 4, fuses=False,
        ),
        Entry(
            "score/merge-plain", _merge_splits_kernel,
            {**states, "targets_ptr": "*i64", "out_ptr": "*fp32:16", "V": "i32"},
            {"BLOCK": 128, "STATS": False}, 4, fuses=False,
        ),
        Entry(
            "divergence/merge", _merge_gaps_kernel,
            {**states, **dict.fromkeys(("kl_ptr", "reverse_kl_ptr", "rows_ptr"), "*fp32:16")},
            {"BLOCK": 128}, 4,
        ),
        Entry(
            "divergence/js-sum", _sum_splits_kernel,
            {"sums_ptr": "*fp32:16", "out_ptr": "*fp32:16", "N": "i32", "splits": "i32"},
            {"BLOCK": 128}, 4,
        ),
    ]  # fmt: skip


_METRICS = ("sums_ptr", "losses_ptr", "rewards_ptr", "margins_ptr", "accuracies_ptr")


def _pairs(name: str, per_token: bool = False) -> Entry:
    objective = PAIR_OBJECTIVES[name]
    pointers = ("logps_ptr", "ref_ptr", "coefficients_ptr", "token_coefficients_ptr", *_METRICS)
    scalars = ("p0", "p1", "p2", "likelihood", "reward_scale")
    return Entry(
        f"objective/{name}{'-ref-tokens' if per_token else ''}", _evaluate_pairs_kernel,
        {"offsets_ptr": "*i64", "lengths_ptr": "*i64", **dict.fromkeys(pointers, "*fp32"),
         **dict.fromkeys(scalars, "fp32")},
        {"OBJECTIVE": objective.fn, "NEEDS_REF": objective.needs_ref, "REF_PER_TOKEN": per_token,
         "LENGTH_NORM": objective.takes_length_norm, "BLOCK": 512},
        4, fuses=False,
    )  # fmt: skip


def _tokens(name: str) -> Entry:
    fn, _, needs_ref = TOKEN_OBJECTIVES[name]
    arguments, absent = _given(
        offsets_ptr="*i64", logps_ptr="*fp32", token_coefficients_ptr="*fp32",
        ref_ptr="*fp32" if needs_ref else None, advantages_ptr=None if needs_ref else "*fp32",
        **dict.fromkeys(_METRICS, "*fp32"),
        **dict.fromkeys(("p0", "p1", "weight", "reward_scale"), "fp32"),
    )  # fmt: skip
    constants = {**absent, "OBJECTIVE": fn, "BLOCK": 512}
    return Entry(f"objective/{name}", _evaluate_tokens_kernel, arguments, constants, 4, fuses=False)


TILE_ENTRIES: list[Entry] = [
    *_score("plain"),
    *_score("fp16", "fp16"),
    *_score("fp16-stats-bias-softcap", "fp16", cap=True, stats=True),
    *_score("fp32", "fp32"),
    *_score("bias-softcap", cap=True),
    *_score("odd-rows", even=False),
    *_score("odd-rows-fp32-stats-bias-softcap", "fp32", cap=True, stats=True, even=False),
    *_score("stats", stats=True),
    *_score("stats-bias-softcap", cap=True, stats=True),
    *_score("fp32-stats-bias-softcap", "fp32", cap=True, stats=True),
    *_divergence("kl", _sum_gaps_kernel),
    *_divergence("kl-bias-softcap", _sum_gaps_kernel, cap=True),
    *_divergence("kl-fp16", _sum_gaps_kernel, "fp16"),
    *_divergence("kl-fp32", _sum_gaps_kernel, "fp32"),
    *_divergence("js", _sum_js_kernel),
    *_divergence("js-bias-softcap", _sum_js_kernel, cap=True),
    *_divergence("js-fp16", _sum_js_kernel, "fp16"),
    *_divergence("js-fp32", _sum_js_kernel, "fp32"),
    *_divergence("kl-odd-rows-fp32-bias-softcap", _sum_gaps_kernel, "fp32", True, even=False),
    *_divergence("js-odd-rows-fp32-bias-softcap", _sum_js_kernel, "fp32", True, even=False),
    *_merges(),
    _pairs("dpo", per_token=True),
    *map(_pairs, PAIR_OBJECTIVES),
    *map(_tokens, TOKEN_OBJECTIVES),
]
"""All of them."""
