"""Two versions of this project side by side: the working tree, and what git has under a name."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

_NOT_COPIED = shutil.ignore_patterns("results", "__pycache__")


class Version(NamedTuple):
    """A tree that can be measured, and how it is called in tables."""

    name: str
    folder: Path


def checkout() -> Path:
    """The root of the git checkout that this package runs from; ValueError if it runs from none."""
    # `fastdaa/benchmarks` is a symlink in a checkout and a folder of the package in an install.
    root = Path(__file__).absolute().parents[2]
    root = root.parent if root.name == "fastdaa" else root
    tracked = _git(root, "ls-files", "--error-unmatch", "fastdaa/__init__.py")
    if tracked.returncode:
        raise ValueError(
            "expected --compare in a git checkout of fastdaa, got the installed package"
            f" in {root} (clone the project and run `python -m fastdaa.cli bench` there)"
        )
    return root


def commit_of(root: Path, ref: str) -> str:
    """The full hash of a commit, branch or tag; ValueError if git knows no such thing."""
    # A name that begins with a dash would be read as a flag.
    found = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if found.returncode or not ref:
        raise ValueError(f"expected a commit, branch or tag of {root}, got {ref!r}")
    return found.stdout.decode().strip()


def both(root: Path, refs: str, folder: Path) -> tuple[Version, Version]:
    """The base and the new version of ``REF`` (against the working tree) or ``A..B``.

    Versions from git are unpacked below ``folder``; the checkout itself is not touched. Both are
    measured by the benchmark code of the working tree.
    """
    base, dots, new = refs.partition("..")
    hashes = [commit_of(root, ref) for ref in ([base, new] if dots else [base])]
    versions = [
        Version(f"{ref} ({commit[:7]})", _unpack(root, commit, folder / str(place)))
        for place, (ref, commit) in enumerate(zip((base, new), hashes, strict=False))
    ]
    if not dots:
        head, changed = commit_of(root, "HEAD")[:7], _git(root, "status", "--porcelain").stdout
        versions.append(Version(f"working tree ({head}{'+' if changed else ''})", root))
    return versions[0], versions[1]


def _unpack(root: Path, commit: str, folder: Path) -> Path:
    """The tree of a commit with today's ``benchmarks/`` laid over its own."""
    archive = _git(root, "archive", "--format=tar", commit)
    if archive.returncode:
        raise ValueError(f"git archive {commit}: {archive.stderr.decode().strip()}")
    folder.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tree:
        tree.extractall(folder, **_safely())
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    shutil.copytree(root / "benchmarks", folder / "benchmarks", ignore=_NOT_COPIED)
    link = folder / "fastdaa" / "benchmarks"
    if not link.is_symlink():
        os.symlink(Path("..") / "benchmarks", link)
    return folder


def _safely() -> dict[str, Any]:
    """The safe filter, where this patch release of Python has it."""
    return {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True)
    except FileNotFoundError:
        raise ValueError("expected git on the path for --compare, found none") from None
