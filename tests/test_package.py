"""What is built, what is installed, and what importing it drags in."""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

import fastdaa

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "benchmarks")
EXTRAS = {"triton", "peft", "quantization", "flash", "liger", "bench", "dev"}
NOT_IMPORTED = (
    "triton",
    "transformers",
    "datasets",
    "accelerate",
    "peft",
    "trl",
    "tokenizers",
    "matplotlib",
    "rich",
    "yaml",
)
# Left out of the copy that is built: environments, caches, and what earlier builds left.
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command; its standard output, or a failure that shows everything it said."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def python(code: str, cwd: Path, **variables: str) -> Any:
    """What ``code`` prints as JSON, in a fresh process with ``cwd`` first on its path."""
    return json.loads(run(sys.executable, "-c", code, cwd=cwd, **variables))


class Built(NamedTuple):
    source: Path
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A wheel and an sdist of this tree, and a wheel of that sdist, without the network."""
    pytest.importorskip("build")
    scratch = tmp_path_factory.mktemp("package")
    source = scratch / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=NOT_SOURCE)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--wheel", "--sdist", "--outdir", scratch / "dist", cwd=source)
    (wheel,) = (scratch / "dist").glob("*.whl")
    (sdist,) = (scratch / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch / "unpacked", **_extraction())
    (unpacked,) = (scratch / "unpacked").iterdir()
    run(*build, "--wheel", "--outdir", scratch / "again", cwd=unpacked)
    (again,) = (scratch / "again").glob("*.whl")
    return Built(source, wheel, sdist, again)


def _extraction() -> dict[str, Any]:
    """The safe filter, where this patch release of Python has it."""
    return {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def names_in_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def wheel_metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def source_files(folder: Path) -> set[str]:
    """Files of a folder but for caches and earlier results, as paths relative to it."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "results"} & set(path.parts)
    }


def test_symlinks_are_relative_and_resolve() -> None:
    for folder in MAPPED:
        link = ROOT / "fastdaa" / folder
        assert link.is_symlink(), f"fastdaa/{folder}: expected a symlink"
        assert os.readlink(link) == f"../{folder}"
        assert link.resolve() == ROOT / folder


def test_no_file_that_would_make_a_top_level_package() -> None:
    for name in (*(f"{folder}/__init__.py" for folder in (*MAPPED, "tests")), "conftest.py"):
        assert not (ROOT / name).exists(), f"{name} puts the repository root on the path"


def test_wheel_holds_one_package(built: Built) -> None:
    names = names_in_wheel(built.wheel)
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastdaa"}
    assert max(Counter(names).values()) == 1
    (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
    with zipfile.ZipFile(built.wheel) as archive:
        assert archive.read(top_level).decode().split() == ["fastdaa"]


def test_wheel_misses_nothing(built: Built) -> None:
    names = set(names_in_wheel(built.wheel))
    own = {
        f"fastdaa/{name}"
        for name in source_files(built.source / "fastdaa")
        if name.split("/")[0] not in MAPPED
    }
    mapped = {
        f"fastdaa/{folder}/{name}"
        for folder in MAPPED
        for name in source_files(built.source / folder)
        if name.endswith(".py")
    }
    assert "fastdaa/py.typed" in own
    assert own | mapped <= names, f"not in the wheel: {sorted((own | mapped) - names)}"
    kept_out = {"test", "tests", "results"}
    assert not [name for name in names if kept_out & set(name.split("/"))]


def test_metadata(built: Built) -> None:
    metadata = wheel_metadata(built.wheel)
    assert metadata["Version"] == fastdaa.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    names = names_in_wheel(built.wheel)
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_sdist_holds_the_mapped_folders_once(built: Built) -> None:
    with tarfile.open(built.sdist) as archive:
        names = [member.name.split("/", 1)[-1] for member in archive.getmembers()]
    assert max(Counter(names).values()) == 1
    for folder in MAPPED:
        assert not [name for name in names if name.startswith(f"fastdaa/{folder}/")]
        inside = {name for name in source_files(built.source / folder) if name.endswith(".py")}
        assert {f"{folder}/{name}" for name in inside} <= set(names)
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"):
        assert name in names
    assert "tests/conftest.py" in names, "a packager must be able to run the tests"
    for name in ("docs/results/study_hump.png", "benchmarks/results/step_cpu.jsonl"):
        assert name in names, "pages show committed results, and tests hold them to these"


def test_sdist_gives_the_same_wheel(built: Built) -> None:
    assert names_in_wheel(built.wheel_from_sdist) == names_in_wheel(built.wheel)


def test_installed_wheel_imports_outside_the_checkout(built: Built, tmp_path: Path) -> None:
    target = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, built.wheel, cwd=tmp_path)
    code = """if True:
        import importlib, json, fastdaa
        parts = [importlib.import_module("fastdaa." + name) for name in ("kernels", "benchmarks")]
        print(json.dumps([fastdaa.__file__, *(list(part.__path__)[0] for part in parts)]))
    """
    files = python(code, tmp_path, PYTHONPATH=str(target))
    assert all(Path(file).is_relative_to(target) for file in files), files
    assert (target / "bin" / "fastdaa").is_file()


