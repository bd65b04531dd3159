"""A parameter that knows its name, how it is cut, and where its gradient goes.

A gradient never waits in `.grad`: it is added at once to `main_grad`, fp32, a view into a gradient bucket
(`raytron.parallel.buckets`), and the bucket is told. A linear layer adds the product of its output gradient and its input
straight into `main_grad`; all other gradients come through autograd and a hook. Without a bucket (`main_grad` is None,
in inference or a plain test) the gradient stays in `.grad`, as everywhere in torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from raytron.parallel.layout import Layout


class Param(nn.Parameter):
    """A local slice of a named global parameter."""

    full_name: str  # the same on every mesh
    cut: Layout
    decay: bool  # weight decay applies
    main_grad: Tensor | None  # fp32, the shape of the parameter
    fresh: bool  # main_grad holds nothing of this step yet
    contributed: Callable[[Param], None] | None

    def __new__(cls, data: Tensor, name: str, layout: Layout, decay: bool) -> Param:
        made: Param = torch.Tensor._make_subclass(cls, data, True)
        made.full_name, made.cut, made.decay = name, layout, decay
        made.main_grad, made.fresh, made.contributed = None, True, None
        return made

    def route_gradient(self, main_grad: Tensor, contributed: Callable[[Param], None]) -> None:
        """From now on gradients are summed in `main_grad`, and `contributed` is called after each."""
        self.main_grad, self.contributed = main_grad, contributed
        self.register_post_accumulate_grad_hook(_drain)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def add_gradient(self, gradient: Tensor, *, last: bool = True) -> None:
        """Adds one micro-batch's gradient (of the parameter's shape), or one of its terms if it is not the last."""
        if self.main_grad is None:
            self.grad = gradient if self.grad is None else self.grad + gradient
            return
        if self.fresh:
            self.main_grad.copy_(gradient)
        else:
            self.main_grad.add_(gradient)
        self._added(last)

    @torch.no_grad()
    def add_product(self, dy: Tensor, x: Tensor, *, last: bool = True) -> None:
        """Adds dyᵀ x, the gradient of a linear layer: dy (T, N), x (T, K), parameter viewed as (N, K)."""
        if self.main_grad is None or dy.dtype != torch.float32:
            self.add_gradient((dy.t() @ x).view(self.shape), last=last)
            return
        out = self.main_grad.view(dy.shape[1], x.shape[1])
        torch.addmm(out, dy.t(), x, beta=0 if self.fresh else 1, out=out)
        self._added(last)

    def _added(self, last: bool) -> None:
        self.fresh = False
        assert self.contributed is not None
        if last:
            self.contributed(self)


def _drain(param: Tensor) -> None:
    assert isinstance(param, Param)
    if param.grad is None:  # autograd passes by here for linear weights too, whose gradient came by `add_product`
        return
    gradient, param.grad = param.grad, None
    param.add_gradient(gradient)
