"""Every kernel variant that is compiled ahead of time, one line each: see ``aot.Entry``.

A variant belongs here if its options change the machine code: the dtypes, the optional inputs, and
whether addresses are multiples of 16 (they are where V is; GPT-2's 50257 stands for the others).
"""

from __future__ import annotations

from typing import Any

from fastdaa.kernels.aot import TARGETS, Entry
from fastdaa.kernels.column_sums import _sum_columns_kernel
from fastdaa.kernels.configs import ROW_CONFIGS
from fastdaa.kernels.hidden_rows import _finish_hidden_rows_kernel, _scale_hidden_rows_kernel
from fastdaa.kernels.row_gradient import _write_row_gradient_kernel
from fastdaa.kernels.row_slopes import _finish_row_slopes_kernel
from fastdaa.kernels.row_statistics import _take_row_states_kernel
from fastdaa.kernels.target_rows import _add_target_rows_kernel
from fastdaa.kernels.tile_entries import TILE_ENTRIES


def _each(
    name: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    configs: dict[int, Any],
    blocks: tuple[str, ...] = ("BLOCK_V",),
    fuses: bool = True,
) -> list[Entry]:
    """One entry for every distinct configuration, for the targets that use it."""
    made = []
    for config in dict.fromkeys(configs.values()):
        targets = tuple(t for t, a in TARGETS.items() if configs.get(a) == config)
        sizes = {block: getattr(config, block.lower()) for block in blocks}
        full_name = f"{name}/{'x'.join(map(str, sizes.values()))}"
        values = {**constants, **sizes}
        made.append(
            Entry(full_name, kernel, arguments, values, config.num_warps, targets=targets,
                  fuses=fuses)
        )  # fmt: skip
    return made


def _statistics(
    name: str, bias: bool = False, cap: bool = False, stats: bool = False, m: str = ":16",
    slopes: bool = False,
) -> list[Entry]:  # fmt: skip
    pointers = {"z_ptr": "*fp32:16", "targets_ptr": "*i64", "states_ptr": "*fp32:16"}
    sizes = {"rows": "i32", "V": f"i32{m}", "first_column": "i32:16", "stride_zn": f"i32{m}"}
    sizes |= {"sloped": f"i32{m}", "stride_on": f"i32{m}"}
    pointers |= {"slopes_ptr": "*bf16:16"} if slopes else {}
    arguments = {**pointers, **sizes, "inner": "fp32", "outer": "fp32"}
    flags = {"HAS_BIAS": bias, "HAS_SOFTCAP": cap, "HAS_STATS": stats, "HAS_SLOPES": slopes}
    absent = ({} if bias else {"bias_ptr": None}) | ({} if slopes else {"slopes_ptr": None})
    arguments |= {"bias_ptr": "*bf16:16"} if bias else {}
    return _each(
        f"row_statistics/{name}", _take_row_states_kernel, arguments, {**flags, **absent},
        ROW_CONFIGS["row_statistics"], ("SPLIT_V", "BLOCK_V"), fuses=False,
    )  # fmt: skip


def _gradient(
    name: str,
    dtype: str = "bf16",
    bias: bool = False,
    cap: bool = False,
    entropy: bool = False,
    picked: bool = False,
    beside: bool = False,
    m: str = ":16",
) -> list[Entry]:
    vectors = ("m_ptr", "log_s_ptr", "logps_ptr", "coefficients_ptr")
    optional = {
        "bias_ptr": "*bf16:16" if bias else None,
        "entropy_ptr": "*fp32" if entropy else None,
        "entropy_coefficients_ptr": "*fp32" if entropy else None,
        "rows_ptr": "*i64" if picked else None,
    }
    arguments = {
        "z_ptr": "*fp32:16", "targets_ptr": "*i64", **dict.fromkeys(vectors, "*fp32"),
        "out_ptr": f"*{dtype}:16", "V": f"i32{m}", "first_column": "i32:16",
        "stride_zn": f"i32{m}", "stride_on": f"i32{m}", "inner": "fp32", "outer": "fp32",
        **{name: kind for name, kind in optional.items() if kind is not None},
    }  # fmt: skip
    constants = {
        "HAS_BIAS": bias, "HAS_SOFTCAP": cap, "HAS_ENTROPY": entropy, "HAS_ROWS": picked,
        "IN_PLACE": not (picked or beside),
        **{name: None for name, kind in optional.items() if kind is None},
    }  # fmt: skip
    return _each(
        f"row_gradient/{name}", _write_row_gradient_kernel, arguments, constants,
        ROW_CONFIGS["row_gradient"],
    )  # fmt: skip


def _slopes(name: str, bias: bool = False, cap: bool = False, m: str = ":16") -> list[Entry]:
    vectors = ("m_ptr", "log_s_ptr", "logps_ptr", "factors_ptr")
    arguments = {
        "z_ptr": "*fp32:16", "targets_ptr": "*i64", **dict.fromkeys(vectors, "*fp32"),
        "slopes_ptr": "*bf16:16", **dict.fromkeys(("V", "stride_zn", "stride_on"), f"i32{m}"),
        "inner": "fp32", "outer": "fp32", **({"bias_ptr": "*bf16:16"} if bias else {}),
    }  # fmt: skip
    constants = {"HAS_BIAS": bias, "HAS_SOFTCAP": cap, **({} if bias else {"bias_ptr": None})}
    return _each(
        f"row_slopes/{name}", _finish_row_slopes_kernel, arguments, constants,
        ROW_CONFIGS["row_gradient"],
    )  # fmt: skip


