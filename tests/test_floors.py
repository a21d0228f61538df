"""Who may import whom, read from the syntax tree: nothing is imported here.

The floors, lowest first. A file imports from floors below its own and from its own package. A new
module needs a floor: put it into ``FLOORS`` (CONTRIBUTING.md says how to choose).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fastdaa"

FLOORS: list[set[str]] = [
    {"outputs", "compiled_sizes", "counted", "whole_file", "writable"},
    {"validation", "first_order", "head_config"},
    {"selection", "reference", "kernels", "chunks", "call_size", "paths", "vocab_shard"},
    {"slices", "head_plan"},
    {"target_rows", "scaled_rows"},
    # The head and its engine, from the plan to the differentiable primitive.
    {"losses", "head", "memory"},
    {"row_passes", "single_pass_memory"},
    {"engines", "objective_kernel"},
    {"tiles", "engine_check"},
    {"planner", "fused_check"},
    {"waiting_rows"},
    {"score", "plan_call", "gradient_sums", "kept_products"},
    {"frozen", "recompute", "unscaled", "compiled_operators"},
    {
        "kept",
        "kept_chunks",
        "divergence_tiles",
        "entropy_tiles",
        "compiled_logps",
        "compiled_logps_and_entropy",
    },
    {"single_pass", "kept_logps", "compiled_divergence", "compiled_entropy", "compiled_backward"},
    {"compiled_kept"},
    {"logps", "divergence", "entropy"},
    {"pair_batch", "logps_and_entropy"},
    {"compiled_loss"},
    {"data", "pair_loss"},
    {"modules"},
    {"train"},
    # Its trainers gather a head that lies in pieces as those of `train` do.
    {"drop_in"},
    {"online"},
    # The study runs trainers of both kinds.
    {"study"},
    {"benchmarks", "demo"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80

# Third parties that may be imported as soon as a room is. Rooms from `train` upwards are free.
EAGER_ALLOWED = {"kernels": {"torch", "triton"}, "data": {"torch", "numpy"}}
EAGER_DEFAULT = {"torch"}
# Never imported by `import fastdaa`, not even through a room that is otherwise free.
HEAVY = {"triton", "transformers", "datasets", "accelerate", "peft", "trl", "rich", "matplotlib"}
# The only rooms below `train` that may touch transformers, and only inside functions.
LAZY_TRANSFORMERS = {"head", "head_config", "data"}


class Import(NamedTuple):
    target: str
    line: int
    eager: bool
    """Runs when the file is imported."""
    typing_only: bool


class Source(NamedTuple):
    path: Path
    module: str

    @property
    def room(self) -> str:
        parts = self.module.split(".")
        return parts[1] if len(parts) > 1 else ""

    @property
    def shown(self) -> str:
        return str(self.path.relative_to(ROOT))

    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"), filename=str(self.path))


def _sources() -> list[Source]:
    """Every installed Python file once, under the name that it is imported by."""
    found = []
    for folder, prefix in (
        ("fastdaa", "fastdaa"),
        ("kernels", "fastdaa.kernels"),
        ("benchmarks", "fastdaa.benchmarks"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "fastdaa" and parts[0] in ("kernels", "benchmarks"):
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(Source(path, ".".join((prefix, *parts))))
    return found


SOURCES = _sources()
MODULES = {source.module: source for source in SOURCES}
PACKAGES = {source.module for source in SOURCES if source.path.name == "__init__.py"}
PACKAGES |= {"fastdaa.kernels", "fastdaa.benchmarks"}
EVERY_SOURCE = pytest.mark.parametrize("source", SOURCES, ids=[source.module for source in SOURCES])


def _is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def _imports(source: Source, modules: set[str]) -> Iterator[Import]:
    """Imports of a file; ``from package import module`` gives the module, where it is one."""

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        base = source.module.split(".")
        drop = node.level - (source.module in PACKAGES)
        return ".".join([*base[: len(base) - drop], *([node.module] if node.module else [])])

    def walk(node: ast.AST, eager: bool, typing_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, eager, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                target = full if full in modules or base == PACKAGE else base
                yield Import(target, node.lineno, eager, typing_only)
        elif isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            first = node.args[0] if node.args else None
            if (
                name in ("import_module", "__import__")
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                yield Import(first.value, node.lineno, eager, typing_only)
        if isinstance(node, ast.If) and _is_type_checking(node.test):
            for child in node.body:
                yield from walk(child, False, True)
            for child in node.orelse:
                yield from walk(child, eager, typing_only)
            return
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, eager and not inside, typing_only)

    return walk(source.tree(), True, False)


def _outside(target: str) -> str | None:
    """The third-party distribution's top module, or None for ours and the standard library."""
    top = target.split(".")[0]
    return None if top == PACKAGE or top in sys.stdlib_module_names else top


def _floor_offences(source: Source, modules: set[str]) -> list[str]:
    offences = []
    for found in _imports(source, modules):
        parts = found.target.split(".")
        if parts[0] in ("kernels", "benchmarks", "tests"):
            offences.append(f"line {found.line}: '{found.target}' is no package of its own")
        if parts[0] != PACKAGE or source.module == PACKAGE:
            continue
        if found.target == "fastdaa.__version__" and FLOOR_OF[source.room] >= FLOOR_OF["train"]:
            continue
        room = parts[1] if len(parts) > 1 else ""
        if room not in FLOOR_OF:
            offences.append(
                f"line {found.line}: expected a module of fastdaa that has a floor,"
                f" got '{found.target}' (names come from their own module, not from the package)"
            )
        elif room != source.room and FLOOR_OF[room] >= FLOOR_OF[source.room]:
            offences.append(
                f"line {found.line}: '{source.room}' may import only from lower floors,"
                f" '{room}' is not below it"
            )
    return offences


