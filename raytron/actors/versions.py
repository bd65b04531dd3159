"""What must be equal on the driver and on every worker: Raytron's own code, torch, Ray, Python."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import raytron

Versions = dict[str, str]


def versions() -> Versions:
    """Of this process; Raytron's code by its digest."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"raytron": code_digest(), "torch": version("torch"), "ray": version("ray"), "python": python}


def code_digest() -> str:
    """A digest of all Python files of the package, by name and content."""
    root = Path(raytron.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def mismatches(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """What differs, as text."""
    return [
        f"{name} {there.get(name)} where the driver has {here[name]}" for name in here if here[name] != there.get(name)
    ]
