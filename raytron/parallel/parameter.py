"""A parameter that knows its name, how it is cut, and where its gradient goes.

A gradient never waits in `.grad`: it is added at once to `main_grad`, fp32, a view into a gradient bucket
(`raytron.parallel.buckets`), and the bucket is told. A linear layer adds the product of its output gradient and its input
straight into `main_grad`, a look-up the rows that it read; all other gradients come through autograd and a hook. Without a
bucket (in inference or a plain test) the gradient stays in `.grad`, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from raytron.kernels.grouped import add_grouped_product, grouped_product
from raytron.parallel.layout import Layout


class Sink(Protocol):
    """Where gradients go."""

    def prepare(self, param: Param) -> None:
        """Gives a parameter its `main_grad`, which it needs now."""

    def contributed(self, param: Param) -> None:
        """`main_grad` holds one contribution more."""


class Param(nn.Parameter):
    """A local slice of a named global parameter."""

    full_name: str  # the same on every mesh
    cut: Layout
    decay: bool  # weight decay applies
    sink: Sink | None
    main_grad: Tensor | None  # fp32, the shape of the parameter; None: the sink makes it when it is needed
    fresh: bool  # main_grad holds nothing yet
    kept: Tensor | None  # this rank's share, while the parameter itself is freed and nothing else holds it (ZeRO 3)

    def __new__(cls, data: Tensor, name: str, layout: Layout, decay: bool) -> Param:
        made: Param = torch.Tensor._make_subclass(cls, data, True)
        made.full_name, made.cut, made.decay = name, layout, decay
        made.sink, made.main_grad, made.fresh, made.kept = None, None, True, None
        return made

    def route_gradient(self, sink: Sink) -> None:
        """From now on gradients are summed in `main_grad`, and the sink hears of each."""
        self.sink = sink
        self.register_post_accumulate_grad_hook(_drain)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor, *, last: bool = True) -> None:
        """Adds one micro-batch's gradient (of the parameter's shape), or one of its terms if it is not the last."""
        if self.sink is None:
            self.grad = gradient if self.grad is None else self.grad + gradient
            return
        target = self._target(self.sink)
        if self.fresh:
            target.copy_(gradient)
        else:
            target.add_(gradient)
        self._added(self.sink, last)

    def add_product(self, dy: Tensor, x: Tensor, *, last: bool = True) -> None:
        """Adds dyᵀ x, the gradient of a linear layer: dy (T, N), x (T, K), parameter viewed as (N, K)."""
        if self.sink is None or dy.dtype != torch.float32:
            self.add_gradient((dy.t() @ x).view(self.shape), last=last)
            return
        out = self._target(self.sink).view(dy.shape[1], x.shape[1])
        torch.addmm(out, dy.t(), x, beta=0 if self.fresh else 1, out=out)
        self._added(self.sink, last)

    @torch.no_grad()
    def add_products(self, dy: Tensor, x: Tensor, counts: Sequence[int]) -> None:
        """Adds dyᵀ x of each expert's rows: dy (T, N) and x (T, K), sorted by expert, of which each has `counts` rows,
        perhaps none; parameter viewed as (experts, N, K)."""
        if self.sink is None:
            self.add_gradient(grouped_product(dy, x, counts).view(self.shape))
            return
        out = self._target(self.sink).view(len(counts), dy.shape[1], x.shape[1])
        add_grouped_product(out, dy, x, counts, fresh=self.fresh)
        self._added(self.sink, last=True)

    @torch.no_grad()
    def add_rows(self, dy: Tensor, rows: Tensor) -> None:
        """Adds the gradient of a look-up: dy (T, D) to the rows (T,) int64, each as often as it occurs; parameter (V, D)."""
        if self.sink is None or dy.device.type != "cpu":  # elsewhere adding rows in place has no fixed order
            dense = torch.ops.aten.embedding_dense_backward(dy, rows, self.shape[0], -1, False)
            self.add_gradient(dense)
            return
        target = self._target(self.sink)
        if self.fresh:
            target.zero_()
        target.index_add_(0, rows, dy.to(target.dtype))
        self._added(self.sink, last=True)

    def _target(self, sink: Sink) -> Tensor:
        if self.main_grad is None:
            sink.prepare(self)
        assert self.main_grad is not None
        return self.main_grad

    def _added(self, sink: Sink, last: bool) -> None:
        self.fresh = False
        if last:
            sink.contributed(self)


def _drain(param: Tensor) -> None:
    assert isinstance(param, Param)
    if param.grad is None:  # autograd passes by here for linear weights and tables too, whose gradient came straight
        return
    gradient, param.grad = param.grad, None
    param.add_gradient(gradient)
