"""Makes parameters: each gets its local shape, its values by global coordinates, and its weight-decay class.

A value depends on (seed, parameter name, global element number) only, so one seed gives one model on every mesh. Weights
are normal with `init_std`; projections back into the residual stream are scaled by 1 / √(2 · layers) (GPT-2, Radford et
al., 2019); norms are one, biases zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from raytron.parallel.context import ContextParallel
from raytron.parallel.expert import ExpertParallel
from raytron.parallel.layout import Cut, Layout, Place
from raytron.parallel.parameter import Param
from raytron.parallel.random import fill_normal, key_of
from raytron.parallel.tensor import TensorParallel


class Builder:
    """Makes the parameters of one rank, which stands at `place` of the mesh."""

    def __init__(
        self,
        parallel: TensorParallel,
        context_parallel: ContextParallel,
        place: Place,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
        experts: ExpertParallel | None = None,
        made: Callable[[Param], None] = lambda param: None,
    ):
        """experts: None for a model without them. made: is told of each parameter as soon as it has its values."""
        self.parallel, self.context_parallel, self.experts, self.place = parallel, context_parallel, experts, place
        self.seed, self.dtype, self.device, self.made = seed, dtype, device, made
        self.params: list[Param] = []

    def normal(
        self,
        name: str,
        shape: tuple[int, ...],
        std: float,
        *,
        dim: int | None,
        repeat: int = 1,
        decay: bool = True,
        partial: bool = False,
    ) -> Param:
        """A weight of some global shape, cut along `dim` over tp; None: whole on every tp rank, where `partial` says whether
        its gradient is a partial sum over tp."""
        layout = Layout(shape, _over_tp(dim, repeat), partial=partial if dim is None else repeat > 1)
        return self._make(name, layout, decay, std)

    def expert(self, name: str, shape: tuple[int, ...], std: float, *, dim: int) -> Param:
        """A weight of all experts of a layer, (experts, ...): the experts are shared out over ep, `dim` is cut over etp."""
        return self._make(name, Layout(shape, (Cut("ep", 0), Cut("etp", dim)), expert=True), True, std)

    def table(self, name: str, shape: tuple[int, int], std: float, *, partial: bool) -> Param:
        """A learned table that every tp rank holds whole; no weight decay."""
        return self._make(name, Layout(shape, partial=partial), False, std)

    def constant(
        self,
        name: str,
        shape: tuple[int, ...],
        value: float,
        *,
        partial: bool = False,
        dim: int | None = None,
        repeat: int = 1,
    ) -> Param:
        """A norm weight or a bias; no weight decay. `partial`: the gradient is a partial sum over tp."""
        layout = Layout(shape, _over_tp(dim, repeat), partial=partial if dim is None else repeat > 1)
        return self._make(name, layout, False, 0.0, value)

    def _make(self, name: str, layout: Layout, decay: bool, std: float, value: float = 0.0) -> Param:
        values = torch.full(layout.local_shape(self.place), value, device=self.device)
        if std > 0:
            key = key_of(self.seed, "init", name)
            fill_normal(values, layout, self.place, key, std)
        param = Param(values.to(self.dtype), name, layout, decay)
        self.params.append(param)
        self.made(param)
        return param


def _over_tp(dim: int | None, repeat: int) -> tuple[Cut, ...]:
    return () if dim is None else (Cut("tp", dim, repeat),)
