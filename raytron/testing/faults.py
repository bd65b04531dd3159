"""Faults as sentences, injected at named phases of a run.

    kill rank 1 in the forward of step 3                 SIGKILL
    stop rank 0 in the optimizer of step 4               SIGSTOP: it does not answer, and its connections stay open
    seize rank 1 in the forward of step 3                it holds its interpreter's lock
    hang rank 1 in the forward of step 3                 it answers, and gets nowhere
    break rank 0 in the forward of step 3                it raises an exception of its own, ...
    break rank 0 in every forward of step 3              ... and again whenever it comes there
    fill the disk of rank 1 in the write of step 4       OSError: no space left on device
    spoil the disk of rank 1 in the write of step 4      OSError: input/output error
    poison rank 1 in the forward of step 3               one of its weights becomes NaN for this step
    flip rank 1 in the all-reduce of step 3              one bit of one of its weights
    slow rank 1 in every forward                         half a second longer

Phases are those that a trainer tells: forward, all-reduce, optimizer of step n (the one that is under way); write, publish,
published of step n (the one that is saved); load and build, which are of no step. `every` may leave out the step. A fault
happens once in a run, however often its place is passed, unless it says `every`: a file in a folder keeps account, since
processes die.
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
    r"(?P<verb>kill|stop|seize|hang|break|fill the disk of|spoil the disk of|poison|flip|slow) rank (?P<rank>\d+) "
    r"in (?P<how>the|every) (?P<phase>[a-z-]+)(?: of step (?P<step>\d+))?"
)
STEPLESS = {"load", "build"}
PHASES = {"forward", "all-reduce", "optimizer", "write", "publish", "published", *STEPLESS}
SLOW_S = 0.5
FOREVER_S = 3600


class Fault(NamedTuple):
    """What happens to whom, and where. step: None for any."""

    verb: str
    rank: int
    phase: str
    step: int | None
    every: bool

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
        return cls(match["verb"], int(match["rank"]), match["phase"], step, every)

    def __str__(self) -> str:
        where = f"{'every' if self.every else 'the'} {self.phase}" + (
            "" if self.step is None else f" of step {self.step}"
        )
        return f"{self.verb} rank {self.rank} in {where}"


class Faults:
    """Opens trainers to whom some faults happen: an `OpenTrainer`. account: a folder that all processes see."""

    def __init__(self, sentences: Sequence[str], account: Path | str):
        self.faults = [Fault.parse(sentence) for sentence in sentences]
        self.account = Path(account)
        self.account.mkdir(parents=True, exist_ok=True)

    def __call__(self, plan: Plan, mesh: Mesh, dataset: Path) -> Trainer:
        opened: list[Trainer] = []

        def hook(phase: str) -> None:
            for number, fault in enumerate(self.faults):
                here = fault.rank == mesh.rank and fault.phase == phase and self._here(fault, opened)
                if here and (fault.every or self._first(number)):
                    ACTS[fault.verb](opened[0] if opened else None)

        hook("build")
        opened.append(open_trainer(plan, mesh, dataset, hook))
        return opened[0]

    def happened(self) -> list[str]:
        """The faults that have happened, of those that happen once."""
        return [str(fault) for number, fault in enumerate(self.faults) if self._mark(number).exists()]

    def _here(self, fault: Fault, opened: list[Trainer]) -> bool:
        """Whether the step is the fault's: the one under way, and while one is saved the last one that is done."""
        if fault.step is None:
            return True
        under_way = fault.phase in ("forward", "all-reduce", "optimizer")
        return bool(opened) and opened[0].step + under_way == fault.step

    def _first(self, number: int) -> bool:
        try:
            os.close(os.open(self._mark(number), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def _mark(self, number: int) -> Path:
        return self.account / f"happened-{number}"


def _seize(_: Trainer | None) -> None:
    """A call into C that keeps the interpreter's lock: no other thread of the process runs."""
    ctypes.PyDLL(None).sleep(FOREVER_S)


def _break(_: Trainer | None) -> None:
    raise ZeroDivisionError("a fault that was asked for")


def _no_space(_: Trainer | None) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _bad_disk(_: Trainer | None) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@torch.no_grad()
def _poison(trainer: Trainer | None) -> None:
    """Of a weight as it is used: the next update writes it anew from its master, unless it is the master itself."""
    _weight(trainer).view(-1)[0] = torch.nan


@torch.no_grad()
def _flip(trainer: Trainer | None) -> None:
    bits = _weight(trainer).view(-1)[:1].view(torch.uint8)
    bits[1] ^= 64


def _weight(trainer: Trainer | None) -> torch.Tensor:
    assert trainer is not None
    return next(param for param in trainer.engine.model.params if param.numel()).detach()


ACTS: dict[str, Callable[[Trainer | None], None]] = {
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "seize": _seize,
    "hang": lambda _: time.sleep(FOREVER_S),
    "break": _break,
    "fill the disk of": _no_space,
    "spoil the disk of": _bad_disk,
    "poison": _poison,
    "flip": _flip,
    "slow": lambda _: time.sleep(SLOW_S),
}
