"""How evenly the experts of all layers were loaded in a step, and the biases that follow from it.

Each router counts as it runs (`Router.sums`); when a step ends the counts of the ranks that hold the same layers are summed,
so that what follows is the same on every mesh. A bias moves by its rate towards an even load: up where an expert had less
than the mean, down where it had more (Wang et al., arXiv 2408.15664). Biases are no parameters, but they decide which
experts are chosen, so they belong to a checkpoint like the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raytron.config import ExpertsConfig
from raytron.model.router import MEASURES, Router
from raytron.parallel.collectives import all_reduce
from raytron.parallel.expert import ExpertParallel
from raytron.parallel.layout import Slice

EXPERTS = "experts/"  # what the names of all measures begin with


class Balance:
    """What the routers of one rank have seen in a step, and the biases that follow from it.

    `measure` has to be called by all ranks of a pp plane, once for a step, before `update`.
    """

    def __init__(self, routers: Sequence[Router], layers: int, config: ExpertsConfig, parallel: ExpertParallel | None):
        """layers: that have experts, in the whole model."""
        self.routers, self.layers, self.config, self.parallel = list(routers), layers, config, parallel

    def begin(self) -> None:
        """Before a step: nothing has been seen."""
        for router in self.routers:
            router.sums.zero_()

    def measure(self) -> dict[str, float]:
        """This rank's part of the metrics of a step: summed over all ranks they are means over layers.

        load_max_over_mean: the choices that fall on the fullest expert over the mean; dropped: the share of choices that
        found no room; aux_loss and z_loss: before their weights, means over sequences and tokens.
        """
        if self.parallel is None:
            return {}
        names = ["load_max_over_mean", *MEASURES]
        if not self.routers:
            return {EXPERTS + name: 0.0 for name in names}
        count, k = self.config.count, self.config.top_k
        sums = all_reduce(torch.stack([router.sums for router in self.routers]), self.parallel.plane)
        for router, row in zip(self.routers, sums, strict=True):
            router.sums.copy_(row)
        tokens = (sums[:, :count].sum(1) / k).clamp(min=1)
        over_mean = sums[:, :count].amax(1) / (tokens * k / count)
        parts = torch.stack([over_mean, sums[:, count] / (tokens * k), *(sums[:, count + 1 :] / tokens[:, None]).t()])
        means = (parts.sum(1) / (self.layers * self.parallel.plane.size)).tolist()
        return {EXPERTS + name: value for name, value in zip(names, means, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """After a step that counts: each bias moves towards an even load."""
        for router in self.routers:
            if router.bias is not None:
                load = router.sums[: self.config.count]
                router.bias += self.config.bias_rate * torch.sign(load.mean() - load).float()

    def state(self) -> dict[str, Slice]:
        """The biases by name, whole on every rank: a part of a checkpoint."""
        return {
            f"{router.name}.bias": Slice(tuple(router.bias.shape), (0,), router.bias)
            for router in self.routers
            if router.bias is not None
        }
