"""The gradient noise scale: at which batch size more sequences hardly help (McCandlish et al., arXiv 1812.06162).

The gradient of B sequences is the true one, G, and noise of variance S / B: |G_B|² is |G|² + S / B in the mean. A step sees
it for two batch sizes: b, the share of one data-parallel rank, before gradients are summed, and B, the whole batch, after:

    S = (|G_b|² − |G_B|²) / (1/b − 1/B)           |G|² = |G_B|² − S / B           noise scale = S / |G|²

Where shares differ in size, |G_b|² and 1/b are means over the ranks.

One step's estimate is rough: average S and |G|² over many steps, then divide. Not counted are parameters of which no rank
sees its batch's gradient before it is summed over tp, over tied copies or over experts' ranks too.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.parallel.buckets import Bucket, GradientBuckets
from raytron.parallel.mesh import Mesh
from raytron.parallel.parameter import Param


class Noise(NamedTuple):
    """Of one step; the unit of `trace` and `scale` is a sequence."""

    trace: float  # S
    signal: float  # |G|², unbiased, so it may be below zero
    scale: float  # S / |G|²


def noise(small: float, big: float, sequences: Sequence[int]) -> Noise:
    """small: mean squared norm of the gradients of the shares of a batch; big: that of the batch; sequences: of each."""
    whole, inverse = sum(sequences), sum(1 / share for share in sequences) / len(sequences)
    trace = (small - big) / (inverse - 1 / whole)
    signal = big - trace / whole
    return Noise(trace, signal, trace / signal if signal else math.nan)


class NoiseMeter:
    """Measures the gradients of one rank while they are reduced. `begin`, a backward, then `local` and `summed`."""

    def __init__(self, buckets: GradientBuckets, mesh: Mesh, trained: Collection[str]):
        """trained: the names of the parameters that the gradient norm counts."""
        self.mesh, self.tied = mesh, buckets.tied
        params = [owned.param for owned in buckets.owned if owned.param.full_name in trained]
        params = [param for param in params if self._is_whole(param)]
        self.names = {param.full_name for param in params}
        self._spoken = {param.full_name for param in params if self._speaks(param)}
        self._seen: list[Tensor] = []
        self._factor = 1.0
        for bucket in buckets.buckets:
            bucket.observers.append(self._look)

    def begin(self, share: float) -> None:
        """Before the first backward of a step, of which this rank's share of the batch is `share`."""
        self._seen.clear()
        self._factor = 1 / (share * share * self.mesh.shape.dp)  # gradients were divided by the whole batch's tokens

    def local(self) -> float:
        """This rank's part of the mean over ranks of the squared norm of their own gradients, without what another rank
        counts."""
        return torch.stack(self._seen).sum().item() * self._factor if self._seen else 0.0

    def summed(self, squared_norms: Mapping[str, float]) -> float:
        """The same of the whole batch's gradient: this rank's part."""
        return sum(value for name, value in squared_norms.items() if name in self.names)

    def _look(self, bucket: Bucket) -> None:
        spoken = (param.main_grad for param in bucket.params if param.full_name in self._spoken)
        sums = [each for each in spoken if each is not None]
        if sums:
            self._seen.append(torch.stack(torch._foreach_norm(sums)).double().square().sum())

    def _is_whole(self, param: Param) -> bool:
        tied = self.tied is not None and self.tied[0] is param
        return not (param.cut.partial or param.cut.expert or tied)

    def _speaks(self, param: Param) -> bool:
        """Of tensor-parallel ranks that hold the same slice one counts it."""
        return self.mesh.tp.index % param.cut.holders(self.mesh.place) == 0
