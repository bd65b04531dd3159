"""One optimizer step of one rank: run the schedule, reduce, clip, update. No data set, no files, no Ray.

The loss of a step is Σ weight · cross-entropy / Σ weight over all tokens of the global batch, wherever they are computed.
While the backward runs the denominator is not known yet (ranks see their own tokens only), so losses are divided by the
nominal number of tokens, and the gradient is mended by nominal / real, a factor that joins the clipping factor. One
all-reduce at the end of the step carries all scalars: loss, tokens, squared gradient norm, and the requests of the driver.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from raytron.data.batch import Batch
from raytron.model.assemble import Assembly, assemble
from raytron.model.stage import Stage
from raytron.optim.sharded import ShardedAdamW, clip_scale
from raytron.parallel.buckets import GradientBuckets
from raytron.parallel.collectives import all_reduce
from raytron.parallel.mesh import Mesh
from raytron.parallel.pipeline import Pipeline, Watch
from raytron.plan.plan import Plan

REQUEST_BITS = 8


class StepResult(NamedTuple):
    """Equal on all ranks."""

    loss: float  # mean over the step's real tokens, nats
    grad_norm: float  # global, before clipping
    tokens: int  # that counted in the loss
    skipped: bool  # the gradient was not finite, nothing was updated
    request: int  # the union of what the ranks were asked for


class MicroBatch(NamedTuple):
    """Tensors on the device: tokens, labels (B,S) int64; weights (B,S) float32; samples (B,) int64."""

    samples: Tensor
    tokens: Tensor
    labels: Tensor
    weights: Tensor


class _Bound:
    """A stage together with the micro-batches of the moment."""

    def __init__(self, stage: Stage):
        self.stage = stage
        self.batches: list[MicroBatch] = []
        self.training = True

    def forward(self, x: Tensor | None, microbatch: int) -> Tensor:
        batch = self.batches[microbatch]
        context = self.stage.context(batch.samples, batch.tokens.shape[1], self.training)
        if x is None:
            x = self.stage.embed(batch.tokens, context)
        y: Tensor = self.stage(x, context)
        return self.stage.loss(y, batch.labels, batch.weights) if self.stage.last else y


class Engine:
    """The model, gradients and optimizer of one rank, and the step over them."""

    def __init__(self, plan: Plan, mesh: Mesh, watch: Watch | None = None):
        self.plan, self.mesh = plan, mesh
        self.model: Assembly = assemble(plan, mesh)
        self.buckets = GradientBuckets(
            self.model.params,
            mesh,
            zero=plan.config.data_parallel.zero,
            bucket_mb=plan.config.data_parallel.bucket_mb,
            tied=self.model.tied,
            uses=self.model.uses,
        )
        self.optimizer = ShardedAdamW(self.buckets, mesh, plan.config.optimizer)
        self._bound = {number: _Bound(stage) for number, stage in self.model.stages.items()}
        self.pipeline = Pipeline(self._bound, plan.schedule, mesh, self.model.parallel.deferred, watch)
        self._speaks = mesh.tp.index == 0  # one voice for each loss: tp ranks compute equal ones

    def forward_backward(self, batch: Batch) -> tuple[float, int]:
        """Runs the schedule over this dp rank's share of the step; owned gradients are then those of
        Σ weight · loss / nominal tokens over all ranks. Returns this rank's sums of loss and of tokens, zero where it is
        not the one that computes them."""
        batches = self._bind(batch, training=True)
        self.buckets.begin(len(batches))
        losses = self.pipeline.run(self._shape(batch), self.model.dtype, 1 / self._nominal)
        self.buckets.finish()
        return self._sums(losses, batch)

    def step(self, batch: Batch, lr: float, request: int = 0) -> StepResult:
        """forward_backward and an update with rate `lr`; a non-finite gradient skips the update."""
        loss, tokens = self.forward_backward(batch)
        bits = [float(request >> bit & 1) for bit in range(REQUEST_BITS)]
        norm = self.optimizer.squared_norm().item()
        loss, real, squared, *asked = self._over_world([loss, tokens, norm, *bits])
        mend = self._nominal / max(real, 1.0)
        grad_norm = math.sqrt(squared) * mend
        skipped = not math.isfinite(grad_norm)
        if not skipped:
            self.optimizer.step(lr, mend * clip_scale(grad_norm, self.plan.config.optimizer.clip_norm))
        union = sum(1 << bit for bit, count in enumerate(asked) if count > 0)
        return StepResult(loss / max(real, 1.0), grad_norm, int(real), skipped, union)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(Σ weight · loss, Σ weight) over this dp rank's share and all others', equal on all ranks; no dropout.

        The share must hold `plan.evaluation.microbatches` micro-batches.
        """
        self._bind(batch, training=False)
        losses = self.pipeline.run(self._shape(batch), self.model.dtype, 0.0, schedule=self.plan.evaluation)
        loss, tokens = self._over_world([*self._sums(losses, batch)])
        return loss, int(tokens)

    @property
    def _nominal(self) -> int:
        return self.plan.config.global_batch_size * self.plan.config.sequence_length

    def _bind(self, batch: Batch, training: bool) -> list[MicroBatch]:
        """Cuts a share of sequences into micro-batches and hands them to the stages."""
        size, device = self.plan.config.micro_batch_size, self.mesh.device
        tensors = [torch.from_numpy(part).to(device, non_blocking=True) for part in batch]
        batches = [MicroBatch(*parts) for parts in zip(*(torch.split(tensor, size) for tensor in tensors), strict=True)]
        for bound in self._bound.values():
            bound.batches, bound.training = batches, training
        return batches

    def _shape(self, batch: Batch) -> tuple[int, ...]:
        """(s, B, D) of the activations between stages."""
        length = batch.tokens.shape[1]
        if self.model.parallel.sequence_parallel:
            length //= self.model.parallel.size
        return (length, self.plan.config.micro_batch_size, self.plan.config.model.hidden)

    def _sums(self, losses: dict[int, Tensor], batch: Batch) -> tuple[float, int]:
        if not losses or not self._speaks:
            return 0.0, 0
        return float(torch.stack(list(losses.values())).double().sum().item()), int(batch.weights.sum())

    def _over_world(self, values: list[float]) -> list[float]:
        vector = torch.tensor(values, dtype=torch.float64, device=self.mesh.device)
        out: list[float] = all_reduce(vector, self.mesh.world).tolist()
        return out
