"""The generations in a place: which are committed, which are good, which are leftovers, which may go.

A generation is *good* if COMMIT, metadata.json and every shard verify by size and digest. Retention keeps the newest ones,
every m-th, the best by validation loss, and always the newest good one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from raytron.checkpoint import owner
from raytron.checkpoint.files import check_file, storage_of
from raytron.checkpoint.generation import (
    DIRECTORY,
    Generation,
    abandon,
    commit,
    create,
    is_committed,
    note_validation,
    open_generation,
    remove,
    step_of,
)
from raytron.checkpoint.record import FileRecord, Records
from raytron.checkpoint.storage import scheme_of
from raytron.config import load
from raytron.errors import CheckpointError, ConfigError

__all__ = [
    "Generation", "abandon", "checkpoints_of", "commit", "committed", "create", "damages", "find", "newest_good",
    "note_validation", "open_generation", "prune", "verify",
]  # fmt: skip
Report = Callable[[Path, CheckpointError], None]
log = logging.getLogger(__name__)


def committed(directory: Path | str, report: Report | None = None) -> list[Generation]:
    """Generations with a readable COMMIT, newest first: by step, then time.

    Those whose COMMIT is unreadable go to `report` (default: the log).
    """
    found = []
    for path in directories(directory):
        if not is_committed(path):
            continue
        try:
            found.append(open_generation(path))
        except CheckpointError as error:
            (report or warn)(path, error)
    return sorted(found, key=lambda generation: (generation.step, generation.time, generation.path.name), reverse=True)


def verify(generation: Generation, *, digests: bool = True) -> Records:
    """Check metadata.json and every shard by size and, unless told otherwise, digest.

    Raises CheckpointError that names every damaged file. Reads all bytes, with a few threads.
    """
    files = generation.records.files.values()
    with ThreadPoolExecutor(max_workers=4) as pool:
        problems = [problem for problem in pool.map(lambda file: _problem(generation, file, digests), files) if problem]
    if problems:
        raise CheckpointError("\n".join(problems))
    return generation.records


def _problem(generation: Generation, file: FileRecord, digests: bool) -> str | None:
    try:
        check_file(generation.path / file.name, file.size, file.digest if digests else None)
    except CheckpointError as error:
        return str(error)
    return None


def damages(path: Path | str) -> dict[Path, str]:
    """Every committed generation that a path means (itself, or all of a folder of checkpoints or a run directory), newest
    first, and what is wrong with it: every damaged file by name, or nothing. Reads all bytes."""
    path = Path(path)
    folders = [path] if is_committed(path) else directories(path) or directories(checkpoints_of(path))
    return {folder: _damage(folder) for folder in sorted(folders, reverse=True) if is_committed(folder)}


def _damage(folder: Path) -> str:
    found = []
    try:
        generation = open_generation(folder)
        for check in (lambda: verify(generation), lambda: generation.validation_loss):
            try:
                check()
            except CheckpointError as error:
                found.append(str(error))
    except CheckpointError as error:
        found.append(str(error))
    return "\n".join(found)


def newest_good(
    directory: Path | str, report: Report | None = None, *, digests: bool = True, up_to: int | None = None
) -> Generation | None:
    """The newest generation that verifies, of at most step `up_to`; None if there is none.

    Each one passed over is told to `report` (default: the log) with its reason, newest first; those whose COMMIT is
    unreadable come before all others. One process reads every byte of the candidates, so call it on one rank.
    """
    for generation in committed(directory, report):
        if up_to is not None and generation.step > up_to:
            continue
        try:
            verify(generation, digests=digests)
            return generation
        except CheckpointError as error:
            (report or warn)(generation.path, error)
    return None


def find(path: Path | str) -> Generation:
    """The generation meant by a path: itself, or the newest committed one of a checkpoints folder or run directory.

    Raises CheckpointError.
    """
    path = Path(path)
    if is_committed(path):
        return open_generation(path)
    for directory in (path, checkpoints_of(path)):
        generations = committed(directory)
        if generations:
            return generations[0]
    raise CheckpointError(f"{path}: no committed checkpoint here, in a folder of checkpoints or in a run directory")


def checkpoints_of(run: Path) -> Path:
    """Where a run keeps its generations, as its config.yaml says: `checkpoint.directory`, or its own folder checkpoints."""
    stated = None
    if scheme_of(run) is None and (run / "config.yaml").exists():
        with contextlib.suppress(ConfigError):
            stated = load(run / "config.yaml").checkpoint.directory
    return run / "checkpoints" if stated is None else Path(stated)


def prune(
    directory: Path | str,
    keep_last: int | None,
    *,
    keep_every: int | None = None,
    keep_best: int | None = None,
    digests: bool = True,
    abandoned_after_s: float = 86400.0,
) -> list[Path]:
    """Remove what retention lets go, and leftovers that no writer can own; returns the directories that are gone.

    keep_last: how many of the newest stay; None: all. keep_every: those whose step is a multiple of it stay, too.
        keep_best: so many with the lowest validation loss stay, too.

    The newest good generation always stays: if none of the newest `keep_last` verifies, the search goes on below them
    and stops at the first that does. `digests=False` judges by sizes alone, which reads no shard. Call it on one rank.
    """
    if keep_last is not None and keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}: at least one generation has to be kept")
    unreadable: list[Path] = []
    generations = committed(directory, lambda path, _error: unreadable.append(path))
    leftovers = [
        path
        for path in directories(directory)
        if not is_committed(path) and owner.is_ownerless(path, abandoned_after_s)
    ]
    old = _beyond(generations, unreadable, keep_last, digests) if keep_last is not None else []
    special = {generation.path for generation in _special(generations, keep_every, keep_best)}
    return [path for path in (*old, *leftovers) if path not in special and remove(path)]


def _beyond(generations: list[Generation], unreadable: list[Path], keep_last: int, digests: bool) -> list[Path]:
    """All that is older than the newest `keep_last` and than the newest good one."""
    beyond = len(generations) > keep_last
    good = _first_good(generations, digests) if beyond else None
    if beyond and good is None:
        return []
    kept = generations[: max(keep_last, (good or 0) + 1)]
    gone = [generation.path for generation in generations[len(kept) :]]
    return gone + [path for path in unreadable if len(kept) >= keep_last and step_of(path) < kept[-1].step]


def _special(generations: list[Generation], every: int | None, best: int | None) -> list[Generation]:
    """What stays although it is old."""
    milestones = [
        generation for generation in generations if every and generation.step and generation.step % every == 0
    ]
    losses = {g.path: loss for g in generations if best and (loss := _loss(g)) is not None}
    judged = sorted((g for g in generations if g.path in losses), key=lambda g: (losses[g.path], -g.step))
    return milestones + judged[: best or 0]


def _loss(generation: Generation) -> float | None:
    try:
        return generation.validation_loss
    except CheckpointError as error:
        warn(generation.path, error)
        return None


def _first_good(generations: list[Generation], digests: bool) -> int | None:
    for index, generation in enumerate(generations):
        try:
            verify(generation, digests=digests)
            return index
        except CheckpointError as error:
            warn(generation.path, error)
    return None


def directories(directory: Path | str) -> list[Path]:
    """Directories named like generations; links are not followed."""
    folders = storage_of(Path(directory)).folders(Path(directory))
    return [path for path in folders if DIRECTORY.fullmatch(path.name)]


def warn(path: Path, error: CheckpointError) -> None:
    log.warning("checkpoint passed over: %s: %s", path.name, error)
