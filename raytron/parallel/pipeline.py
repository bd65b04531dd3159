"""Runs one row of a pipeline schedule: a small interpreter, and the links that carry activations and their gradients.

The interpreter knows four operations (`raytron.plan.schedule.Op`) and no schedule:

    F  take the input, run the stage forward, send the output on
    B  take the output's gradient, run the stage backward, send the input's gradient back
    I  the same, but weight gradients of linear layers are put off
    W  the weight gradients that I put off

Transfers are not in the schedule. There is one channel for each directed pair of ranks, and messages travel on it in the
order in which the sender's row makes them. The receiver derives the same order from the same row. It always has the next
receive posted, and keeps what arrives before it is needed in a stash.

NCCL runs transfers of one communicator in issue order, so the two directions of a pair must not share one. torch keeps a
communicator for each pair of a process group, so two process groups over the pipeline ranks are enough: one carries what
goes to higher ranks, the other what goes to lower ones. (This holds for groups that torch sets up lazily: do not bind a
device when the world is opened.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from raytron.parallel.mesh import Mesh
from raytron.parallel.tensor import Deferred
from raytron.plan.mesh import Coords
from raytron.plan.schedule import Action, Op, Schedule


class Key(NamedTuple):
    """What a message is: an activation for, or a gradient of the output of, `stage` in `microbatch`."""

    kind: str  # "activation" or "gradient"
    stage: int  # that takes it
    microbatch: int


Watch = Callable[[Action, float, float], None]  # action, start and end in seconds of a monotonic clock


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

    def __init__(self, group: dist.ProcessGroup, peer: int, device: torch.device):
        self.group, self.peer, self.device = group, peer, device  # peer: the other end's rank in the world
        self.sending: deque[tuple[Any, Tensor]] = deque()
        self.expected: deque[Key] = deque()
        self.posted: tuple[Key, Any, Tensor] | None = None
        self.stash: dict[Key, Tensor] = {}
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32

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
            work.wait()
            self.stash[arrived] = buffer
            self.posted = None
            self._post()
        return self.stash.pop(key)

    def drain(self) -> None:
        """Waits until all that was sent has left."""
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
        self.schedule = schedule
        self.here = mesh.coords.pp
        self.incoming: dict[int, Channel] = {}
        self.outgoing: dict[int, Channel] = {}
        self.rank_at = [mesh.shape.rank(Coords(pp, *mesh.coords[1:])) for pp in range(mesh.shape.pp)]
        if mesh.shape.pp == 1:
            return
        up, down = (mesh.new_process_group(tuple(self.rank_at)) for _ in range(2))
        for other, rank in enumerate(self.rank_at):
            if other == self.here:
                continue
            if messages(schedule, self.here, other):
                self.outgoing[other] = Channel(up if self.here < other else down, rank, mesh.device)
            if messages(schedule, other, self.here):
                self.incoming[other] = Channel(up if other < self.here else down, rank, mesh.device)

    def begin(self, schedule: Schedule, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Announces what one run of `schedule` (of the same placement) will bring: tensors of one shape."""
        for source, channel in self.incoming.items():
            channel.expect(messages(schedule, source, self.here), shape, dtype)

    def send(self, key: Key, x: Tensor) -> None:
        self.outgoing[self.schedule.rank_of[key.stage]].send(x)

    def take(self, key: Key, source_stage: int) -> Tensor:
        return self.incoming[self.schedule.rank_of[source_stage]].take(key)

    def end(self) -> None:
        for channel in self.outgoing.values():
            channel.drain()


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
        self._handoff: dict[Key, Tensor] = {}  # between two stages of this rank
        self._live: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
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
        active = schedule or self.schedule
        row = active.rows[self.here]
        forward_only = all(action.op == Op.F for action in row)
        self.links.begin(active, shape, dtype)
        outputs: dict[int, Tensor] = {}
        for action in row:
            start = time.perf_counter()
            if action.op == Op.F:
                y = self._forward(action, keep=not forward_only)
                if action.stage == self.last:
                    outputs[action.microbatch] = y
            elif action.op == Op.W:
                with torch.no_grad():
                    for task in self._put_off.pop((action.stage, action.microbatch)):
                        task()
            else:
                self._backward(action, scale)
            if self.watch is not None:
                self.watch(action, start, time.perf_counter())
        self.links.end()
        return outputs

    def _forward(self, action: Action, keep: bool) -> Tensor:
        _, stage, microbatch = action
        x = None
        if stage > 0:
            x = self._take(Key("activation", stage, microbatch), stage - 1)
            x.requires_grad_(keep)
        with torch.set_grad_enabled(keep):
            y = self.stages[stage].forward(x, microbatch)
        if keep:
            self._live[stage, microbatch] = (x, y)
        out = y.detach()
        if stage < self.last:
            self._give(Key("activation", stage + 1, microbatch), out)
        return out

    def _backward(self, action: Action, scale: float) -> None:
        op, stage, microbatch = action
        x, y = self._live.pop((stage, microbatch))
        if stage == self.last:
            dy = torch.full_like(y, scale)
        else:
            dy = self._take(Key("gradient", stage, microbatch), stage + 1)
        self.deferred.active = op == Op.I
        try:
            torch.autograd.backward(y, dy)
        finally:
            self.deferred.active = False
        if op == Op.I:
            self._put_off[stage, microbatch] = self.deferred.take()
        if x is not None:
            assert x.grad is not None
            self._give(Key("gradient", stage - 1, microbatch), x.grad)

    def _give(self, key: Key, x: Tensor) -> None:
        if self.schedule.rank_of[key.stage] == self.here:
            self._handoff[key] = x
        else:
            self.links.send(key, x)

    def _take(self, key: Key, source_stage: int) -> Tensor:
        if self.schedule.rank_of[source_stage] == self.here:
            return self._handoff.pop(key)
        return self.links.take(key, source_stage)
