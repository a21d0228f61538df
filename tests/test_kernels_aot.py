"""Every kernel of ``aot_entries.py``, compiled for GPUs that are not there.

No spills, no more shared memory than a program may have, no TF32, and what an entry says it uses.
All of them are compiled once, those of each target in a process of its own: in this one kernels may
be interpreted. What sm_90 takes by default in every run, the rest in runs with slow tests.
Run with ``-s`` to see the table; ``fastdaa doctor --kernels`` prints the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

from fastdaa.kernels.aot import SHARED_LIMIT, TARGETS, Entry, Numbers, faults, measure, table
from fastdaa.kernels.aot_entries import ENTRIES
from fastdaa.kernels.score_configs import DIVERGENCE_CONFIGS, SCORE_CONFIGS

# Tile shapes that sm_90 takes where its copy engine cannot read the operands.
POINTERS = tuple(
    f"/{c.block_n}x{c.block_v}x{c.block_d}"
    for c in (SCORE_CONFIGS[80, True, False], DIVERGENCE_CONFIGS[80, True, False])
)


def in_every_run(entry: Entry, target: str) -> bool:
    """What sm_90 takes by default; the rest is compiled in runs with slow tests."""
    return target == "sm_90" and not entry.name.endswith(POINTERS)


CASES = [
    pytest.param(
        entry, target, id=f"{target}-{entry.name}",
        marks=() if in_every_run(entry, target) else pytest.mark.slow,
    )
    for entry in ENTRIES
    for target in entry.targets
]  # fmt: skip
# Entries that write over what they read; the name says so.
IN_PLACE = [e for e in ENTRIES if e.constants.get("IN_PLACE")]

MEASURE = """if True:
    import json, sys
    from fastdaa.kernels.aot import measure
    from fastdaa.kernels.aot_entries import ENTRIES
    target, names = sys.argv[1], set(sys.argv[2:])
    print(json.dumps([measure(entry, target) for entry in ENTRIES if entry.name in names]))