def test_editable_install(built: Built, tmp_path: Path) -> None:
    """From a copy, into an environment that sees this one's packages but not its fastdaa."""
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    interpreter = environment / "bin" / "python"
    purelib = run(
        interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    Path(purelib, "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    checkout = tmp_path / "checkout"
    shutil.copytree(built.source, checkout, symlinks=True, ignore=NOT_SOURCE)
    pip = (sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(*pip, *options, "-e", checkout, cwd=tmp_path)
    code = """if True:
        import importlib, importlib.metadata, fastdaa
        parts = [importlib.import_module("fastdaa." + name) for name in ("kernels", "benchmarks")]
        print(fastdaa.__file__, *(list(part.__path__)[0] for part in parts), sep="\\n")
        print(importlib.metadata.version("fastdaa"))
    """
    *files, version = run(interpreter, "-c", code, cwd=tmp_path).split()
    assert version == fastdaa.__version__
    assert all(Path(file).is_relative_to(checkout) for file in files), files
    assert (environment / "bin" / "fastdaa").is_file()


def test_runs_from_the_root_without_an_install() -> None:
    said = run(sys.executable, "-m", "fastdaa.cli", "--help", cwd=ROOT)
    assert "usage" in said.lower()
    assert "train" in said


def test_never_ours_when_someone_imports_kernels(tmp_path: Path) -> None:
    code = """if True:
        import importlib.util, json
        spec = importlib.util.find_spec("kernels")
        print(json.dumps(spec.origin if spec else None))
    """
    origin = python(code, ROOT)
    assert origin is None or not Path(origin).is_relative_to(ROOT)
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("", encoding="utf-8")
    origin = python(code, ROOT, PYTHONPATH=str(tmp_path))
    assert origin == str(theirs / "__init__.py")


def test_transformers_imports_from_the_root() -> None:
    pytest.importorskip("transformers")
    code = "from transformers import LlamaForCausalLM; print(LlamaForCausalLM.__name__)"
    assert run(sys.executable, "-c", code, cwd=ROOT).split() == ["LlamaForCausalLM"]


def test_import_fastdaa_needs_torch_alone() -> None:
    """Nothing heavy is imported, and nothing heavy is needed."""
    code = f"""if True:
        import json, sys, torch
        before = set(sys.modules)
        for name in {NOT_IMPORTED!r}:
            sys.modules.setdefault(name, None)
        import fastdaa
        added = {{name for name in sys.modules if sys.modules[name] is not None}} - before
        print(json.dumps(sorted({{name.split(".")[0] for name in added}} & set({NOT_IMPORTED!r}))))
    """
    assert python(code, ROOT) == []


def test_import_fastdaa_leaves_installed_packages_alone() -> None:
    code = f"""if True:
        import json, sys, torch
        before = {{name.split(".")[0] for name in sys.modules}}
        import fastdaa
        added = {{name.split(".")[0] for name in sys.modules}} - before
        print(json.dumps(sorted(added & set({NOT_IMPORTED!r}))))
    """
    assert python(code, ROOT) == []


def test_public_names_exist() -> None:
    missing = [name for name in fastdaa.__all__ if not hasattr(fastdaa, name)]
    assert missing == []


def _toml(path: Path) -> dict[str, Any]:
    name = "tomllib" if importlib.util.find_spec("tomllib") else "tomli"
    return pytest.importorskip(name).loads(path.read_text(encoding="utf-8"))


def test_version_is_written_once() -> None:
    project = _toml(ROOT / "pyproject.toml")["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert "version" not in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_pins_satisfy_what_the_package_asks_for() -> None:
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line or line.startswith(("#", "-r")):
                continue
            pin = Requirement(line)
            assert len(pin.specifier) == 1 and "==" in str(pin.specifier), f"{path.name}: {line}"
            pins.setdefault(pin.name.lower(), []).append(str(pin.specifier)[2:])
    project = _toml(ROOT / "pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["triton"], *extras["peft"], *extras["dev"]):
        asked = Requirement(line)
        assert asked.name in pins, f"{asked.name} has no pin in requirements/"
        for version in pins[asked.name]:
            assert version in asked.specifier, f"{line}: pinned to {version}"
