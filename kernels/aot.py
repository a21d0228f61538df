"""Compiles kernels for GPUs that are not there, and reads what the machine code needs.

``triton.compile`` with an explicit target needs no device; registers, local memory (spills) and
shared memory are read from the cubin with the ``cuobjdump`` inside the Triton package, instruction
counts from its disassembly. The kernels to compile are listed in ``aot_entries.py``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
"""Names of targets and the compute capability (times ten) that Triton knows them by."""

SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
"""Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of technical
specifications per compute capability)."""

# In SASS: matrix products of a warpgroup (sm_90) or of the tensor memory (sm_100), and copies of
# tiles by the tensor memory accelerator.
_WGMMA = re.compile(r"\b(?:HGMMA|QGMMA|IGMMA|UTC\w*MMA)\b")
_TMA = re.compile(r"\bUTMA(?:LDG|STG|REDG)\b")
# In PTX: products that round fp32 factors to 10 bits (mma, wgmma and tcgen05 name them alike).
_FUSED = re.compile(r"\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)\b")
_TF32 = re.compile(r"mma\S*tf32")
_SPILL = re.compile(r"\b(?:LDL|STL)\b")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", re.MULTILINE)


class Entry(NamedTuple):
    """A kernel with everything that its machine code depends on."""

    name: str
    """Unique, for people and test ids."""
    kernel: Any
    """What ``triton.jit`` made."""
    arguments: dict[str, str]
    """Types of the arguments in Triton's spelling (``"*fp32"``, ``"i32"``, ``"fp32"``); ``":16"``
    at the end says that the value or address is a multiple of 16."""
    constants: dict[str, Any]
    """Values of the constexpr arguments; None for a pointer that is not given."""
    num_warps: int
    num_stages: int = 3
    """Triton's own default where the launcher gives none."""
    targets: tuple[str, ...] = tuple(TARGETS)
    uses: tuple[str, ...] = ()
    """What the sm_90 machine code has to contain: ``"wgmma"``, ``"tma"``."""
    max_registers: int | None = None
    """Triton's ``maxnreg``, where the launcher gives one."""
    fuses: bool = True
    """Multiplications and additions may become one; where not, all variants of a kernel round
    alike."""


class Numbers(NamedTuple):
    """What the machine code of an entry needs on a target."""

    name: str
    target: str
    registers: int
    """A thread."""
    spills: int
    """Bytes of stack and local memory a thread, plus instructions that access it: 0 is none."""
    shared: int
    """Bytes of shared memory a program."""
    instructions: int
    """In the disassembly."""
    wgmma: int
    """Instructions that are matrix products of a warpgroup or on tensor memory."""
    tma: int
    """Instructions of the tensor memory accelerator."""
    tf32: int = 0
    """Products in PTX that round fp32 factors to TF32: no kernel here may have one."""
    fused: int = 0
    """Products and sums in PTX that an assembler may make one: those without ``.rn``."""


def measure(entry: Entry, target: str) -> Numbers:
    """Compile an entry for a target, and read its machine code.

    Raises:
        RuntimeError: Triton was imported under its interpreter, or cuobjdump failed.
        ValueError: arguments that are not those of the kernel.
    """
    compiled = _compile(entry, target)
    usage, sass = _cuobjdump("-res-usage", compiled), _cuobjdump("-sass", compiled)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Numbers(
        entry.name,
        target,
        found["REG"],
        found["STACK"] + found["LOCAL"] + len(_SPILL.findall(sass)),
        compiled.metadata.shared,
        len(_INSTRUCTION.findall(sass)),
        len(_WGMMA.findall(sass)),
        len(_TMA.findall(sass)),
        len(_TF32.findall(compiled.asm["ptx"])),
        len(_FUSED.findall(compiled.asm["ptx"])),
    )


def disassembly(entry: Entry, target: str) -> str:
    """The machine code of an entry in NVIDIA's SASS, as ``cuobjdump`` prints it."""
    return _cuobjdump("-sass", _compile(entry, target))


def faults(entry: Entry, numbers: Numbers) -> list[str]:
    """What is wrong with the machine code of an entry, in words; empty if nothing is."""
    found = []
    if numbers.spills:
        found.append(f"expected no spills, got {numbers.spills}")
    if numbers.shared > SHARED_LIMIT[numbers.target]:
        limit = SHARED_LIMIT[numbers.target]
        found.append(f"expected at most {limit} bytes of shared memory, got {numbers.shared}")
    if numbers.tf32:
        found.append(f"expected fp32 products as they are, got {numbers.tf32} in TF32")
    if numbers.fused and not entry.fuses:
        found.append(f"expected no fused multiply-adds, got {numbers.fused}")
    if numbers.target == "sm_90":
        found += [
            f"expected {use} instructions, got none"
            for use in entry.uses
            if not getattr(numbers, use)
        ]
    return found


def table(numbers: Iterable[Numbers]) -> str:
    """The numbers as lines of text, with a head."""
    lines = [Numbers._fields, *(tuple(map(str, row)) for row in numbers)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _compile(entry: Entry, target: str) -> Any:
    return triton.compile(
        _source(entry),
        target=GPUTarget("cuda", TARGETS[target], 32),
        options={
            "num_warps": entry.num_warps,
            "num_stages": entry.num_stages,
            "enable_fp_fusion": entry.fuses,
            "maxnreg": entry.max_registers,
        },
    )


def _source(entry: Entry) -> ASTSource:
    kernel = entry.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("expected kernels for GPUs, got Triton's interpreter: unset "
                           "TRITON_INTERPRET to compile")  # fmt: skip
    given = {**entry.arguments, **entry.constants}
    if set(given) != set(kernel.arg_names) or len(given) != len(kernel.arg_names):
        raise ValueError(f"{entry.name}: expected arguments {kernel.arg_names}, got {list(given)}")
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind, multiple, _ = entry.arguments.get(name, "constexpr").partition(":16")
        signature[name] = kind
        if multiple:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, dict(entry.constants), attributes)


def _cuobjdump(option: str, compiled: Any) -> str:
    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(own) if own.is_file() else shutil.which("cuobjdump")
    if tool is None:
        raise RuntimeError("expected cuobjdump in the Triton package or on the PATH, got neither")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        done = subprocess.run([tool, option, str(cubin)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {option}: {done.stderr.strip()}")
    return done.stdout
