"""AdamW over the shares that a rank owns, with fp32 masters and a global gradient norm.

The arithmetic is torch's own fused AdamW, run on the owned shares (`raytron.parallel.buckets.Owned`). A share's master is
the parameter itself where it is fp32 and owned whole, else an fp32 copy of the share. After the update the masters are
published: cast to the parameters' type and gathered over dp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raytron.config import OptimizerConfig
from raytron.parallel.buckets import GradientBuckets, Owned
from raytron.parallel.layout import Slice
from raytron.parallel.mesh import Mesh

MOMENTS = {"exp_avg": "adam.m.", "exp_avg_sq": "adam.v."}  # torch's name: prefix in a checkpoint
WEIGHTS = "model."


class ShardedAdamW:
    """The optimizer of one rank. Weight decay is decoupled and skips norms, biases and embeddings unless `decay_all`."""

    def __init__(self, buckets: GradientBuckets, mesh: Mesh, config: OptimizerConfig):
        self.buckets, self.mesh, self.config = buckets, mesh, config
        self.masters = [_master(owned) for owned in buckets.owned]
        decayed: list[Tensor] = []
        plain: list[Tensor] = []
        for owned, master in zip(buckets.owned, self.masters, strict=True):
            (decayed if owned.param.decay or config.decay_all else plain).append(master)
        groups = [
            {"params": group, "weight_decay": decay}
            for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
            if group
        ]
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    def squared_norm(self) -> Tensor:
        """This rank's part of the squared global gradient norm, float64 scalar: summed over the world it counts every
        parameter once."""
        shares = [owned.gradient for owned in self.buckets.owned if owned.counted and owned.gradient.numel()]
        if not shares:
            return torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        return torch.stack(torch._foreach_norm(shares)).double().square().sum()

    @torch.no_grad()
    def step(self, lr: float, scale: float) -> None:
        """One update with gradients multiplied by `scale`; afterwards all ranks hold the new parameters."""
        gradients = [owned.gradient for owned in self.buckets.owned]
        if scale != 1.0:
            torch._foreach_mul_(gradients, scale)
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for master in self.masters:
            master.grad = None
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Writes the masters into the parameters of every rank."""
        first = 0
        for bucket in self.buckets.buckets:
            bucket.publish(self.masters[first : first + len(bucket.params)])
            first += len(bucket.params)

    def state(self) -> dict[str, Slice]:
        """Masters and moments as slices of global tensors. Reading into them changes the optimizer; call `publish` (and
        `loaded` with the number of updates) afterwards."""
        out: dict[str, Slice] = {}
        for owned, master in zip(self.buckets.owned, self.masters, strict=True):
            out[WEIGHTS + owned.param.full_name] = owned.slice(master.detach(), self.mesh)
            state = self._moments(master)
            for moment, prefix in MOMENTS.items():
                out[prefix + owned.param.full_name] = owned.slice(state[moment], self.mesh)
        return out

    def loaded(self, updates: int) -> None:
        """After reading into `state`: `updates` is how many the moments have seen (for their bias correction)."""
        for master in self.masters:
            self._moments(master)["step"].fill_(float(updates))
        self.publish()

    @property
    def updates(self) -> int:
        """How many updates the moments have seen."""
        return int(self._moments(self.masters[0])["step"].item())

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        """torch's state of one master, made here where no update has been done yet."""
        state: dict[str, Tensor] = self.adamw.state[master]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["exp_avg"] = torch.zeros_like(master, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(master, memory_format=torch.preserve_format)
        return state


def _master(owned: Owned) -> Tensor:
    share = owned.view(owned.param.detach())
    if owned.param.dtype == torch.float32 and owned.length == owned.param.shape[owned.dim]:
        return share
    return share.to(torch.float32, copy=True).contiguous()


def clip_scale(norm: float, limit: float | None) -> float:
    """The factor that brings a gradient of some norm to at most `limit` (Pascanu et al., arXiv 1211.5063)."""
    if limit is None or norm <= limit:
        return 1.0
    return limit / (norm + 1e-6)
