"""A package that is not installed is named, with what to give to pip."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdaa.cli import main, missing_package
from fastdaa.cli.missing_package import PACKAGES, check_packages
from fastdaa.cli.missing_package import missing_package as words

ROOT = Path(__file__).resolve().parents[1]


def absent(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


def wrapped(cause: BaseException) -> ModuleNotFoundError:
    error = ModuleNotFoundError("Could not import module 'TrainingArguments'.")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(absent("datasets"), "datasets, which is not installed: pip install datasets"),
        pytest.param(absent("yaml"), "yaml, which is not installed: pip install pyyaml"),
        pytest.param(wrapped(wrapped(absent("rich"))), "pip install rich"),
        pytest.param(absent("triton"), "pip install 'fastdaa[triton]'"),
    ],
    ids=["its own name", "another name", "wrapped", "extra"],
)
def test_words(error: BaseException, expected: str) -> None:
    text = words(error)
    assert text is not None and text.endswith(expected)


@pytest.mark.parametrize(
    "error",
    [
        absent("my_reward"),
        absent("trl.experimental.new"),  # there, but too old
        ImportError("peft: expected 'fastdaa[peft]'"),
        ValueError("x"),
    ],
    ids=["unknown", "part of a package", "own words", "something else"],
)
def test_other_errors_keep_their_words(error: BaseException) -> None:
    error.__context__ = absent("peft") if type(error) is ImportError else None
    assert words(error) is None


def test_every_declared_package_is_known() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    declared = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert declared is not None
    names = re.findall(r'"([\w-]+)', declared[1])
    assert len(names) > 5 and set(names) <= set(PACKAGES.values())


@pytest.mark.parametrize("command", ["train", "sft", "reward", "online", "study", "demo"])
def test_before_the_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    without: Any = lambda name: None if name == "rich" else find(name)  # noqa: E731
    monkeypatch.setattr(missing_package, "find_spec", without)
    assert main([command]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"fastdaa {command}: error: expected the package rich, which is not installed: "
        "pip install rich\n"
    )


def test_nothing_is_imported_to_find_out() -> None:
    check_packages("train")
    code = (
        "import sys; from fastdaa.cli.missing_package import check_packages; "
        "check_packages('train'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("command", ["bench head", "doctor"])
def test_whatever_a_command_imports(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = command.split()
    module = importlib.import_module(f"fastdaa.cli.{name}")

    def run(argv: Any) -> int:
        raise absent("torch")

    monkeypatch.setattr(module, "run", run)
    assert main([name, *rest]) == 2
    assert capsys.readouterr().err.endswith("not installed: pip install torch\n")
