"""Faults as sentences, injected at named phases of a run.

    kill rank 1 in the forward of step 3                 SIGKILL
    stop rank 0 in the optimizer of step 4               SIGSTOP: it does not answer, and its connections stay open
    seize rank 1 in the forward of step 3                it holds its interpreter's lock
    hang rank 1 in the forward of step 3                 it answers, and gets nowhere
    break rank 0 in the forward of step 3                it raises an exception of its own, ...
    break rank 0 in every forward of step 3              ... and again whenever it comes there
    exhaust rank 1 in every forward of step 3            it is out of memory, unless whole blocks are recomputed
    fill the disk of rank 1 in the write of step 4       OSError: no space left on device
    spoil the disk of rank 1 in the write of step 4      OSError: input/output error
    damage the memory of rank 1 in the forward of step 3 a byte of what it has written there last
    poison rank 1 in the forward of step 3               one of its weights is NaN until its next phase begins
    ruin rank 1 in the restored                          one of its weights is NaN from then on
    flip rank 1 in the all-reduce of step 3              one bit of one of its weights
    slow rank 1 in every forward                         half a second longer
    kill rank 1 in the second build                      not in the one that every run begins with

Phases are those that a trainer tells: forward, all-reduce, optimizer of step n (the one that is under way); write, publish,
published of step n (the one that is saved); load, from memory or disk, restored, which is told after memory was read, and
build, which are of no step. `every` may leave out the step. A fault happens once in a run, however often its place is
passed, unless it says `every`: a file in a folder keeps account, since processes die.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from raytron.parallel.mesh import Mesh
from raytron.plan.plan import Plan
from raytron.training.open import open_trainer
from raytron.training.trainer import Trainer

SENTENCE = re.compile(
    r"(?P<verb>kill|stop|seize|hang|break|exhaust|fill the disk of|spoil the disk of|damage the memory of|poison|ruin|flip|"
    r"slow) rank (?P<rank>\d+) in (?P<how>the|the second|every) (?P<phase>[a-z-]+)(?: of step (?P<step>\d+))?"
)
STEPLESS = {"load", "restored", "build"}
UNDER_WAY = {"forward", "all-reduce", "optimizer"}
PHASES = {*UNDER_WAY, "write", "publish", "published", *STEPLESS}
SLOW_S = 0.5
FOREVER_S = 3600
Heal = Callable[[], None]


class Fault(NamedTuple):
    """What happens to whom, and where. step: None for any. passing: of its place; the first one, or the second."""

    verb: str
    rank: int
    phase: str
    step: int | None
    every: bool
    passing: int = 1

    @classmethod
    def parse(cls, sentence: str) -> Fault:
        """Raises ValueError for what is no such sentence."""
        match = SENTENCE.fullmatch(sentence)
        if match is None or match["phase"] not in PHASES:
            raise ValueError(f"{sentence!r}: say e.g. 'kill rank 1 in the forward of step 3'; phases: {sorted(PHASES)}")
        stepless, every = match["phase"] in STEPLESS, match["how"] == "every"
        if (match["step"] is None) != stepless and not every:
            raise ValueError(f"{sentence!r}: the phases {sorted(STEPLESS)} are of no step, the others of one")
        step = None if match["step"] is None else int(match["step"])
        passing = 2 if match["how"] == "the second" else 1
        return cls(match["verb"], int(match["rank"]), match["phase"], step, every, passing)

    def __str__(self) -> str:
        how = "every" if self.every else "the second" if self.passing == 2 else "the"
        when = "" if self.step is None else f" of step {self.step}"
        return f"{self.verb} rank {self.rank} in {how} {self.phase}{when}"


class Faults:
    """Opens trainers to whom some faults happen: an `OpenTrainer`. account: a folder that all processes see."""

    def __init__(self, sentences: Sequence[str], account: Path | str):
        self.faults = [Fault.parse(sentence) for sentence in sentences]
        self.account = Path(account)
        self.account.mkdir(parents=True, exist_ok=True)

    def __call__(self, plan: Plan, mesh: Mesh, dataset: Path) -> Trainer:
        opened: list[Trainer] = []
        healing: list[Heal] = []

        def hook(phase: str) -> None:
            while healing:
                healing.pop()()
            for number, fault in enumerate(self.faults):
                here = fault.rank == mesh.rank and fault.phase == phase and self._here(fault, opened)
                if here and (fault.every or self._now(number, fault.passing)):
                    heal = ACTS[fault.verb](opened[0] if opened else None)
                    healing.extend([heal] if heal is not None else [])

        hook("build")
        opened.append(open_trainer(plan, mesh, dataset, hook))
        return opened[0]

    def happened(self) -> list[str]:
        """The faults that have happened, of those that happen once; `when` tells the times."""
        return [str(fault) for number, fault in enumerate(self.faults) if self._mark(number, fault.passing).exists()]

    def when(self, number: int) -> float:
        """The time at which fault `number` of those that happen once happened, in seconds since the epoch."""
        return self._mark(number, self.faults[number].passing).stat().st_mtime

    def _here(self, fault: Fault, opened: list[Trainer]) -> bool:
        """Whether the step is the fault's: the one under way, or the one that is saved."""
        if fault.step is None or not opened:
            return fault.step is None
        if fault.phase in UNDER_WAY:
            return opened[0].step + 1 == fault.step
        saved = opened[0].saves.saver.step  # None: ranks wait for it
        return (opened[0].step if saved is None else saved) == fault.step

    def _now(self, number: int, passing: int) -> bool:
        """Whether the place of a fault is passed for the `passing`-th time."""
        return next((time for time in range(1, passing + 1) if self._first(number, time)), None) == passing

    def _first(self, number: int, passing: int) -> bool:
        try:
            os.close(os.open(self._mark(number, passing), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _mark(self, number: int, passing: int) -> Path:
        return self.account / f"passed-{number}-{passing}"


def _seize(_: Trainer | None) -> None:
    """A call into C that keeps the interpreter's lock: no other thread of the process runs."""
    ctypes.PyDLL(None).sleep(FOREVER_S)


def _break(_: Trainer | None) -> None:
    raise ZeroDivisionError("a fault that was asked for")


def _exhaust(trainer: Trainer | None) -> None:
    if trainer is None or trainer.plan.config.memory.recompute != "full":
        raise torch.OutOfMemoryError("a fault that was asked for")


def _no_space(_: Trainer | None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bad_disk(_: Trainer | None) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def _damage(trainer: Trainer | None) -> None:
    """In the middle of the data of this rank's newest segment."""
    assert trainer is not None
    assert trainer.replicas is not None, "there is no memory to damage: recovery.memory_every"
    newest = trainer.replicas.newest
    with newest.open("r+b") as file:
        middle = newest.stat().st_size - trainer.replicas.bytes // 2
        file.seek(middle)
        byte = file.read(1)[0]
        file.seek(middle)
        file.write(bytes([byte ^ 64]))


def _poison(trainer: Trainer | None) -> Heal:
    """Until its next phase begins."""
    values = _weight(trainer).view(-1)
    before = float(values[0])
    values[0] = torch.nan

    def heal() -> None:
        values[0] = before

    return heal


def _ruin(trainer: Trainer | None) -> None:
    _weight(trainer).view(-1)[0] = torch.nan


def _flip(trainer: Trainer | None) -> None:
    bits = _weight(trainer).view(-1)[:1].view(torch.uint8)
    bits[1] ^= 64


def _weight(trainer: Trainer | None) -> torch.Tensor:
    """The last one, of which all values are used; of the embedding only some are."""
    assert trainer is not None
    return [param for param in trainer.engine.model.params if param.numel()][-1].detach()


ACTS: dict[str, Callable[[Trainer | None], Heal | None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "seize": _seize,
    "hang": lambda _: time.sleep(FOREVER_S),
    "break": _break,
    "exhaust": _exhaust,
    "fill the disk of": _no_space,
    "spoil the disk of": _bad_disk,
    "damage the memory of": _damage,
    "poison": _poison,
    "ruin": _ruin,
    "flip": _flip,
    "slow": lambda _: time.sleep(SLOW_S),
}
