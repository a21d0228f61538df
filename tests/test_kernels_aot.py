"""Every kernel of ``aot_entries.py``, compiled for GPUs that are not there.

No spills, no more shared memory than a program may have, and what an entry says it uses. All of
them are compiled once, in a process of their own: in this one kernels may be interpreted.
Run with ``-s`` to see the table; ``fastdaa doctor --kernels`` prints the same.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

pytest.importorskip("triton")

from fastdaa.kernels.aot import SHARED_LIMIT, TARGETS, Entry, Numbers, faults, measure, table
from fastdaa.kernels.aot_entries import ENTRIES

CASES = [
    pytest.param(entry, target, id=f"{target}-{entry.name}")
    for entry in ENTRIES
    for target in entry.targets
]
# Entries that write over what they read; the name says so.
IN_PLACE = [e for e in ENTRIES if e.constants.get("IN_PLACE")]

COMPILE = """if True:
    import json, sys
    from fastdaa.kernels.aot import disassembly, measure
    from fastdaa.kernels.aot_entries import ENTRIES
    print(json.dumps([measure(entry, target) for entry in ENTRIES for target in entry.targets]))
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
"""


class Compiled(NamedTuple):
    numbers: dict[tuple[str, str], Numbers]
    sass: dict[str, str]
    unused: list[str]
    too_few_warps: Numbers


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, repository_root: Path) -> Compiled:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=repository_root, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    numbers, sass, unused, too_few_warps = map(json.loads, done.stdout.splitlines())
    rows = [Numbers(*row) for row in numbers]
    print(f"\n{table(rows)}")
    by_case = {(row.name, row.target): row for row in rows}
    return Compiled(by_case, sass, unused, Numbers(*too_few_warps))


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert {target for entry in ENTRIES for target in entry.targets} == set(TARGETS)


@pytest.mark.parametrize(("entry", "target"), CASES)
def test_machine_code(compiled: Compiled, entry: Entry, target: str) -> None:
    numbers = compiled.numbers[entry.name, target]
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


def test_spills_are_seen(compiled: Compiled) -> None:
    """A kernel of 8 warps given one has eight times the values a thread."""
    assert compiled.too_few_warps.spills > 100


@pytest.mark.parametrize(
    ("change", "uses", "fault"),
    [
        pytest.param({}, (), None, id="none"),
        pytest.param({"spills": 8}, (), "expected no spills, got 8", id="spills"),
        pytest.param({"shared": SHARED_LIMIT["sm_90"] + 1}, (), "shared memory", id="shared"),
        pytest.param({"tma": 3}, ("wgmma", "tma"), "expected wgmma instructions", id="wgmma"),
        pytest.param({"wgmma": 3}, ("wgmma", "tma"), "expected tma instructions", id="tma"),
    ],
)
def test_a_fault_is_found(change: dict[str, int], uses: tuple[str, ...], fault: str | None) -> None:
    entry = Entry("n", None, {}, {}, 4, uses=uses)
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
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastdaa.cli import doctor
    from fastdaa.kernels import aot

    monkeypatch.setattr(aot, "measure", lambda e, target: compiled.numbers[e.name, target])
    assert all(row.ok for row in doctor.kernel_rows())
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == list(Numbers._fields)
    assert len(text.splitlines()) == 1 + len(CASES)
    monkeypatch.setattr(
        aot, "measure", lambda e, target: compiled.numbers[e.name, target]._replace(spills=16)
    )
    rows = doctor.kernel_rows()
    assert not any(row.ok for row in rows) and "expected no spills, got 16" in rows[0].value
