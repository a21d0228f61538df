"""Public names at their first use: what is imported when, and that nothing else changes."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import fastdaa

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("triton", "transformers", "datasets", "accelerate", "peft", "trl", "matplotlib", "rich")


def python(code: str) -> Any:
    """What ``code`` prints as JSON, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("module", ["fastdaa", "fastdaa.cli", "fastdaa.benchmarks.flags"])
def test_importing_it_does_not_import_torch(module: str) -> None:
    code = f"import json, sys, {module}; print(json.dumps('torch' in sys.modules))"
    assert python(code) is False


def test_all_public_names_need_torch_and_nothing_heavier() -> None:
    code = f"""if True:
        import json, sys, torch
        before = set(sys.modules)
        from fastdaa import *
        print(json.dumps(sorted((set(sys.modules) - before) & set({HEAVY!r}))))
    """
    assert python(code) == []


def test_names_for_type_checkers_are_those_of_the_run() -> None:
    source = Path(fastdaa.__file__).read_text(encoding="utf-8")
    (typing_only,) = (
        node for node in ast.parse(source).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )  # fmt: skip
    declared = {
        alias.name: node.module
        for node in typing_only.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(declared) == set(fastdaa.__all__) - {"__version__"}
    for name, module in declared.items():
        assert getattr(fastdaa, name) is getattr(importlib.import_module(module or ""), name)
        assert name in dir(fastdaa)


@pytest.mark.parametrize("package", ["fastdaa", "fastdaa.train", "fastdaa.study.track"])
def test_completion_offers_public_names_and_nothing_foreign(package: str) -> None:
    """What a notebook offers, before and after a name was used."""
    code = f"""if True:
        import json, {package} as package
        before = dir(package)
        [getattr(package, name) for name in package.__all__]
        print(json.dumps([before, dir(package), package.__all__, sorted(package.__dict__)]))
    """
    before, after, public, everything = python(code)
    for names in (before, after):
        assert set(public) <= set(names)
        foreign = {"Any", "ModuleType", "TYPE_CHECKING", "annotations", "import_module", "sys"}
        assert not foreign & set(names)
        assert all(name.startswith("__") or not name.startswith("_") for name in names)
    assert "__doc__" in everything and "__doc__" in before


@pytest.mark.parametrize(
    "line",
    ["from fastdaa.pair_loss import pair_loss", "import fastdaa.modules"],
)
def test_a_module_does_not_take_the_place_of_its_function(line: str) -> None:
    code = f"""if True:
        import json
        {line}
        import fastdaa
        from fastdaa import pair_loss
        print(json.dumps([type(pair_loss).__name__, type(fastdaa.pair_loss).__name__]))
    """
    assert python(code) == [FunctionType.__name__] * 2


def test_operators_are_registered_with_the_head() -> None:
    code = """if True:
        import json, torch
        from fastdaa import token_logps
        print(json.dumps([hasattr(torch.ops.fastdaa, n) for n in ("head_logps", "head_gradients")]))
    """
    assert python(code) == [True, True]


def test_modules_of_public_names_are_attributes() -> None:
    code = "import json, fastdaa; print(json.dumps(fastdaa.losses.__name__))"
    assert python(code) == "fastdaa.losses"


def test_unknown_names() -> None:
    with pytest.raises(AttributeError, match="module 'fastdaa' has no attribute 'token_logp'"):
        _ = fastdaa.token_logp
    with pytest.raises(ImportError, match="cannot import name 'token_logp' from 'fastdaa'"):
        from fastdaa import token_logp  # noqa: F401
