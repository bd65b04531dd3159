"""A run's folder in one node's memory: who uses it, and when it may go.

    /dev/shm/raytron-RUN-NODE/
      owner-4711                  a process that uses the folder: the keeper, or a rank
      000003-00001-0.segment      epoch 3, rank 1, first of two buffers
      000003.pulled               which steps of epoch 3 the partner node holds
      copies/                     segments of the partner whose ranks this node's keeper follows

Memory that nobody frees is lost until the machine starts again, so every process that uses a folder says so in a file of its
own, and a folder goes when none of them lives any more: its keeper removes it when the run ends, and keepers sweep what
others left behind. A keeper that died is followed by another one, in the same folder: what the ranks wrote stays.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path

from raytron.checkpoint import owner
from raytron.checkpoint.files import from_json, read_file, to_json
from raytron.checkpoint.segment import SUFFIX
from raytron.errors import CheckpointError

TMPFS = Path("/dev/shm")
BEGIN = "raytron-"
OWNER = "owner-"
COPIES = "copies"
EPOCH = re.compile(rf"(\d{{6,}})(-.*\{SUFFIX}|\.pulled)")


def memory_folder(run: str, node: str) -> Path:
    """The folder of a run on a node: on tmpfs, where there is one. run: unlike that of any other run, also of one that had
    the same name; node: tells nodes apart that share a machine."""
    root = TMPFS
    if not root.is_dir():
        root = Path(tempfile.gettempdir())
        warnings.warn(f"there is no {TMPFS} here: what is meant for memory is written to {root}", stacklevel=2)
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", f"{run}-{node[:16]}")
    return root / f"{BEGIN}{plain}"


def use(folder: Path) -> None:
    """This process uses a folder, which is made where it is not there. Raises CheckpointError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / f"{OWNER}{os.getpid()}").write_bytes(to_json(owner.this_process()))
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be used: {error.strerror}") from error


def is_used(folder: Path) -> bool:
    """Whether a process that uses a folder lives, or may live on a machine that shares the folder."""
    return any(_lives(path) for path in folder.glob(f"{OWNER}*"))


def _lives(path: Path) -> bool:
    try:
        return owner.lives(from_json(path, read_file(path))) is not False
    except CheckpointError:
        return False


def sweep(root: Path) -> list[Path]:
    """Removes the folders of which no user lives; those that are gone."""
    gone = []
    for folder in sorted(root.glob(f"{BEGIN}*")):
        if folder.is_dir() and not folder.is_symlink() and any(folder.glob(f"{OWNER}*")) and not is_used(folder):
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
    return gone


def forget(folder: Path, before: int) -> None:
    """Removes what epochs before `before` left in a folder: a later one holds as much."""
    for path in (*folder.glob("*"), *(folder / COPIES).glob("*")):
        match = EPOCH.fullmatch(path.name)
        if match and int(match[1]) < before:
            path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it."""
    shutil.rmtree(folder, ignore_errors=True)
