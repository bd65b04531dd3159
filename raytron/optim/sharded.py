"""The optimizer of one rank: its shares, their fp32 masters, who updates which, and the way back to all ranks' parameters.

    gradient share ─► Optimizer (adamw | muon + adamw | lion | sgd) ─► fp32 master ─► cast ─► gathered over dp ─► parameters

A share's master is the parameter itself where it is fp32 and owned whole, else an fp32 copy of the share, under `offload`
on the host. All optimizers decouple weight decay from the gradient; it skips norms, biases and embeddings unless
`decay_all` or a group says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raytron.config import RunConfig
from raytron.optim.adamw import AdamW, FusedAdamW
from raytron.optim.lion import Lion
from raytron.optim.muon import Muon, is_matrix
from raytron.optim.optimizer import Elementwise, Optimizer
from raytron.optim.precision import Rounding
from raytron.optim.sgd import SGD
from raytron.optim.share import Share, share_of
from raytron.parallel.buckets import GradientBuckets
from raytron.parallel.layout import Slice
from raytron.parallel.mesh import Mesh

WEIGHTS = "model."
ELEMENTWISE: dict[str, type[Elementwise]] = {"lion": Lion, "sgd": SGD}


class ShardedOptimizer:
    """Everything that one rank updates. All ranks of a mesh make it, and step, together."""

    def __init__(self, buckets: GradientBuckets, mesh: Mesh, config: RunConfig):
        self.buckets, self.mesh, self.config = buckets, mesh, config
        self.rounding = Rounding(config.precision, config.seed)
        self.shares = [share_of(owned, mesh, config.optimizer) for owned in buckets.owned]
        self.trained = [share for share in self.shares if not share.frozen]
        self.optimizers = self._optimizers()
        self.updates = 0  # that were done, skipped steps not counted

    def _optimizers(self) -> list[Optimizer]:
        config = self.config
        if config.optimizer.name == "muon":
            matrices = [share for share in self.trained if is_matrix(share)]
            return [*self._muon(matrices), *self._adamw([share for share in self.trained if not is_matrix(share)])]
        if config.optimizer.name == "adamw":
            return self._adamw(self.trained)
        kind = ELEMENTWISE[config.optimizer.name]
        return [kind(self.trained, config.optimizer, config.precision, self.rounding)]

    def _adamw(self, shares: Sequence[Share]) -> list[Optimizer]:
        config = self.config
        if not shares:
            return []
        if config.precision.moments == "fp32" and config.determinism != "canonical":
            return [FusedAdamW(shares, config.optimizer)]
        return [AdamW(shares, config.optimizer, config.precision, self.rounding)]

    def _muon(self, shares: Sequence[Share]) -> list[Optimizer]:
        """One over the matrices of dense layers and one over those of experts, which other ranks share."""
        config = self.config
        kinds = {False: self.mesh.axis("shard", "cp", "tp")}
        if config.model.experts.count:
            kinds[True] = self.mesh.axis("eshard", "etp")
        canonical = config.determinism == "canonical"
        return [
            Muon(found, config.optimizer, config.precision, self.rounding, self.mesh, group, alone=canonical)
            for expert, group in kinds.items()
            if (found := [share for share in shares if share.owned.param.cut.expert == expert])
        ]

    def squared_norms(self) -> tuple[list[str], Tensor]:
        """Names of parameters, and this rank's parts (n,) of their gradients' squared norms, float64: summed over the world
        they count every parameter once. Frozen ones have no part."""
        counted = [share for share in self.trained if share.owned.counted and share.gradient.numel()]
        if not counted:
            return [], torch.zeros(0, dtype=torch.float64)
        norms = torch.stack(torch._foreach_norm([share.gradient for share in counted]))
        return [share.name for share in counted], norms.double().square()

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """One update with gradients multiplied by `scale`; afterwards all ranks hold the new parameters."""
        if scale != 1.0 and self.trained:
            torch._foreach_mul_([share.gradient for share in self.trained], scale)
        self.updates += 1
        for optimizer in self.optimizers:
            optimizer.step(lr, self.updates)
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the parameters of every rank."""
        self.buckets.publish([self._published(share) for share in self.shares])

    def _published(self, share: Share) -> Tensor:
        """The master in the parameter's type; fp32 where to cast it is to take the nearest value."""
        if not self.rounding.stochastic:
            return share.master
        return self.rounding.cast(share.master, share.owned.param.dtype, share, WEIGHTS, self.updates)

    def state(self) -> dict[str, Slice]:
        """Masters and moments as slices of global tensors. Reading into them changes the optimizer; call `loaded` with the
        number of updates afterwards."""
        out = {WEIGHTS + share.name: share.owned.slice(share.master.detach(), self.mesh) for share in self.shares}
        for optimizer in self.optimizers:
            for prefix, share, tensor in optimizer.state():
                out[prefix + share.name] = share.owned.slice(tensor, self.mesh)
        return out

    def loaded(self, updates: int) -> None:
        """After reading into `state`: `updates` is how many the state has seen."""
        self.updates = updates
        for optimizer in self.optimizers:
            optimizer.loaded(updates)
        self.publish()


def clip_scale(norm: float, limit: float | None) -> float:
    """The factor that brings a gradient of some norm to at most `limit` (Pascanu et al., arXiv 1211.5063)."""
    if limit is None or norm <= limit:
        return 1.0
    return limit / (norm + 1e-6)
