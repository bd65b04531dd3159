"""Bad numbers: a gradient that is not finite, or a loss or gradient norm that leaps. Whose fault is it, and what now?

Before anything is updated the step is run again on the same batch. All ranks see the same sums, so all decide alike:

    first run bad ─► again: good              transient: a device erred; the good run counts, as if nothing had been
                     again: bad, other bits   once more, three runs at most
                     again: bad, same bits    deterministic: the batch, the weights or the learning rate; the policy decides

    keep       the step counts as it is (leaps only)
    skip       its samples and its place in the learning rate are used up, nothing is updated
    rollback   the run goes back a number of steps and skips this one when it comes again
    stop       the run ends with the cause

Who erred shows in what each rank had before anything was summed: its own loss and the bits of its own gradients. Where they
differ between the runs of a transient fault, the rank is named. What a rank gets wrong it passes on to the next pipeline
stage and to its tensor-parallel peers, which then differ, too: those named share one rank that erred. Kernels that are not
deterministic make all ranks differ, and then nobody is named.

A run leaves no trace: gradients are summed anew, dropout is a function of the sample, and what else is counted begins with
the backward. An overflow under a dynamic loss scale of fp16 is no fault; it is skipped without a second run.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raytron.config import GuardConfig
from raytron.errors import GuardError
from raytron.observe.spikes import SpikeDetector
from raytron.parallel.bits import total
from raytron.parallel.buckets import Bucket, GradientBuckets
from raytron.parallel.collectives import all_gather
from raytron.parallel.mesh import Mesh
from raytron.parallel.random import key_of

RUNS = 3  # of one step, at most
TRAIL = 1000  # steps remembered
NOT_FINITE, SPIKE = "not finite", "spike"
WATCHED = ("loss", "gradient norm")


class Attempt(NamedTuple):
    """One forward and backward of a step."""

    loss: float
    grad_norm: float
    sums: dict[str, float]  # equal on all ranks
    own: int  # of this rank's own loss and gradients, before anything was summed: equal only where all bits are
    finite: bool  # this rank's own gradients are; not looked at in a first run

    @property
    def bits(self) -> bytes:
        """What two runs are compared by: sums may be NaN, which equals nothing."""
        return bits(self.sums.values())


class Finding(NamedTuple):
    """What came of a step that was run again; equal on all ranks."""

    what: str  # NOT_FINITE or SPIKE
    detail: str  # in words
    runs: int
    transient: bool  # a later run was good, and counts
    ranks: tuple[int, ...]  # transient: whose own values differed between the runs; else: whose own are not finite
    losses: tuple[float, ...]  # of each run, nats
    grad_norms: tuple[float, ...]
    action: str  # keep, skip, rollback, stop

    @property
    def commits(self) -> bool:
        """Whether the run goes on from this step."""
        return self.action in ("keep", "skip")

    def __str__(self) -> str:
        who = f" on rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        if self.transient:
            return f"{self.detail}, but not when the step was run again: a transient fault{who}; the good run counts"
        return f"{self.detail}{who}, in each of {self.runs} runs: {self.action}"

    def record(self) -> dict[str, Any]:
        """For a step's record."""
        return {**self._asdict(), "message": str(self)}


class Rollback(Exception):
    """The run is to go back: to the newest state of at most `back_to` committed steps, and to skip step `step` later on."""

    def __init__(self, step: int, back_to: int, finding: Finding):
        self.step, self.back_to, self.finding = step, back_to, finding
        super().__init__(f"step {step}: {finding}; the run goes back to step {back_to} or before, and will skip it")

    def __reduce__(self) -> tuple[type, tuple[int, int, Finding]]:
        return type(self), (self.step, self.back_to, self.finding)


