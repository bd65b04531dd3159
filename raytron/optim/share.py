"""What an optimizer works on: the owned share of each parameter, its fp32 master, and the factors that its name gives it.

`optimizer.groups` is a list; of its entries the first whose glob matches a parameter's full name holds for it:

    groups:
      - {match: "embed.*", lr: 0.5}                    half the learning rate
      - {match: "layers.[01].*", freeze: true}         no update, and no part in the gradient norm
      - {match: "*.norm.weight", weight_decay: 0.01}   decay where there would be none
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from raytron.config import OptimizerConfig
from raytron.parallel.buckets import Owned
from raytron.parallel.mesh import Mesh
from raytron.plan.names import group_of


@dataclass(eq=False)
class Share:
    """One owned share on its way through an optimizer; all tensors have the share's shape."""

    owned: Owned
    master: Tensor  # fp32
    lr: float  # factor on the learning rate
    decay: float  # weight decay, decoupled
    frozen: bool
    offsets: tuple[int, ...]  # of the share in the global parameter

    @property
    def name(self) -> str:
        return self.owned.param.full_name

    @property
    def gradient(self) -> Tensor:
        return self.owned.gradient


def share_of(owned: Owned, mesh: Mesh, config: OptimizerConfig) -> Share:
    """A share with the factors of its parameter's group."""
    group = group_of(owned.param.full_name, config.groups)
    decay = config.weight_decay if owned.param.decay or config.decay_all else 0.0
    if group.weight_decay is not None:
        decay = group.weight_decay
    master = owned.master()
    return Share(owned, master, group.lr, decay, group.freeze, owned.slice(master, mesh).offsets)
