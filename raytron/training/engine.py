"""One optimizer step of one rank: run the schedule, reduce, clip, update. No data set, no files, no Ray.

The loss of a step is Σ weight · cross-entropy / Σ weight over all tokens of the global batch, wherever they are computed.
While the backward runs the denominator is not known yet (ranks see their own tokens only), so losses are divided by the
nominal number of tokens, and the gradient is mended by nominal / real, a factor that joins the clipping factor; in fp16
losses are also multiplied by the loss scale, and the gradient is divided by it in the same factor. One all-reduce at the
end of the step carries all scalars: loss, tokens, squared gradient norms, and the requests of the driver. So a gradient
that is not finite on one rank is seen by all, and all skip the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raytron.checkpoint.store import Hook, no_hook
from raytron.data.batch import Batch
from raytron.deal import Deal
from raytron.errors import CheckpointError, DataError, Problem
from raytron.model.assemble import Assembly, assemble
from raytron.model.balance import EXPERTS
from raytron.model.stage import Stage
from raytron.optim.noise import Noise, NoiseMeter, noise
from raytron.optim.precision import LossScale
from raytron.optim.sharded import WEIGHTS, ShardedOptimizer, clip_scale
from raytron.parallel.buckets import Bucket, GradientBuckets
from raytron.parallel.canonical import CanonicalBucket, exact_squared_norms, in_order
from raytron.parallel.collectives import Wait, all_reduce, start_all_reduce
from raytron.parallel.layout import Slice
from raytron.parallel.mesh import Mesh
from raytron.parallel.pipeline import Pipeline, Watch
from raytron.parallel.weights import Gathering
from raytron.plan.names import layer_of, layers_of
from raytron.plan.plan import Plan
from raytron.training.gather import StageWeights, blocks
from raytron.training.guard import Attempt, Finding, Guard
from raytron.training.microbatch import MicroBatch, filled_up, micro_batches

REQUEST_BITS = 8
MEMORY = "memory_gb"  # GiB, of the fullest pipeline rank's device since the run began
NORM = "norm "  # before the name of a layer


class StepResult(NamedTuple):
    """Equal on all ranks."""

    loss: float  # mean over the step's real tokens, nats
    grad_norm: float  # global, before clipping
    tokens: int  # that counted in the loss
    skipped: bool  # nothing was updated: the gradient was not finite, or the guard or the caller forbade it
    request: int  # the union of what the ranks were asked for
    layer_norms: dict[str, float]  # gradient norm of each layer, where asked for: "layers.3", "embed", ...
    noise: Noise | None  # where asked for
    metrics: dict[str, float]  # by name, what else was measured: experts/dropped, …
    finding: Finding | None = None  # of a step that was run more than once
    own: int = 0  # but this: of this rank's own loss and gradients, equal where all their bits are; 0: not known


class _Bound:
    """A stage together with the micro-batches of the moment."""

    def __init__(self, stage: Stage, gathering: Gathering):
        self.stage, self.weights = stage, StageWeights(stage, gathering)
        self.batches: list[MicroBatch] = []
        self.training = True

    def forward(self, x: Tensor | None, microbatch: int) -> Tensor:
        batch = self.batches[microbatch]
        training = self.training and not batch.empty
        context = self.stage.context(batch.samples, batch.length, training, batch.documents)
        if x is None:
            x = self.weights.embedding(self.stage.embed, batch.tokens, context)
        y: Tensor = self.stage(x, context)
        return self.weights.head(self.stage.loss, y, batch.labels, batch.weights) if self.stage.last else y


class Engine:
    """The model, gradients and optimizer of one rank, and the step over them."""

    def __init__(self, plan: Plan, mesh: Mesh, watch: Watch | None = None, hook: Hook = no_hook):
        self.plan, self.mesh, self.hook = plan, mesh, hook
        self.model: Assembly = assemble(plan, mesh)
        self.canonical = plan.config.determinism == "canonical"
        self.buckets = self._make_buckets()
        self.gathering = Gathering(self.buckets.weights, plan.config.data_parallel.prefetch)
        self.optimizer = ShardedOptimizer(self.buckets, mesh, plan.config)
        self.noise_meter: NoiseMeter | None = None
        if plan.config.observe.gradient_noise:
            self.noise_meter = NoiseMeter(self.buckets, mesh, {share.name for share in self.optimizer.trained})
        self.loss_scale = LossScale(plan.config.precision)
        at_once = plan.config.optimizer.at_once  # updates before it knows the norm: there is nothing left to run again
        self.guard = Guard(plan.config.guard, mesh, None if at_once else self.buckets)
        self._bound = {number: _Bound(stage, self.gathering) for number, stage in self.model.stages.items()}
        self.pipeline = Pipeline(self._bound, plan.schedule, mesh, self.model.parallel.deferred, watch)
        self.before_update: Callable[[], None] = _nothing  # the state is about to change
        self.before_commit: Callable[[], None] = _nothing  # this rank is about to take part in the sum that ends a step
        self.whole = True  # the state is that of one step, not caught in the middle of a change
        self._speaks = mesh.tp.index == 0  # one voice for each loss: tp ranks compute equal ones, cp ranks parts

    def _make_buckets(self) -> GradientBuckets:
        model = self.model
        make: Callable[..., Bucket] = Bucket
        if self.canonical:
            make = partial(CanonicalBucket, mesh=self.mesh, work=model.parallel.deferred, uses=model.uses)
        return GradientBuckets(
            model.params,
            self.mesh,
            self.plan.config.data_parallel,
            tied=model.tied,
            uses=model.uses,
            blocks=blocks(model.stages.values()),
            make=make,
        )

    def forward_backward(self, batch: Batch, sequences: int | None = None) -> tuple[float, int]:
        """Runs the schedule over this dp rank's share of the step; owned gradients are then those of
        loss scale · Σ weight · loss / nominal tokens over all ranks. Returns this rank's sums of loss and of tokens, zero
        where it is not the one that computes them.

        sequences: of the step over all ranks; None: global_batch_size.
        """
        self.hook("forward")
        sequences = sequences or self.plan.config.global_batch_size
        deal, dp = self.plan.config.deal(sequences), self.mesh.coords.dp
        schedule = self.plan.schedule_for(sequences, dp)
        self._bind(batch, schedule.microbatches, training=True)
        self.buckets.begin(schedule.microbatches, deal)
        if self.noise_meter is not None:
            self.noise_meter.begin(len(deal.of(dp)) / deal.total)
        self.model.balance.begin()
        scale = self.loss_scale.value / self._nominal(sequences)
        if self.model.experts is not None:
            self.model.experts.penalty_scale = scale
        losses = self.pipeline.run(self._shape(batch), self.model.dtype, scale, schedule=schedule)
        self.buckets.finish()
        return self._sums(losses, batch, deal)

    def step(
        self,
        batch: Batch,
        lr: float,
        request: int = 0,
        *,
        sequences: int | None = None,
        layer_norms: bool = False,
        skip: bool = False,
    ) -> StepResult:
        """forward_backward and an update with rate `lr`, unless the guard finds that it may not be.

        sequences: of the step over all ranks; None: global_batch_size. layer_norms: whether to report them. skip: update
        nothing, whatever comes.
        """
        sequences = sequences or self.plan.config.global_batch_size
        attempt = partial(self._attempt, batch, request, sequences, layer_norms)
        overflows = self.loss_scale.dynamic and self.loss_scale.value > self.loss_scale.SMALLEST
        run, finding = (attempt(False), None) if skip else self.guard.examine(attempt, overflows)
        result = self.result(run.sums, sequences)
        finite, kept = not result.skipped, finding is None or finding.action == "keep"
        result = result._replace(skipped=skip or not (finite and kept), finding=finding, own=run.own)
        if not result.skipped:
            limit = clip_scale(result.grad_norm, self.plan.config.optimizer.clip_norm)
            self.update(lr, self.mend(run.sums["tokens"], sequences) * limit)
        self.loss_scale.update(finite)
        if not skip and (finding is None or finding.commits):
            self.guard.took(result.loss, result.grad_norm, result.skipped, overflow=overflows and not finite)
        return result

    def _attempt(self, batch: Batch, request: int, sequences: int, layer_norms: bool, look: bool) -> Attempt:
        """Gradients of a step, and what all ranks say of them. May be called again: it leaves nothing behind.

        look: whether this rank's own gradients are finite.
        """
        own = self.guard.own
        if own is not None:
            own.begin(look)
        loss, tokens = self.forward_backward(batch, sequences)
        values = self.values(loss, tokens, request, layer_norms)
        self.before_commit()
        self.hook("all-reduce")
        sums = self._over_world(values)
        if self.canonical:
            sums |= exact_squared_norms(self._counted(layer_norms), self.mesh)
        self.mesh.check()
        result = self.result(sums, sequences)
        mine = (0, True) if own is None else (own.fingerprint(loss), own.all_finite())
        return Attempt(result.loss, result.grad_norm, sums, *mine)

    def values(self, loss: float, tokens: float, request: int, layer_norms: bool) -> dict[str, float]:
        """What this rank has to say of a step, after its backward: values that are to be summed over all ranks."""
        return {
            "loss": loss,
            "tokens": tokens,
            **{f"request {bit}": float(request >> bit & 1) for bit in range(REQUEST_BITS)},
            **({} if self.canonical else self._squares(layer_norms)),
            **self.model.balance.measure(),
            **self._memory(),
        }

    def result(self, sums: dict[str, float], sequences: int) -> StepResult:
        """What the sums of all ranks' `values` say."""
        real = max(sums["tokens"], 1.0)
        mend = self.mend(real, sequences)
        norms = {key: math.sqrt(sums[key]) * mend for key in sums if key.startswith(NORM)}
        grad_norm = math.hypot(*norms.values())
        return StepResult(
            loss=sums["loss"] / real,
            grad_norm=grad_norm,
            tokens=int(sums["tokens"]),
            skipped=not math.isfinite(grad_norm),
            request=sum(1 << bit for bit in range(REQUEST_BITS) if sums[f"request {bit}"] > 0),
            layer_norms={key.removeprefix(NORM): norm for key, norm in norms.items() if key != NORM},
            noise=self._noise(sums, mend, sequences),
            metrics=_metrics(sums),
        )

    def update(self, lr: float, scale: float) -> None:
        """One update with owned gradients multiplied by `scale`; starts to gather what the next forward needs first."""
        self.before_update()
        with self.changing():
            self.hook("optimizer")
            self.optimizer.step(lr, scale)
            self.model.balance.update()
            self.gathering.ahead()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Marks the state as not `whole` meanwhile, and for good if that fails; but a CheckpointError changes nothing."""
        self.whole = False
        try:
            yield
        except CheckpointError:
            self.whole = True
            raise
        self.whole = True

    def mend(self, tokens: float, sequences: int) -> float:
        """The factor that makes owned gradients those of the mean over `tokens` real tokens."""
        return self._nominal(sequences) / max(tokens, 1.0) / self.loss_scale.value

    def start_counting(self, batch: Batch) -> Wait:
        """Starts to count the real tokens of a step over the ranks that hold others: a float64 scalar."""
        own = torch.tensor(float(self._tokens(batch)), dtype=torch.float64, device=self.mesh.device)
        return start_all_reduce(own, self.mesh.dense.every)

    def _memory(self) -> dict[str, float]:
        """GiB that the first rank of each pipeline coordinate had allocated at most, a key for each; nothing on a CPU."""
        if self.mesh.device.type != "cuda":
            return {}
        here, coords = torch.cuda.max_memory_allocated(self.mesh.device) / 2**30, self.mesh.coords
        speaks = not any((coords.dp, coords.cp, coords.tp))
        return {f"{MEMORY} {pp}": here if speaks and pp == coords.pp else 0.0 for pp in range(self.mesh.shape.pp)}

    def _squares(self, by_layer: bool) -> dict[str, float]:
        """This rank's parts of squared gradient norms; the same keys on all ranks. Those that begin with NORM add up to the
        whole one."""
        names, values = self.optimizer.squared_norms()
        meter = self.noise_meter
        if not by_layer and meter is None:
            return {NORM: values.sum().item()}
        each = dict(zip(names, values.tolist(), strict=True))
        out = dict.fromkeys(self._norm_keys(by_layer), 0.0)
        for name, value in each.items():
            out[NORM + layer_of(name) if by_layer else NORM] += value
        if meter is not None:
            out |= {"noise small": meter.local(), "noise big": meter.summed(each)}
        return out

    def _norm_keys(self, by_layer: bool) -> list[str]:
        return [NORM + layer for layer in layers_of(self.plan.config.model)] if by_layer else [NORM]

    def _noise(self, sums: dict[str, float], mend: float, sequences: int) -> Noise | None:
        if self.noise_meter is None:
            return None
        deal, size = self.plan.config.deal(sequences), self.plan.config.micro_batch_size
        shares = [len(deal.of(dp)) * size for dp in range(deal.ranks)]
        return noise(sums["noise small"] * mend**2, sums["noise big"] * mend**2, shares)

    def _counted(self, by_layer: bool) -> dict[str, list[Tensor]]:
        """The gradients that this rank counts in the norm, by the names of `_squares`."""
        out: dict[str, list[Tensor]] = {key: [] for key in self._norm_keys(by_layer)}
        for share in self.optimizer.trained:
            if share.owned.counted:
                out[NORM + layer_of(share.name) if by_layer else NORM].append(share.gradient)
        return out

    def state(self) -> dict[str, Slice]:
        """All that a checkpoint holds of the model and the optimizer: slices of global tensors. After reading into them
        call `optimizer.loaded`."""
        return self.optimizer.state() | {WEIGHTS + name: part for name, part in self.model.balance.state().items()}

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """(Σ weight · loss, Σ weight) over this dp rank's share and all others', equal on all ranks; no dropout.

        The shares must be those of a step with the full global batch.
        """
        schedule = self.plan.evaluation_for(self.mesh.coords.dp)
        self._bind(batch, schedule.microbatches, training=False)
        losses = self.pipeline.run(self._shape(batch), self.model.dtype, 0.0, schedule=schedule)
        loss, tokens = self._sums(losses, batch, self.plan.config.deal())
        sums = self._over_world({"loss": loss, "tokens": tokens})
        return sums["loss"], int(sums["tokens"])

    def _nominal(self, sequences: int) -> int:
        return sequences * self.plan.config.sequence_length

    def _bind(self, batch: Batch, count: int, training: bool) -> None:
        """Cuts a share of sequences into micro-batches, adds empty ones up to `count`, and hands them to the stages. Raises
        DataError where documents are to be kept apart and the batch does not tell them apart."""
        data = self.plan.config.data
        if data.apart and batch.documents is None:
            what = "the batches of this token stream do not say where documents end"
            key, remedy = ("data.document_mask", "false") if data.packing == "chop" else ("data.packing", "chop")
            raise DataError(Problem(key, what, f"use a stream that does, or set it to {remedy}"))
        own = [*micro_batches(batch, self.plan.config.micro_batch_size, self._held(batch), self.mesh.device)]
        batches = filled_up(own, count)
        for bound in self._bound.values():
            bound.batches, bound.training = batches, training

    def _held(self, batch: Batch) -> NDArray[np.int64]:
        """The positions of each sequence that this cp rank holds."""
        held: NDArray[np.int64] = self.model.context_parallel.positions(batch.tokens.shape[1]).numpy()
        return held

    def _shape(self, batch: Batch) -> tuple[int, ...]:
        """(s, B, D) of the activations between stages."""
        length = len(self._held(batch))
        if self.model.parallel.sequence_parallel:
            length //= self.model.parallel.size
        return (length, self.plan.config.micro_batch_size, self.plan.config.model.hidden)

    def _tokens(self, batch: Batch) -> int:
        return int(batch.weights[:, self._held(batch)].sum())

    def _sums(self, losses: dict[int, Tensor], batch: Batch, deal: Deal) -> tuple[float, int]:
        """This rank's part of the loss and tokens of a step. Collective over the world under `determinism: canonical`."""
        spoken = losses if self._speaks else {}
        tokens = self._tokens(batch) if spoken else 0
        if self.canonical:
            loss = in_order({number: loss.item() for number, loss in spoken.items()}, deal, self.mesh)
            return loss if self.mesh.rank == 0 else 0.0, tokens
        if not spoken:
            return 0.0, 0
        return float(torch.stack(list(spoken.values())).double().sum().item()), tokens

    def _over_world(self, values: dict[str, float]) -> dict[str, float]:
        """The sums over all ranks of values under the same names."""
        vector = torch.tensor(list(values.values()), dtype=torch.float64, device=self.mesh.device)
        return dict(zip(values, all_reduce(vector, self.mesh.world).tolist(), strict=True))


def _nothing() -> None:
    """Nobody wants to know."""


def _metrics(sums: dict[str, float]) -> dict[str, float]:
    """What goes into a step's record under its own name."""
    memory = [value for name, value in sums.items() if name.startswith(MEMORY)]
    experts = {name: value for name, value in sums.items() if name.startswith(EXPERTS)}
    return experts | ({MEMORY: max(memory)} if memory else {})