"""
READ = """if True:
    import json, re
    from fastdaa.kernels.aot import TARGETS, Entry, _compile, disassembly, measure
    from fastdaa.kernels.aot_entries import ENTRIES
    from tests.tf32_product import multiply_kernel
    in_place = [entry for entry in ENTRIES if entry.constants.get("IN_PLACE")]
    print(json.dumps({entry.name: disassembly(entry, "sm_90") for entry in in_place}))
    unused = [
        f"{entry.name}: {parameter.name}"
        for entry in ENTRIES
        for parameter in entry.kernel.params
        if entry.arguments.get(parameter.name, "").endswith(":16")
        and (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    ]
    print(json.dumps(unused))
    (wide,) = [e for e in ENTRIES if e.name.startswith("row_statistics/stats-bias-softcap/")]
    print(json.dumps(measure(wide._replace(num_warps=1), "sm_90")))
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32:16")
    entry = Entry("tf32", multiply_kernel, pointers, {"SIZE": 64}, 4)
    print(json.dumps([measure(entry, target) for target in TARGETS]))
    over_lanes = re.compile(r"arith\\.(\\w+ )[^\\n]*: (\\w+)[^\\n]*\\n\\s*tt\\.reduce\\.return")
    to_row = re.compile(r"tt\\.addptr %(\\w+_ptr), [^:]*: [^,]*, i32")
    ir = {
        entry.name: _compile(entry, "sm_90").asm["ttir"]
        for entry in ENTRIES if entry.name.startswith("row_")
    }
    print(json.dumps({
        name: list(map("".join, over_lanes.findall(ir[name])))
        for name in ir if name.startswith("row_statistics/")
    }))
    print(json.dumps({name: to_row.findall(ir[name]) for name in ir}))
"""


class Compiled(NamedTuple):
    sass: dict[str, str]
    unused: list[str]
    too_few_warps: Numbers
    tf32: list[Numbers]
    over_lanes: dict[str, list[str]]
    near: dict[str, list[str]]
    """Pointers that are moved by less than 2^31 entries."""


def in_own_process(root: Path, folder: Path, code: str, *arguments: str) -> list[Any]:
    """What each line says that the code prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process has compiled another one need not."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def numbers_of(triton_cache: Path, repository_root: Path) -> Callable[[Entry, str], Numbers]:
    """``numbers_of(entry, target)``, which compiles others with it."""

    @cache
    def compile_all(target: str, in_all: bool) -> dict[str, Numbers]:
        names = [
            e.name for e in ENTRIES if target in e.targets and in_every_run(e, target) == in_all
        ]
        (found,) = in_own_process(repository_root, triton_cache, MEASURE, target, *names)
        rows = [Numbers(*row) for row in found]
        print(f"\n{table(rows)}")
        return {row.name: row for row in rows}

    return lambda entry, target: compile_all(target, in_every_run(entry, target))[entry.name]


@pytest.fixture(scope="module")
def compiled(triton_cache: Path, repository_root: Path) -> Compiled:
    sass, unused, too_few_warps, tf32, *ir = in_own_process(repository_root, triton_cache, READ)
    numbers = [Numbers(*row) for row in tf32]
    return Compiled(sass, unused, Numbers(*too_few_warps), numbers, *ir)


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert {target for entry in ENTRIES for target in entry.targets} == set(TARGETS)


@pytest.mark.parametrize(("entry", "target"), CASES)
def test_machine_code(
    numbers_of: Callable[[Entry, str], Numbers], entry: Entry, target: str
) -> None:
    numbers = numbers_of(entry, target)
    assert faults(entry, numbers) == []
    assert 0 < numbers.registers <= 255 and numbers.instructions > 50


@pytest.mark.parametrize("entry", IN_PLACE, ids=[entry.name for entry in IN_PLACE])
def test_threads_meet_between_the_reads_and_the_writes_of_a_block(
    compiled: Compiled, entry: Entry
) -> None:
    """In place, no thread may store before all have loaded: load, barrier, store, nothing else."""
    found = re.findall(r"\b(LDG|BAR|STG)\b", compiled.sass[entry.name])
    last_load = len(found) - 1 - found[::-1].index("LDG")
    assert found.count("BAR") == 1
    assert found[last_load + 1] == "BAR" and set(found[last_load + 2 :]) == {"STG"}


def test_entries_assume_no_alignment_that_the_launch_does_not_tell(compiled: Compiled) -> None:
    assert compiled.unused == []


def test_sums_over_the_lanes_of_a_row_are_of_integers(compiled: Compiled) -> None:
    """The order of a sum over lanes differs between the variants of a kernel, and floats would have
    other bits. The mean logit alone, a metric of any size, is summed in fp64."""
    assert len(compiled.over_lanes) >= 8
    for name, found in compiled.over_lanes.items():
        stats = "/stats" in name
        assert found.count("addi i64") == (3 if stats else 1), name
        assert [sum for sum in found if "addf" in sum] == ["addf f64"] * stats, name


def test_rows_may_lie_beyond_2_to_the_31_entries(compiled: Compiled) -> None:
    """16745 rows of 128256 logits, an offset that the interpreter has no memory to try."""
    assert len(compiled.near) >= 20
    assert {pointer for found in compiled.near.values() for pointer in found} == {"bias_ptr"}


def test_spills_are_seen(compiled: Compiled) -> None:
    """A kernel of 8 warps given one has eight times the values a thread."""
    assert compiled.too_few_warps.spills > 100


def test_products_in_tf32_are_seen(compiled: Compiled) -> None:
    assert {row.target for row in compiled.tf32 if row.tf32} == set(TARGETS)


def test_every_table_entry_is_compiled_for_every_target() -> None:
    """By kernel, architecture and dtype; a target that a configuration is not for has another."""
    assert all(
        {target for e in ENTRIES if e.name.startswith(f"{variant}/") for target in e.targets}
        == set(TARGETS)
        for variant in {entry.name.rpartition("/")[0] for entry in ENTRIES}
    )
    half = {"*fp16", "*bf16", "*fp32"}
    for table_of, prefixes in (
        (SCORE_CONFIGS, ("score/",)), (DIVERGENCE_CONFIGS, ("divergence/kl", "divergence/js")),
    ):  # fmt: skip
        for (architecture, two_bytes, _), config in table_of.items():
            target = next(name for name, a in TARGETS.items() if a == architecture)
            shape = f"{config.block_n}x{config.block_v}x{config.block_d}{'-tma' * config.tma}"
            found = {
                dtype.strip("*")
                for e in ENTRIES
                if e.name.startswith(prefixes) and e.name.endswith(f"/{shape}")
                and target in e.targets
                for dtype in half
                if e.arguments["hidden"].startswith((dtype, f"tensordesc<{dtype.strip('*')}["))
            }  # fmt: skip
            assert found == ({"fp16", "bf16"} if two_bytes else {"fp32"}), (architecture, config)


@pytest.mark.parametrize(
    ("change", "uses", "fault"),
    [
        pytest.param({}, (), None, id="none"),
        pytest.param({"spills": 8}, (), "expected no spills, got 8", id="spills"),
        pytest.param({"tf32": 8}, (), "products as they are, got 8 in TF32", id="tf32"),
        pytest.param({"fused": 8}, (), "no fused multiply-adds, got 8", id="fused"),
        pytest.param({"shared": SHARED_LIMIT["sm_90"] + 1}, (), "shared memory", id="shared"),
        pytest.param({"tma": 3}, ("wgmma", "tma"), "expected wgmma instructions", id="wgmma"),
        pytest.param({"wgmma": 3}, ("wgmma", "tma"), "expected tma instructions", id="tma"),
    ],
)
def test_a_fault_is_found(change: dict[str, Any], uses: tuple[str, ...], fault: str | None) -> None:
    entry = Entry("n", None, {}, {}, 4, uses=uses, fuses=False)
    numbers = Numbers("n", "sm_90", 32, 0, 0, 100, 0, 0)._replace(**change)
    found = faults(entry, numbers)
    assert (len(found) == 1 and fault in found[0]) if fault else found == []


def test_interpreted_kernels_are_not_compiled() -> None:
    from fastdaa.kernels.configs import interpreted

    if not interpreted():
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        measure(ENTRIES[0], "sm_90")


def test_doctor_says_why_it_cannot_compile(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdaa.cli import doctor, main
    from fastdaa.kernels.configs import interpreted

    if not interpreted():
        pytest.skip("kernels are compiled in this process")
    assert main(["doctor", "--kernels"]) == 1
    assert "unset" in capsys.readouterr().out
    assert [row.ok for row in doctor.kernel_rows()] == [False]


def test_doctor_prints_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdaa.cli import doctor
    from fastdaa.kernels import aot

    def measured(entry: Entry, target: str, **change: Any) -> Numbers:
        found = Numbers(entry.name, target, 32, 0, 0, 100, wgmma=1, tma=1)
        return found._replace(**change)

    monkeypatch.setattr(aot, "measure", measured)
    assert all(row.ok for row in doctor.kernel_rows())
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == list(Numbers._fields)
    assert len(text.splitlines()) == 1 + len(CASES)
    monkeypatch.setattr(aot, "measure", partial(measured, spills=16))
    rows = doctor.kernel_rows()
    assert not any(row.ok for row in rows) and "expected no spills, got 16" in rows[0].value
