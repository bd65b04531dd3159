"""PyTorch's own ways to train the model of `plain.py` on several ranks: what Raytron's meshes are measured against.

    ddp        DistributedDataParallel: replicas, gradients all-reduced in buckets while the backward runs
    fsdp2      fully_shard on each block: parameters, gradients and optimizer state sharded; gradients are kept whole until
               the last micro-batch (`fsdp2-each`: reduced after every one, which takes less memory)
    dtensor    parallelize_module: tensor parallel over DTensors; with dp, sharded on top by fully_shard
    1f1b       torch.distributed.pipelining with Schedule1F1B; with dp, gradients all-reduced after the schedule

Each class has `step(tokens, labels) -> float`: one update over this rank's share of the batch, gradients clipped to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from plain import PlainLlama
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from raytron.config import RunConfig


class Peer(Protocol):
    def step(self, tokens: Tensor, labels: Tensor) -> float:
        """Returns the mean loss of this rank's tokens (0 on a pipeline rank that does not compute it)."""


class _Replicated:
    """The loop that DDP, FSDP2 and DTensor share: micro-batches, and communication with the last of them only."""

    def __init__(self, config: RunConfig):
        torch.manual_seed(0)
        self.config = config
        self.model: Any = self.wrap(PlainLlama(config))
        self.optimizer = torch.optim.AdamW(_groups(self.model), lr=config.lr.peak, fused=True)

    def wrap(self, model: PlainLlama) -> nn.Module:
        raise NotImplementedError

    def synchronise(self, last: bool) -> None:
        raise NotImplementedError

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        size, total = self.config.micro_batch_size, 0.0
        parts = list(zip(tokens.split(size), labels.split(size), strict=True))
        for number, (part, answers) in enumerate(parts):
            self.synchronise(number == len(parts) - 1)
            loss = self.model(part, answers) / len(parts)
            loss.backward()
            total += loss.item()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def clip(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)


class Ddp(_Replicated):
    def wrap(self, model: PlainLlama) -> nn.Module:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def synchronise(self, last: bool) -> None:
        self.model.require_backward_grad_sync = last


class Fsdp2(_Replicated):
    def wrap(self, model: PlainLlama) -> nn.Module:
        return _shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))

    def synchronise(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)


class Fsdp2Each(Fsdp2):
    """Reduces after every micro-batch, so that no rank holds whole gradients between them."""

    def synchronise(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(True)


class Dtensor(_Replicated):
    """Tensor parallel over `mesh.tp` ranks; `mesh.dp` > 1 shards on top."""

    COLUMN, ROW = ("q", "kv", "up"), ("out", "down")

    def wrap(self, model: PlainLlama) -> nn.Module:
        sizes = self.config.mesh
        mesh = init_device_mesh("cpu", (sizes.dp, sizes.tp), mesh_dim_names=("dp", "tp"))
        for block in model.blocks:
            styles = {name: ColwiseParallel() for name in self.COLUMN} | {name: RowwiseParallel() for name in self.ROW}
            parallelize_module(block, mesh["tp"], styles)
        return _shard(model, mesh["dp"]) if sizes.dp > 1 else model

    def synchronise(self, last: bool) -> None:
        if self.config.mesh.dp > 1:
            self.model.set_requires_gradient_sync(last)

    def clip(self) -> None:
        """By hand: torch's own cannot sum norms of tensors that live on different meshes."""
        gradients = [p.grad for p in self.model.parameters()]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        copies = torch.tensor([_copies(gradient) for gradient in gradients])
        squares = (torch.stack(torch._foreach_norm(local)).square() / copies).sum()
        dist.all_reduce(squares)
        torch._foreach_mul_(local, min(1.0, 1.0 / (squares.sqrt().item() + 1e-6)))


class Pipelined:
    """Stages of equally many blocks, embedding on the first and head on the last."""

    def __init__(self, config: RunConfig):
        torch.manual_seed(0)
        sizes = config.mesh
        mesh = init_device_mesh("cpu", (sizes.pp, sizes.dp), mesh_dim_names=("pp", "dp"))
        self.replicas = mesh["dp"].get_group()
        self.here, self.last = mesh.get_local_rank("pp"), sizes.pp - 1
        self.module = _StageOf(PlainLlama(config), self.here, sizes.pp)
        stage = PipelineStage(self.module, self.here, sizes.pp, torch.device("cpu"), group=mesh["pp"].get_group())
        self.schedule = Schedule1F1B(stage, config.microbatches, loss_fn=_loss)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=config.lr.peak, fused=True)
        self.dp = sizes.dp

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        losses: list[Tensor] = []
        if self.here == 0:
            self.schedule.step(tokens)
        elif self.here == self.last:
            self.schedule.step(target=labels, losses=losses)
        else:
            self.schedule.step()
        self._reduce_and_clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().item() if losses else 0.0

    def _reduce_and_clip(self) -> None:
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self.dp > 1:
            flat = torch.cat([gradient.view(-1) for gradient in gradients]) / self.dp
            dist.all_reduce(flat, group=self.replicas)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum() / self.dp
        dist.all_reduce(squares)
        torch._foreach_mul_(gradients, min(1.0, 1.0 / (squares.sqrt().item() + 1e-6)))


class _StageOf(nn.Module):
    def __init__(self, whole: PlainLlama, index: int, stages: int):
        super().__init__()
        share = len(whole.blocks) // stages
        self.embed = whole.embed if index == 0 else None
        self.blocks = whole.blocks[index * share : (index + 1) * share]
        self.norm, self.head = (whole.norm, whole.head) if index == stages - 1 else (None, None)
        self.cos, self.sin = whole.cos, whole.sin

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters by the mesh that they live on: a fused optimizer takes one at a time."""
    found: dict[Any, list[nn.Parameter]] = {}
    for param in model.parameters():
        found.setdefault(param.device_mesh if isinstance(param, DTensor) else None, []).append(param)
    return [{"params": params} for params in found.values()]


def _copies(gradient: Any) -> int:
    """How many ranks hold the same part of a gradient."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size()
    sharded = math.prod(gradient.device_mesh.size(d) for d, how in enumerate(gradient.placements) if how.is_shard())
    return dist.get_world_size() // sharded


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _shard(model: PlainLlama, mesh: DeviceMesh) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PEERS: dict[str, Callable[[RunConfig], Peer]] = {
    "ddp": Ddp,
    "fsdp2": Fsdp2,
    "fsdp2-each": Fsdp2Each,
    "dtensor": Dtensor,
    "1f1b": Pipelined,
}
