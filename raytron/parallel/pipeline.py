"""Runs one row of a pipeline schedule: a small interpreter, and the links that carry activations and their gradients.

The interpreter knows four operations (`raytron.plan.schedule.Op`) and no schedule:

    F  take the input, run the stage forward, send the output on
    B  take the output's gradient, run the stage backward, send the input's gradient back
    I  the same, but weight gradients of linear layers are put off
    W  the weight gradients that I put off

Between F and B a stage's input waits for its gradient. Of its output only the place in the graph is kept, from which the
backward starts: its memory belongs to who takes it, a stage of this rank or the transfer.

Transfers are not in the schedule. There is one channel for each directed pair of ranks, and messages travel on it in the
order in which the sender's row makes them. The receiver derives the same order from the same row. It always has the next
receive posted, and keeps what arrives before it is needed in a stash.

NCCL runs transfers of one communicator in issue order, so the two directions of a pair must not share one. torch keeps a
communicator for each pair of a process group, so two process groups over the pipeline ranks are enough: one carries what
goes to higher ranks, the other what goes to lower ones. (This holds for groups that torch sets up lazily: do not bind a
device when the world is opened.)
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from raytron.parallel.mesh import Mesh
from raytron.parallel.tensor import Deferred
from raytron.plan.schedule import Action, Op, Schedule


class Key(NamedTuple):
    """What a message is: an activation for, or a gradient of the output of, `stage` in `microbatch`."""

    kind: str  # "activation" or "gradient"
    stage: int  # that takes it
    microbatch: int


class Watch(Protocol):
    """Is told of every action while it is active. An action starts when its input is there."""

    active: bool

    def now(self) -> float:
        """Seconds of a monotonic clock, when the device has done what it was given."""

    def saw(self, action: Action, start: float, end: float) -> None:
        """An action, and when it ran."""


class StageRunner(Protocol):
    """What the interpreter asks of a stage."""

    def forward(self, x: Tensor | None, microbatch: int) -> Tensor:
        """The stage's output; of the last stage a scalar loss. `x` is None in the first stage."""


def messages(schedule: Schedule, source: int, target: int) -> list[Key]:
    """What rank `source` sends rank `target`, in order."""
    last = len(schedule.rank_of) - 1
    keys = []
    for action in schedule.rows[source]:
        if action.op == Op.F and action.stage < last:
            key = Key("activation", action.stage + 1, action.microbatch)
        elif action.op in (Op.B, Op.I) and action.stage > 0:
            key = Key("gradient", action.stage - 1, action.microbatch)
        else:
            continue
        if schedule.rank_of[key.stage] == target:
            keys.append(key)
    return keys


