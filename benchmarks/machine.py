"""What a number was measured on."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_PACKAGES = {
    "torch": "torch", "triton": "triton", "transformers": "transformers",
    "accelerate": "accelerate", "trl": "trl", "liger": "liger-kernel", "cce": "cut-cross-entropy",
    "quack": "quack-kernels", "fastdaa": "fastdaa",
}  # fmt: skip

# From the root of the checkout.
_SOURCES = (":/fastdaa/*.py", ":/kernels/*.py", ":/benchmarks/*.py")


def machine(device: str) -> dict[str, Any]:
    """Device, driver, processor, versions and commit, for every row.

    ``commit`` is that of this checkout; ``dirty`` says whether the package's sources are others,
    and ``changes`` is then a short hash of them. A package that is not installed has the version
    None.
    """
    commit, changes = _commit()
    return {
        "device": device_name(device),
        "driver": _driver() if device == "cuda" else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: _version(package) for name, package in _PACKAGES.items()},
        "commit": commit,
        "dirty": changes is not None,
        "changes": changes,
    }


def device_name(device: str) -> str:
    """What the numbers were measured on."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores, {_cpu_name()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> tuple[str, str | None]:
    """The commit of this checkout, and a hash of the package's sources, or None where they are the
    commit's. Modules that git does not know yet count; tests and pages do not.

    Without git, the hash stands for the commit: rows of other code are told apart.
    """
    here = Path(__file__).resolve()
    run = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True)
    try:
        # An installed copy may lie inside somebody else's repository.
        if run(["git", "ls-files", "--error-unmatch", here.name]).returncode:
            return f"no git, sources {_sources()}", None
        commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        status = ["git", "status", "--porcelain", "--untracked-files=all", "--", *_SOURCES]
        changed = run(status).stdout
    except OSError:
        return f"no git, sources {_sources()}", None
    return commit, _sources() if changed.strip() else None


def _sources() -> str:
    """A short hash of fastdaa's Python files as they are here."""
    spec = find_spec("fastdaa")
    folders = spec.submodule_search_locations if spec is not None else None
    digest = hashlib.sha256()
    for root in (Path(folder).resolve() for folder in folders or ()):
        for path in sorted(_python_files(root)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _python_files(root: Path) -> list[Path]:
    """Those of the package, with kernels and benchmarks, which a checkout has as links."""
    linked = (link.resolve() for link in root.iterdir() if link.is_symlink())
    return [path for folder in (root, *linked) for path in folder.rglob("*.py")]


@cache
def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


@cache
def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
