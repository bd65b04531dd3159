"""The interface of an optimizer on owned shares, and what those that work element by element have in common.

An optimizer sees shares: parts of parameters, their gradients and fp32 masters. Its state is one tensor of the share's
shape for each of its prefixes, so that a checkpoint holds it as slices of global tensors ("lion.m.layers.0.mlp.up.weight")
and any mesh can go on with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from raytron.config import OptimizerConfig, PrecisionConfig
from raytron.optim.precision import Moments, Rounding
from raytron.optim.share import Share


class State(NamedTuple):
    """One state tensor of one share; `prefix` + the parameter's name is its name in a checkpoint."""

    prefix: str
    share: Share
    tensor: Tensor


class Optimizer(Protocol):
    """Updates some shares in place."""

    def step(self, lr: float, update: int) -> None:
        """One update of every share's master by its gradient. lr: the rate, before the shares' own factors; update: its
        number, the first being 1."""

    def state(self) -> Iterator[State]:
        """The live state; reading into it changes the optimizer (`loaded` says so afterwards)."""

    def loaded(self, updates: int) -> None:
        """The state was read: it has seen `updates` updates."""


class Elementwise:
    """An optimizer that treats each element on its own: a subclass gives `prefixes` and `update`."""

    prefixes: ClassVar[tuple[str, ...]]

    def __init__(
        self, shares: Sequence[Share], config: OptimizerConfig, precision: PrecisionConfig, rounding: Rounding
    ):
        self.shares, self.config = shares, config
        self.moments = [Moments(prefix, shares, precision, rounding) for prefix in self.prefixes]

    def step(self, lr: float, update: int) -> None:
        for index, share in enumerate(self.shares):
            values = [moments.read(index) for moments in self.moments]
            share.master.mul_(1 - lr * share.lr * share.decay)
            self.update(share.master, share.gradient, values, lr * share.lr, update)
            for moments, value in zip(self.moments, values, strict=True):
                moments.write(index, value, update)

    def update(self, master: Tensor, gradient: Tensor, moments: list[Tensor], lr: float, update: int) -> None:
        """Changes one master and its moments in place; all tensors fp32, of one shape."""
        raise NotImplementedError

    def state(self) -> Iterator[State]:
        for moments in self.moments:
            for share, tensor in zip(self.shares, moments.tensors, strict=True):
                yield State(moments.prefix, share, tensor)

    def loaded(self, updates: int) -> None:
        pass