@EVERY_SOURCE
def test_every_module_has_a_floor(source: Source) -> None:
    if source.module == PACKAGE:
        return
    assert source.room in FLOOR_OF, (
        f"{source.shown}: give '{source.room}' a floor in FLOORS of tests/test_floors.py"
    )


@EVERY_SOURCE
def test_imports_go_down(source: Source) -> None:
    if source.module != PACKAGE and source.room not in FLOOR_OF:
        pytest.fail(f"{source.shown} has no floor")
    assert _floor_offences(source, set(MODULES)) == [], source.shown


def test_package_root_stops_below_train() -> None:
    for found in _imports(MODULES[PACKAGE], set(MODULES)):
        if found.target.startswith(f"{PACKAGE}."):
            room = found.target.split(".")[1]
            assert FLOOR_OF[room] < FLOOR_OF["train"], f"fastdaa/__init__.py imports '{room}'"


@EVERY_SOURCE
def test_third_parties(source: Source) -> None:
    if FLOOR_OF.get(source.room, 0) >= FLOOR_OF["train"]:
        return
    allowed = EAGER_ALLOWED.get(source.room, EAGER_DEFAULT)
    for found in _imports(source, set(MODULES)):
        top = _outside(found.target)
        where = f"{source.shown}:{found.line}"
        if top is None:
            continue
        if found.eager:
            assert top in allowed, f"{where}: import {top} inside the function that needs it"
        if source.room == "kernels":
            assert top in allowed, f"{where}: kernels import torch and triton only"
        if top == "transformers":
            assert source.room in LAZY_TRANSFORMERS, f"{where}: transformers enters in train/"


def _eager_closure(start: str) -> dict[str, str]:
    """Modules of ours that importing ``start`` runs, each with the module that pulled it in."""
    pulled, queue = {start: start}, [start]
    while queue:
        module = queue.pop()
        if module not in MODULES:
            continue
        for found in _imports(MODULES[module], set(MODULES)):
            if not found.eager or found.target.split(".")[0] != PACKAGE:
                continue
            parts = found.target.split(".")
            for depth in range(2, len(parts) + 1):
                name = ".".join(parts[:depth])
                if name not in pulled:
                    pulled[name] = module
                    queue.append(name)
    return pulled


def test_import_fastdaa_stays_light() -> None:
    pulled = _eager_closure(PACKAGE)
    offences = [
        f"{module} (pulled in by {pulled[module]}) imports {found.target}"
        for module in pulled
        if module in MODULES
        for found in _imports(MODULES[module], set(MODULES))
        if found.eager and _outside(found.target) in HEAVY
    ]
    assert offences == []


@pytest.mark.parametrize(
    "source",
    [source for source in SOURCES if source.room == "kernels" or source.module == "fastdaa.logps"],
    ids=lambda source: source.module,
)
def test_device_paths(source: Source) -> None:
    """No host sync, no relative import, no environment."""
    for node in ast.walk(source.tree()):
        where = f"{source.shown}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Attribute):
            assert node.attr != "item", f"{where}: .item() waits for the device"
            assert node.attr not in ("environ", "getenv"), f"{where}: reads the environment"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{where}: import by absolute name"


@EVERY_SOURCE
def test_no_sys_path_edits(source: Source) -> None:
    for node in ast.walk(source.tree()):
        edited = (
            isinstance(node, ast.Attribute)
            and node.attr == "path"
            and isinstance(node.value, ast.Name)
            and node.value.id == "sys"
        )
        assert not edited, f"{source.shown}:{getattr(node, 'lineno', 0)}: touches sys.path"


@EVERY_SOURCE
def test_names_of_files(source: Source) -> None:
    assert source.path.stem not in {"utils", "util", "common", "helpers", "misc"}, source.shown


def _function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is None:
        return total
    first = node.body[0]
    return total - ((first.end_lineno or first.lineno) - first.lineno + 1)


@EVERY_SOURCE
def test_sizes(source: Source) -> None:
    lines = len(source.path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE_LINES, f"{source.shown}: {lines} lines, at most {MAX_FILE_LINES}"
    too_long = [
        f"{source.shown}:{node.lineno}: {node.name} has {_function_lines(node)} lines"
        for node in ast.walk(source.tree())
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and _function_lines(node) > MAX_FUNCTION_LINES
    ]
    assert too_long == [], f"at most {MAX_FUNCTION_LINES} lines a function"


@pytest.mark.parametrize(
    ("module", "line", "offends"),
    [
        ("fastdaa.losses.margin", "from fastdaa.outputs import PairLogps", False),
        ("fastdaa.losses.margin", "from fastdaa.losses import registry", False),
        ("fastdaa.losses.margin", "from . import registry", False),
        ("fastdaa.losses.margin", "from ..logps import token_logps", True),
        ("fastdaa.losses.margin", "from fastdaa import token_logps", True),
        ("fastdaa.selection", "import fastdaa.reference", True),
        ("fastdaa.selection", "def f():\n    from fastdaa.logps import token_logps", True),
        ("fastdaa.selection", "import importlib\nimportlib.import_module('fastdaa.cli')", True),
        ("fastdaa.cli.train", "from fastdaa import __version__", False),
        ("fastdaa.cli.train", "from kernels import logp_fwd", True),
        ("fastdaa.train.trainer", "from fastdaa.unheard_of import x", True),
    ],
)
def test_the_rule_itself(tmp_path: Path, module: str, line: str, offends: bool) -> None:
    path = tmp_path / "module.py"
    path.write_text(line + "\n", encoding="utf-8")
    modules = {*MODULES, "fastdaa.losses", "fastdaa.losses.registry", "fastdaa.reference"}
    assert bool(_floor_offences(Source(path, module), modules)) is offends