def _columns(name: str, dtype: str, m: str = ":16") -> list[Entry]:
    sizes = ("N", "rows_of_a_part", "column_blocks")
    arguments = {
        "x_ptr": f"*{dtype}:16", "out_ptr": "*fp32:16", **dict.fromkeys(sizes, "i32"),
        **dict.fromkeys(("V", "stride_xn", "stride_on"), f"i32{m}"),
    }  # fmt: skip
    return _each(
        f"column_sums/{name}", _sum_columns_kernel, arguments, {}, ROW_CONFIGS["column_sums"],
        ("BLOCK_N", "BLOCK_V"),
    )  # fmt: skip


def _targets(
    name: str, out: str, hidden: str, m: str = ":16", less: str | None = None
) -> list[Entry]:
    others = {"less_ptr": f"*{less}:16", "less_sources_ptr": "*i64", "less_factors_ptr": "*fp32"}
    arguments = {
        "out_ptr": f"*{out}:16", "hidden_ptr": f"*{hidden}:16", "targets_ptr": "*i64",
        "ends_ptr": "*i64", "sources_ptr": "*i64", "factors_ptr": "*fp32", "V": "i32:16",
        "column_blocks": "i32", **dict.fromkeys(("D", "stride_ov", "stride_hn"), f"i32{m}"),
        **(others if less else {}),
    }  # fmt: skip
    constants = {"stride_od": 1, "stride_hd": 1, "HAS_LESS": less is not None}
    return _each(
        f"target_rows/{name}", _add_target_rows_kernel, arguments,
        constants | ({} if less else dict.fromkeys(others)), ROW_CONFIGS["target_rows"],
        ("BLOCK_N", "BLOCK_V"),
    )  # fmt: skip


def _hidden(
    name: str, dtype: str, places: bool = False, m: str = ":16", product: str = "fp32"
) -> list[Entry]:
    strides = ("D", "stride_pn", "stride_wv", "stride_on")
    arguments = {
        "product_ptr": f"*{product}:16", "factors_ptr": "*fp32", "own_ptr": "*fp32",
        "weight_ptr": "*bf16:16", "targets_ptr": "*i64", "out_ptr": f"*{dtype}:16",
        "V": "i32:16", "column_blocks": "i32", **dict.fromkeys(strides, f"i32{m}"),
        **({"places_ptr": "*i64"} if places else {}),
    }  # fmt: skip
    constants = {"HAS_PLACES": places, **({} if places else {"places_ptr": None})}
    constants |= dict.fromkeys(("stride_pd", "stride_wd", "stride_od"), 1)
    return _each(
        f"hidden_rows/{name}", _finish_hidden_rows_kernel, arguments, constants,
        ROW_CONFIGS["hidden_rows"],
    )  # fmt: skip


def _factor(name: str, dtype: str, sources: bool = False, m: str = ":16") -> list[Entry]:
    arguments = {
        "hidden_ptr": f"*{dtype}:16", "factors_ptr": "*fp32", "out_ptr": "*bf16:16",
        "column_blocks": "i32", **dict.fromkeys(("D", "stride_hn"), f"i32{m}"),
        **({"sources_ptr": "*i64"} if sources else {}),
    }  # fmt: skip
    constants = {"HAS_SOURCES": sources, "stride_hd": 1}
    return _each(
        f"factor_rows/{name}", _scale_hidden_rows_kernel, arguments,
        constants | ({} if sources else {"sources_ptr": None}), ROW_CONFIGS["hidden_rows"],
    )  # fmt: skip


ENTRIES: list[Entry] = [
    *_statistics("plain"),
    *_statistics("odd-vocabulary", m=""),
    *_statistics("bias-softcap", bias=True, cap=True),
    *_statistics("stats", stats=True),
    *_statistics("stats-bias-softcap", bias=True, cap=True, stats=True),
    *_statistics("slopes", slopes=True),
    *_statistics("odd-vocabulary-slopes", m="", slopes=True),
    *_statistics("stats-bias-softcap-slopes", bias=True, cap=True, stats=True, slopes=True),
    *_slopes("plain"),
    *_slopes("odd-vocabulary", m=""),
    *_slopes("bias-softcap", bias=True, cap=True),
    *_gradient("bf16"),
    *_gradient("fp16", "fp16"),
    *_gradient("fp32", "fp32"),
    *_gradient("odd-vocabulary", m=""),
    *_gradient("bias-softcap", bias=True, cap=True),
    *_gradient("entropy-bias-softcap", bias=True, cap=True, entropy=True),
    *_gradient("picked-rows", picked=True),
    *_gradient("beside", beside=True),
    *_gradient("beside-bias-softcap", bias=True, cap=True, beside=True),
    *_gradient("fp16-bias-softcap", "fp16", bias=True, cap=True),
    *_gradient("fp32-entropy", "fp32", entropy=True),
    *_columns("bf16", "bf16"),
    *_columns("fp32", "fp32"),
    *_columns("odd-vocabulary", "bf16", m=""),
    *_hidden("bf16", "bf16"),
    *_hidden("fp32", "fp32"),
    *_hidden("waiting", "bf16", product="fp16"),
    *_hidden("places", "bf16", places=True),
    *_hidden("odd-columns", "bf16", m=""),
    *_factor("bf16", "bf16"),
    *_factor("fp32", "fp32"),
    *_factor("sources", "bf16", sources=True),
    *_factor("odd-columns", "bf16", m=""),
    *_targets("bf16", "bf16", "bf16"),
    *_targets("fp32", "fp32", "fp32"),
    *_targets("fp32-sum", "fp32", "bf16"),
    *_targets("odd-columns", "bf16", "bf16", m=""),
    *_targets("less", "bf16", "bf16", less="bf16"),
    *_targets("less-fp32-sum", "fp32", "bf16", less="bf16"),
    *_targets("less-fp32", "fp32", "fp32", less="fp32"),
    *TILE_ENTRIES,
]
"""All of them. A name holds the kernel, the variant and the block sizes."""
