"""Where the values of parameters are between uses, and how they come to every rank that computes with them.

After an update each rank has new values of its own shares only. All others get them by an all-gather, which need not be
done at once: a block's weights are asked for when the block is entered, and those of the next blocks are started then, so
that they arrive while this one computes.

    update       publish: own shares are written, all parameters are stale
    block 0      enter: its gather was started with the update; start block 1's; wait, unpack, compute
    block 1      enter: start block 2's; wait for block 1's, …

ZeRO 3 (Rajbhandari et al., arXiv 1910.02054) frees the parameters again when the block is left, after forward and once
more after backward, for which they are gathered anew, last block first. What lasts is the share. A parameter keeps its
identity and its storage object, which is emptied and filled again: what autograd saved for backward is then valid again.

Blocks of one row are entered in order by all ranks that share them, so that their collectives meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytron.parallel.collectives import Wait, start_all_gather
from raytron.parallel.mesh import Group
from raytron.parallel.parameter import Param
from raytron.parallel.shares import Shares


class Weights:
    """The values of some parameters of one type that are shared out over a group."""

    def __init__(self, shares: Shares, group: Group, lasting: bool):
        """lasting: the parameters stay whole between uses; otherwise (ZeRO 3) they are freed, now and after each use."""
        self.shares, self.group, self.lasting = shares, group, lasting
        self.watched = False  # somebody enters and leaves; else new values are gathered when they are published
        self.users = 0
        self.stale = False
        self._mine: Tensor | None = None  # (size,) this rank's packed share
        self._pending: Wait | None = None
        if not lasting:
            self._mine = self._packed_share()
            self._free()

    @property
    def params(self) -> list[Param]:
        return self.shares.params

    def value(self, number: int) -> Tensor | None:
        """This rank's share of parameter `number`, where it is what lasts."""
        return None if self.lasting or self._mine is None else self.shares.piece(self._mine, number)

    @torch.no_grad()
    def publish(self, masters: Sequence[Tensor]) -> None:
        """New values of this rank's shares, one tensor for each parameter, of any floating-point type."""
        if self._pending is not None:  # of values that are no more
            self._pending()
            self._pending = None
        if self._mine is None:
            self._mine = torch.zeros(self.shares.size, dtype=self.params[0].dtype, device=self.params[0].device)
        for number, master in enumerate(masters):
            mine = self.shares.piece(self._mine, number)
            if mine.data_ptr() != master.data_ptr():
                mine.copy_(master, non_blocking=True)
        self.stale = True
        if not self.watched:
            self._arrive()

    @property
    def under_way(self) -> bool:
        return self._pending is not None

    def start(self) -> None:
        """Starts to gather, if there is need."""
        if self.stale and self._pending is None:
            assert self._mine is not None
            self._pending = start_all_gather(self._mine, self.group)

    def enter(self) -> None:
        """The parameters are whole and new from here on, until left as often as entered."""
        self.users += 1
        if self.stale:
            self._arrive()

    def leave(self, free: bool = True) -> None:
        """free: without users the parameters may go."""
        self.users -= 1
        if free and self.users == 0 and not self.lasting:
            self._free()

    @torch.no_grad()
    def _arrive(self) -> None:
        self.start()
        assert self._pending is not None
        everyone = self._pending().view(self.shares.owners, -1)
        self._pending = None
        for param in self.params:
            param.untyped_storage().resize_(param.numel() * param.element_size())
        self.shares.unpack(everyone, [param.data for param in self.params])  # data: autograd must not see a change
        self.stale = False
        if self.lasting:
            self._mine = None

    def _packed_share(self) -> Tensor:
        first = self.params[0]
        mine = torch.zeros(self.shares.size, dtype=first.dtype, device=first.device)
        for number, param in enumerate(self.params):
            if param.kept is None:
                self.shares.piece(mine, number).copy_(self.shares.part(param.detach(), number))
            else:
                self.shares.piece(mine, number).copy_(param.kept)
                param.kept = None
        return mine

    def _free(self) -> None:
        for param in self.params:
            param.untyped_storage().resize_(0)
        self.stale = True


class Unit:
    """Weights that are used together: a block's, the embedding's, the head's."""

    def __init__(self, row: list[Unit], weights: list[Weights], backward: bool):
        self.row, self.at, self.weights, self.backward = row, len(row), weights, backward

    def start(self) -> None:
        for weights in self.weights:
            weights.start()

    def leave(self, free: bool = True) -> None:
        for weights in self.weights:
            weights.leave(free)


class Gathering:
    """Gathers weights around their use, the next `prefetch` units of a row ahead."""

    def __init__(self, weights: Sequence[Weights], prefetch: int):
        self.prefetch = prefetch
        self.rows: list[list[Unit]] = []
        self._weights_of = {param: one for one in weights for param in one.params}
        for one in weights:
            one.watched = True

    @property
    def needed(self) -> bool:
        """Whether any weights are shared out."""
        return bool(self._weights_of)

    def new_row(self) -> list[Unit]:
        """A row of units that are always used one after another, such as those of a stage."""
        self.rows.append([])
        return self.rows[-1]

    def unit(self, row: list[Unit], params: Sequence[Param], *, backward: bool = True) -> Unit:
        """The next unit of a row. backward: its weights are needed there, too."""
        weights = list(dict.fromkeys(self._weights_of[param] for param in params if param in self._weights_of))
        row.append(Unit(row, weights, backward))
        return row[-1]

    def ahead(self) -> None:
        """After an update: starts what the first forward will need."""
        for unit in self.rows[0][: 1 + self.prefetch] if self.rows else []:
            unit.start()

    def watch(self, module: nn.Module, unit: Unit) -> None:
        """From now on the module's weights are there while it runs. Its first argument must need a gradient."""
        module.register_forward_pre_hook(lambda _, args: self._enter(unit))
        module.register_forward_hook(lambda _, args, out: self._leave(unit, args[0], out), always_call=True)

    def run(self, unit: Unit, function: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        """function(x, *more) with the unit's weights."""
        self._enter(unit)
        out = function(x, *more)
        self._leave(unit, x, out)
        return out

    def _enter(self, unit: Unit) -> None:
        unit.start()
        for other in self._next(unit):
            other.start()
        for weights in unit.weights:
            weights.enter()

    def _next(self, unit: Unit) -> list[Unit]:
        """Those that will be entered after this one, nearest first."""
        if not _in_backward():
            return unit.row[unit.at + 1 : unit.at + 1 + self.prefetch]
        before = [other for other in reversed(unit.row[: unit.at]) if other.backward]
        return before[: self.prefetch]

    def _leave(self, unit: Unit, x: Tensor, out: Any) -> None:
        """After a forward: free, and be there again for the backward. In a forward that backward runs again, that backward
        follows at once, and nothing is freed before it."""
        unit.leave(free=not _in_backward())
        if not unit.backward or not isinstance(out, Tensor) or not out.requires_grad:
            return
        out.register_hook(lambda _: self._enter(unit))  # type: ignore[no-untyped-call]
        x.register_hook(lambda _: unit.leave())  # type: ignore[no-untyped-call]


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)