class Channel:
    """One directed pair of ranks, seen from one end: the sender uses `send`, the receiver `expect` and `take`."""

    def __init__(self, group: dist.ProcessGroup, peer: int, mesh: Mesh):
        self.group, self.peer = group, peer  # the other end's rank in the world
        self.device, self.waiting = mesh.device, mesh.waiting
        self.sending: deque[tuple[Any, Tensor]] = deque()
        self.expected: deque[Key] = deque()
        self.posted: tuple[Key, Any, Tensor] | None = None
        self.stash: dict[Key, Tensor] = {}
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32

    def open(self, *, sends: bool) -> None:
        """Passes one number, so that the connection is there; the other end has to do so now, too."""
        (dist.send if sends else dist.recv)(torch.zeros(1, device=self.device), self.peer, group=self.group)

    def expect(self, keys: Sequence[Key], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """What will come, in order; posts the first receive."""
        self.expected.extend(keys)
        self.shape, self.dtype = shape, dtype
        self._post()

    def send(self, x: Tensor) -> None:
        """Starts sending; the tensor stays alive until it has left."""
        x = x.contiguous()
        self.sending.append((dist.isend(x, dst=self.peer, group=self.group), x))
        while self.sending and self.sending[0][0].is_completed():
            self.sending.popleft()

    def take(self, key: Key) -> Tensor:
        """The message `key`; waits for it, and stashes those that come before."""
        while key not in self.stash:
            if self.posted is None:
                raise RuntimeError(f"{key} was never announced on this channel")
            arrived, work, buffer = self.posted
            with self.waiting:
                work.wait()
            self.stash[arrived] = buffer
            self.posted = None
            self._post()
        return self.stash.pop(key)

    def drain(self) -> None:
        """Waits until all that was sent has left."""
        with self.waiting:
            while self.sending:
                self.sending.popleft()[0].wait()

    def _post(self) -> None:
        if self.expected and self.posted is None:
            key = self.expected.popleft()
            buffer = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.posted = (key, dist.irecv(buffer, src=self.peer, group=self.group), buffer)


class Links:
    """All channels of one rank to the pipeline ranks that it exchanges messages with, at its own dp, cp and tp."""

    def __init__(self, schedule: Schedule, mesh: Mesh):
        here = mesh.coords.pp
        self.incoming: dict[int, Channel] = {}  # by pipeline rank
        self.outgoing: dict[int, Channel] = {}
        if mesh.shape.pp == 1:
            return
        ranks = [mesh.shape.rank(mesh.coords._replace(pp=pp)) for pp in range(mesh.shape.pp)]
        up, down = (mesh.new_process_group(tuple(ranks)) for _ in range(2))
        for other, rank in enumerate(ranks):
            if other == here:
                continue
            if messages(schedule, here, other):
                self.outgoing[other] = Channel(up if here < other else down, rank, mesh)
            if messages(schedule, other, here):
                self.incoming[other] = Channel(up if other < here else down, rank, mesh)

        self._open(here, len(ranks))

    def _open(self, here: int, count: int) -> None:
        """Opens all channels in one order on all ranks. NCCL connects a pair at its first transfer, and blocks until both
        ends are there: two ranks that began with a receive would wait for each other for ever."""
        for source, target in sorted(itertools.permutations(range(count), 2), key=lambda pair: (min(pair) % 2, pair)):
            if source == here and target in self.outgoing:
                self.outgoing[target].open(sends=True)
            elif target == here and source in self.incoming:
                self.incoming[source].open(sends=False)

    def drain(self) -> None:
        """Waits until all that was sent has left."""
        for channel in self.outgoing.values():
            channel.drain()


class Step(NamedTuple):
    """An action with where its input comes from and where its output goes; None: to or from a stage of this rank."""

    action: Action
    takes: Key | None
    source: Channel | None
    gives: Key | None
    target: Channel | None


class Program(NamedTuple):
    """This rank's row of a schedule, made ready to be run many times."""

    steps: tuple[Step, ...]
    expected: tuple[tuple[Channel, list[Key]], ...]  # what each channel will bring, in order
    forward_only: bool


def _program(schedule: Schedule, here: int, links: Links) -> Program:
    rank_of, last = schedule.rank_of, schedule.num_stages - 1
    steps = []
    for action in schedule.rows[here]:
        op, stage, microbatch = action
        takes = gives = None
        if op is Op.F:
            takes = Key("activation", stage, microbatch) if stage > 0 else None
            gives = Key("activation", stage + 1, microbatch) if stage < last else None
        elif op is not Op.W:
            takes = Key("gradient", stage, microbatch) if stage < last else None
            gives = Key("gradient", stage - 1, microbatch) if stage > 0 else None
        before = stage + (-1 if op is Op.F else 1)
        source = None if takes is None or rank_of[before] == here else links.incoming[rank_of[before]]
        target = None if gives is None or rank_of[gives.stage] == here else links.outgoing[rank_of[gives.stage]]
        steps.append(Step(action, takes, source, gives, target))
    expected = tuple((channel, messages(schedule, source, here)) for source, channel in links.incoming.items())
    return Program(tuple(steps), expected, all(step.action.op is Op.F for step in steps))


class Pipeline:
    """Interprets this rank's row of a schedule over the stages that it holds."""

    def __init__(
        self,
        stages: Mapping[int, StageRunner],
        schedule: Schedule,
        mesh: Mesh,
        deferred: Deferred,
        watch: Watch | None = None,
    ):
        self.stages, self.schedule, self.deferred, self.watch = stages, schedule, deferred, watch
        self.links = Links(schedule, mesh)
        self.last = len(schedule.rank_of) - 1
        self.here = mesh.coords.pp
        self._programs: dict[int, tuple[Schedule, Program]] = {}
        self._handoff: dict[Key, Tensor] = {}  # between two stages of this rank
        self._live: dict[tuple[int, int], tuple[Tensor | None, GradientEdge]] = {}
        self._put_off: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def run(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        scale: float,
        *,
        schedule: Schedule | None = None,
    ) -> dict[int, Tensor]:
        """One batch. Returns the last stage's outputs by micro-batch, detached (losses; nothing on other ranks).

        shape, dtype: of the activations between stages on this rank. scale: the gradient of each loss.
        schedule: another one of the same placement, such as forward only.
        """
        program = self._prepared(schedule or self.schedule)
        for channel, keys in program.expected:
            channel.expect(keys, shape, dtype)
        outputs: dict[int, Tensor] = {}
        watch = self.watch if self.watch is not None and self.watch.active else None
        with torch.set_grad_enabled(not program.forward_only):
            for step in program.steps:
                op, stage, microbatch = step.action
                given = None if step.takes is None else self._take(step.takes, step.source)
                start = 0.0 if watch is None else watch.now()
                self.deferred.microbatch = microbatch
                if op is Op.F:
                    y = self._forward(step, given, keep=not program.forward_only)
                    if stage == self.last:
                        outputs[microbatch] = y
                elif op is Op.W:
                    self._weights(stage, microbatch)
                else:
                    self._backward(step, torch.full_like(outputs[microbatch], scale) if given is None else given)
                if watch is not None:
                    watch.saw(step.action, start, watch.now())
        self.links.drain()
        return outputs

    def _prepared(self, schedule: Schedule) -> Program:
        """The program of a schedule, made when it is first run; the schedule is kept, so that its id stays its own."""
        if id(schedule) not in self._programs:
            self._programs[id(schedule)] = (schedule, _program(schedule, self.here, self.links))
        return self._programs[id(schedule)][1]

    def _forward(self, step: Step, x: Tensor | None, keep: bool) -> Tensor:
        _, stage, microbatch = step.action
        if x is not None:
            x.requires_grad_(keep)
        y = self.stages[stage].forward(x, microbatch)
        if keep:
            self._live[stage, microbatch] = (x, get_gradient_edge(y))
        out = y.detach()
        if step.gives is not None:
            self._give(step.gives, step.target, out)
        return out

    def _backward(self, step: Step, dy: Tensor) -> None:
        op, stage, microbatch = step.action
        x, end = self._live.pop((stage, microbatch))
        self.deferred.active = op is Op.I
        try:
            torch.autograd.backward(end, dy)
        finally:
            self.deferred.active = False
        if op is Op.I:
            self._put_off[stage, microbatch] = self.deferred.take()
        if step.gives is not None:
            assert x is not None
            assert x.grad is not None
            self._give(step.gives, step.target, x.grad)

    def _weights(self, stage: int, microbatch: int) -> None:
        with torch.no_grad():
            for task in self._put_off.pop((stage, microbatch)):
                task()

    def _give(self, key: Key, target: Channel | None, x: Tensor) -> None:
        if target is None:
            self._handoff[key] = x
        else:
            target.send(x)

    def _take(self, key: Key, source: Channel | None) -> Tensor:
        return self._handoff.pop(key) if source is None else source.take(key)
