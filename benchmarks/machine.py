"""What a number was measured on."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = {
    "torch": "torch", "triton": "triton", "transformers": "transformers",
    "accelerate": "accelerate", "trl": "trl", "liger": "liger-kernel", "cce": "cut-cross-entropy",
    "quack": "quack-kernels", "fastdaa": "fastdaa",
}  # fmt: skip


def machine(device: str) -> dict[str, Any]:
    """Device, driver, processor, versions and commit, for every row.

    ``commit`` is that of this checkout; ``dirty`` says whether it was changed since, and
    ``changes`` is a short hash of how. A package that is not installed has the version None.
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
    """The commit of this checkout, and a hash of what was changed since, or None."""
    here = Path(__file__).resolve()
    run = partial(subprocess.run, cwd=here.parent, capture_output=True, text=True)
    try:
        # An installed copy may lie inside somebody else's repository.
        if run(["git", "ls-files", "--error-unmatch", here.name]).returncode:
            return "no checkout", None
        commit = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout
        if not changed.strip():
            return commit, None
        difference = run(["git", "diff", "HEAD", "--no-ext-diff"]).stdout
    except OSError:
        return "no git", None
    return commit, hashlib.sha256(difference.encode()).hexdigest()[:8]


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