class Guard:
    """Judges the steps of one rank; all ranks of a mesh make it, and call it, together.

    skip: numbers of steps, from 1, that are skipped when they come.
    """

    def __init__(self, config: GuardConfig, mesh: Mesh, buckets: GradientBuckets | None):
        """buckets: whose gradients tell a rank's own fault; None: steps are never run again."""
        self.config, self.mesh = config, mesh
        self.own = OwnGradients(buckets) if buckets is not None else None
        self.spikes = SpikeDetector(WATCHED if config.spike else (), config.spike or math.inf, config.spike_window)
        self.skip: set[int] = set()
        self.in_a_row = 0  # steps skipped for their numbers
        self.trail: deque[tuple[int, int]] = deque(
            maxlen=TRAIL
        )  # number of a step, and this rank's own fingerprint in it

    def examine(self, attempt: Callable[[bool], Attempt], overflows: bool) -> tuple[Attempt, Finding | None]:
        """Runs a step, again if it is bad; the run that counts, and what was found. Collective over the world.

        attempt: runs it; its argument is whether to look if this rank's own gradients are finite. overflows: a gradient that
        is not finite is an overflow, and no fault.
        """
        runs = [attempt(False)]
        wrong = self._wrong(runs[0])
        if wrong is None or (overflows and wrong[0] == NOT_FINITE):
            return runs[0], None
        still: tuple[str, str] | None = wrong
        while still is not None and len(runs) < RUNS and (len(runs) < 2 or runs[-1].bits != runs[-2].bits):
            runs.append(attempt(True))
            still = self._wrong(runs[-1])
        transient = still is None
        action = "keep" if transient else self._policy(wrong[0])
        found = Finding(
            *wrong,
            runs=len(runs),
            transient=transient,
            ranks=self._who(runs, transient),
            losses=tuple(run.loss for run in runs),
            grad_norms=tuple(run.grad_norm for run in runs),
            action=action,
        )
        return runs[-1], found

    def _wrong(self, run: Attempt) -> tuple[str, str] | None:
        """What is wrong with a run, and in words."""
        if not (math.isfinite(run.grad_norm) and math.isfinite(run.loss)):
            return NOT_FINITE, f"loss {run.loss:.4g}, gradient norm {run.grad_norm:.4g}"
        leaps = self.spikes.leaps(watched(run.loss, run.grad_norm))
        return (SPIKE, ", ".join(leaps.values())) if leaps else None

    def _policy(self, what: str) -> str:
        policy = self.config.on_nonfinite if what == NOT_FINITE else self.config.on_spike
        return "stop" if policy == "skip" and self.in_a_row >= self.config.max_skipped else policy

    def _who(self, runs: list[Attempt], transient: bool) -> tuple[int, ...]:
        """The ranks that a fault shows on before anything is summed; none where it shows on all of several."""
        mine = runs[0].own != runs[-1].own if transient else not runs[-1].finite
        flags = all_gather(torch.tensor([mine], dtype=torch.float64, device=self.mesh.device), self.mesh.world)
        ranks = tuple(rank for rank, flag in enumerate(flags.tolist()) if flag)
        return ranks if len(ranks) < self.mesh.world.size or self.mesh.world.size == 1 else ()

    def took(self, loss: float, grad_norm: float, skipped: bool, overflow: bool) -> None:
        """After each step that was not to be skipped anyway: remembers what decides about later ones."""
        if overflow:
            return
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.spikes.saw(watched(loss, grad_norm))

    def enforce(self, step: int, first: int, sequences: int, finding: Finding) -> None:
        """Step number `step`, of samples [first, first + sequences), can't be committed: raises what its finding asks for.

        Raises GuardError to stop, Rollback to go back.
        """
        if finding.action == "rollback":
            raise Rollback(step, max(0, step - self.config.rollback_steps), finding)
        if finding.action == "stop":
            key = "guard.on_nonfinite" if finding.what == NOT_FINITE else "guard.on_spike"
            asked = self.config.on_nonfinite if finding.what == NOT_FINITE else self.config.on_spike
            row = f", after {self.in_a_row} skipped steps in a row (guard.max_skipped)" if asked == "skip" else ""
            raise GuardError(
                f"step {step}, samples {first} to {first + sequences - 1}: {finding}{row}\n    remedy: look at these "
                f"samples and at the steps before in metrics.jsonl; lower lr.peak or optimizer.clip_norm; or go on with "
                f"{key}=rollback"
            )

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"spikes": self.spikes.facts(), "skip": sorted(self.skip), "in_a_row": self.in_a_row}

    def restore(self, facts: dict[str, Any]) -> None:
        """Goes on from `facts`; steps that are to be skipped are added to those that already were."""
        self.spikes.restore(facts.get("spikes", {}))
        self.skip |= set(facts.get("skip", ()))
        self.in_a_row = int(facts.get("in_a_row", 0))


class OwnGradients:
    """Looks at what this rank alone has summed up while it is sent to be summed over ranks."""

    def __init__(self, buckets: GradientBuckets):
        self.finite = False  # whether it was asked for, too
        self._sums: list[Tensor] = []
        self._norms: list[Tensor] = []
        for bucket in buckets.buckets:
            bucket.observers.append(self._look)

    def begin(self, finite: bool) -> None:
        """Before the first backward of a step. finite: whether to look if all numbers are."""
        self.finite = finite
        self._sums.clear()
        self._norms.clear()

    def fingerprint(self, loss: float) -> int:
        """63 bits of this rank's loss and all gradients in the order in which they were sent; never 0."""
        sums = torch.stack(self._sums).tolist() if self._sums else []
        return key_of(bits([loss]).hex(), *sums) & (1 << 63) - 1 | 1

    def all_finite(self) -> bool:
        """Where it was asked for."""
        return not self._norms or bool(torch.stack(self._norms).isfinite().all())

    def _look(self, bucket: Bucket) -> None:
        for x in bucket.unsummed():
            self._sums.append(total(x))
            if self.finite:
                self._norms.append(torch.linalg.vector_norm(x))


def bits(values: Any) -> bytes:
    """Some floats to the bit."""
    values = tuple(values)
    return struct.pack(f"{len(values)}d", *values)


def watched(loss: float, grad_norm: float) -> dict[str, float]:
    return dict(zip(WATCHED, (loss, grad_norm), strict=True))
