"""One rank's life in a run: read the step's samples, step, evaluate, save, load. Still no Ray and no policy.

The state of a run is small: the weights and moments (slices of global tensors), the number of committed steps and of
consumed samples. Random numbers need no state, since they are a function of the seed and of what they are for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from raytron.checkpoint import gather
from raytron.checkpoint.catalog import Generation
from raytron.checkpoint.checkpointer import facts as read_facts
from raytron.checkpoint.checkpointer import load as load_slices
from raytron.checkpoint.memory import NOTES_ROOM, Replicas
from raytron.checkpoint.saver import Phase
from raytron.checkpoint.sources import MemoryGeneration
from raytron.checkpoint.store import Hook, no_hook
from raytron.config import LearningRateConfig, to_mapping
from raytron.data.batch import Batch, TokenStream, part_of
from raytron.data.run_data import ValidationSet
from raytron.errors import CheckpointError, ConfigError, Problem
from raytron.observe.busy import BusyClock
from raytron.observe.records import Record
from raytron.observe.replicas import Check
from raytron.observe.result import NAMED
from raytron.observe.trace import Tracer
from raytron.optim.lr import learning_rate
from raytron.parallel.layout import Slice
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import Axis
from raytron.plan.plan import Plan
from raytron.training.at_once import AtOnce
from raytron.training.engine import Engine, StepResult
from raytron.training.journal import Journal
from raytron.training.read_once import ReadOnce
from raytron.training.replica_digest import ReplicaDigest
from raytron.training.replicas import Position, check_same_optimizer, committed
from raytron.training.saves import WRITING, Saves

ALIKE: tuple[Axis, ...] = ("tp", "cp", "pp")  # ranks that differ on these only train on the same samples


class Started(NamedTuple):
    """A step whose result may not be known yet."""

    step: int
    lr: float
    sequences: int
    loss_scale: float
    seconds: float
    data_wait_s: float  # of those, until its samples were there
    saving: Phase  # of the checkpoint under way when the step began
    replicas: Check | None  # of the state before it


class Trainer:
    """A rank of one mesh over a training stream and, for evaluation, validation sets."""

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        stream: TokenStream,
        validation: TokenStream | Sequence[ValidationSet] | None = None,
        *,
        data_digest: str = "",
        data_facts: Record | None = None,
        tracer: Tracer | None = None,
        once: ReadOnce | None = None,
        hook: Hook = no_hook,
    ):
        """validation: one stream, or named sets. data_facts: what checkpoints tell of the data; None: data_digest. once: the
        part of `stream` that `share_reads` is about; None: each rank reads by itself.
        hook: told the phases of a step (forward, all-reduce, optimizer), of a save and of a load as they begin, and when a
        state has come from memory (restored)."""
        self.plan, self.mesh, self.stream = plan, mesh, stream
        self.validation = _sets(validation)
        self.data_facts, self._hook, self.phase = data_facts or {"data": data_digest}, hook, ""
        self.tracer, self._once = tracer, once
        self.clock = BusyClock(mesh, tracer)
        self.engine = Engine(plan, mesh, self.clock.watch, self.hook)
        self.at_once = AtOnce(self.engine) if plan.config.optimizer.at_once else None
        self.replicas: Replicas | None = None
        self.journal: Journal | None = None  # of rank 0, where the state is kept in memory
        self.saves = Saves(mesh, plan.config.checkpoint.background, hook)
        self.digest = ReplicaDigest.wanted(self.engine.model, self.engine.buckets, mesh, plan.config)
        self.engine.before_update = self._before_update
        self._started: deque[Started] = deque()
        self.step = 0  # committed steps
        self.consumed = 0  # samples of committed steps
        self.skipped_steps = 0  # committed steps that changed nothing
        self.retrace = False  # records of checks that agree hold what tells ranks apart, too, as those that do not

    def hook(self, phase: str) -> None:
        """A phase of a step, or of a load, begins; `phase` is the newest one of a step, "" between two."""
        self.phase = phase
        self._hook(phase)

    def train_step(self, request: int = 0) -> Record | None:
        """One step; the record that goes to metrics.jsonl, equal on all ranks but for times. Under `optimizer.at_once` it is
        the record of the step before, None at first: `settle` has the last one.

        request: bits that this rank was asked for; the record's `request` is the union over all ranks.

        Raises GuardError or Rollback on all ranks for a step that may not be committed; nothing was changed then.
        """
        self.clock.begin()
        self.phase = "samples"
        config, check = self.plan.config, self._compare_replicas()
        sequences = config.batch_size_at(self.consumed)
        begin = time.perf_counter()
        batch = self._share(self.stream, self.consumed, sequences)
        waited = time.perf_counter() - begin
        lr = learning_rate(config.lr, config.lr_horizon, self.step)
        every, used_scale = config.observe.layer_norms, self.engine.loss_scale.value
        wanted = every is not None and (self.step + 1) % every == 0
        if self.tracer is not None:
            self.tracer.begin(self.step + 1)
        saving = self.saves.phase
        result = self._step(batch, lr, request | self.saves.bit, sequences, wanted)
        self.consumed += sequences
        self.step += 1
        if self.tracer is not None:
            self.tracer.finish()
        started = Started(self.step, lr, sequences, used_scale, self.clock.seconds, waited, saving, check)
        if self.at_once is None:
            self._replicate(result, started)
        self._started.append(started._replace(seconds=self.clock.end(self.step)))
        self.phase = ""
        return self._record(result)

    def _step(self, batch: Batch, lr: float, request: int, sequences: int, norms: bool) -> StepResult | None:
        if self.at_once is not None:
            return self.at_once.step(batch, lr, request, sequences=sequences, layer_norms=norms)
        guard = self.engine.guard
        skip = self.step + 1 in guard.skip
        result = self.engine.step(batch, lr, request, sequences=sequences, layer_norms=norms, skip=skip)
        if result.finding is not None:
            guard.enforce(self.step + 1, self.consumed, sequences, result.finding)
        guard.trail.append((self.step + 1, result.own))
        return result

    def _compare_replicas(self) -> Check | None:
        """Whether all that should be equal is, every so many steps."""
        every = self.plan.config.guard.digest_every
        if self.digest is None or every is None or self.step == 0 or self.step % every:
            return None
        return self.digest.check(self.step, dict(self.engine.guard.trail), every)

    def retune(self, lr: LearningRateConfig) -> None:
        """Another learning rate from the next step on; on all ranks between the same two steps. Checkpoints keep it."""
        assert not self._started, "settle first"
        self.plan = self.plan.retuned(lr)

    def skip(self, steps: Iterable[int]) -> None:
        """Numbers of steps, from 1, whose samples and learning rate are to be used up without an update: those that the run
        was rolled back for. Checkpoints keep them. Raises ConfigError where steps update at once."""
        ahead = {step for step in steps if step > self.step}
        if ahead and self.at_once is not None:
            what = f"step {min(ahead)} is to be skipped, which a run that updates at once can't do"
            raise ConfigError([Problem("optimizer.at_once", what, "set it to false until then")])
        self.engine.guard.skip |= ahead

    def settle(self) -> Record | None:
        """The record that is not known yet, if there is one. Before anything else than a step is done."""
        return self._record(None if self.at_once is None else self.at_once.settle())

    def _record(self, result: StepResult | None) -> Record | None:
        """The record of the first step that has none yet."""
        if result is None:
            return None
        started = self._started.popleft()
        record = self._told(started, result)
        self.skipped_steps += result.skipped
        self.saves.heard(started.saving, result.request)
        if self.journal is not None:
            self.journal.add(record)
        return record

    def _told(self, started: Started, result: StepResult) -> Record:
        """The record of a step that is not counted yet."""
        config, skipped_steps = self.plan.config, self.skipped_steps + result.skipped
        record: Record = {
            "step": started.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": started.lr,
            "tokens": result.tokens,
            "step_time_s": started.seconds,
            "data_wait_s": started.data_wait_s,
            "tokens_per_s": result.tokens / started.seconds,
            "request": result.request & ~WRITING,
        }
        if config.batch_ramp.start is not None:
            record["sequences"] = started.sequences
        if self.engine.loss_scale.dynamic:
            record["loss_scale"] = started.loss_scale
        if skipped_steps:
            record["skipped_steps"] = skipped_steps
        if result.skipped:
            record["skipped"] = True
        if result.finding is not None:
            record["rerun"] = result.finding.record()
        if started.replicas is not None:
            record["replicas"] = started.replicas.record(trails=self.retrace)
        if result.noise is not None:
            record |= {f"gradient_noise/{key}": value for key, value in result.noise._asdict().items()}
        norms = {f"grad_norm/{layer}": norm for layer, norm in result.layer_norms.items()}
        return record | norms | result.metrics

    def evaluate(self) -> Record:
        """Mean loss in nats over the fixed validation batches, `validation_loss`; needs a validation stream. Of several sets
        it is the mean of their losses by their shares, and `validation_loss/NAME` is that of each."""
        assert self.validation, "no validation set"
        assert not self._started, "settle first"
        losses = {each.name: self._validation_loss(each.stream) for each in self.validation}
        main = sum(each.share * losses[each.name][0] for each in self.validation if each.share)
        record: Record = {"step": self.step, "validation_loss": main, "tokens": sum(n for _, n in losses.values())}
        if len(losses) > 1 or self.plan.config.data.validation:
            record |= {f"{NAMED}{name}": loss for name, (loss, _) in losses.items()}
        return record

    def _validation_loss(self, stream: TokenStream) -> tuple[float, int]:
        """Mean loss over the first batches of a stream, and how many tokens counted in it."""
        config, loss, tokens = self.plan.config, 0.0, 0
        for index in range(config.evaluate.batches):
            size = config.global_batch_size
            added, counted = self.engine.evaluate(self._share(stream, index * size, size))
            loss, tokens = loss + added, tokens + counted
        return loss / max(1, tokens), tokens

    def _share(self, stream: TokenStream, first: int, count: int) -> Batch:
        """This rank's micro-batches of the samples [first, first + count)."""
        coords, shape = self.mesh.coords, self.mesh.shape
        start, stop = part_of(first, count, coords.dp, shape.dp, self.plan.config.micro_batch_size)
        return stream.batch(start, stop - start)

    def share_reads(self, folder: Path | str, epoch: int, here: Collection[int]) -> None:
        """From here on samples that several ranks of a node want are read by one of them, where reading is dear. On all
        ranks, before the first step.

        folder: in the node's memory; epoch: see `open_replicas`; here: the ranks of this node.
        """
        alike = [rank for rank in self.mesh.shape.group(self.mesh.rank, *ALIKE) if rank in here]
        if self._once is not None and len(alike) > 1:
            self._once.begin(Path(folder), epoch, self.mesh.coords.dp, leads=self.mesh.rank == alike[0])

    def end_reads(self) -> None:
        """No sample is asked for any more; frees ranks that wait for this one to read. Call it before a trainer that shares
        reads is dropped."""
        if self._once is not None:
            self._once.end()

    def state(self) -> dict[str, Slice]:
        """Weights, moments and balancing biases: this rank's slices of the global tensors."""
        return self.engine.state()

    def facts(self) -> Record:
        """What a checkpoint knows beside its tensors."""
        return self._facts(self._position())

    def _position(self) -> Position:
        return Position(self.step, self.consumed, self.engine.optimizer.updates, self.skipped_steps)

    def _facts(self, at: Position) -> Record:
        return {
            **at._asdict(),
            "loss_scale": self.engine.loss_scale.facts(),
            "guard": self.engine.guard.facts(),
            "lr": learning_rate(self.plan.config.lr, self.plan.config.lr_horizon, at.step),
            "seed": self.plan.config.seed,
            **self.data_facts,
            "mesh": str(self.mesh.shape),
            "config": to_mapping(self.plan.config),
        }

    def save(self, directory: Path | str) -> Path:
        """Writes a committed generation together with all other ranks, and waits for it; returns its path. Raises
        CheckpointError on every rank, and then nothing was committed."""
        assert not self._started, "settle first"
        return self.saves.save(directory, self.step, self.state(), self.facts())

    def begin_save(self, directory: Path | str) -> Path | None:
        """As `save`, but goes on at once (`checkpoint.background`), and raises nothing: the state is copied beside the next
        step, whose update waits for it, then written; `reports` says how it ended, some steps later. Before a run ends or
        leaves its mesh, `settle_saves`.

        The path of the generation that is to be, None where it could not begin. If one is still under way, ranks wait for
        it first.
        """
        assert not self._started, "settle first"
        return self.saves.begin(directory, self.step, self.state(), self.facts())

    def _before_update(self) -> None:
        """The state is about to change."""
        self.saves.before_update()
        if self.replicas is not None:
            self.replicas.before_update()

    def settle_saves(self) -> None:
        """Waits for the checkpoint under way; together with all other ranks."""
        self.saves.settle()

    def reports(self) -> list[Record]:
        """How checkpoints have ended since the last call, equal on all ranks: event ("checkpoint", "checkpoint_failed"),
        step, path, seconds, stall_s, bytes, error."""
        return self.saves.reports()

    def load(self, generation: Generation | Path | str) -> None:
        """Goes on from a generation that any mesh saved. Raises CheckpointError, and then nothing was changed."""
        self.settle_saves()
        facts = read_facts(generation)
        self._check(facts)
        with self.engine.changing():
            load_slices(generation, self.state(), self.mesh.control, hook=self.hook)
            self._go_on(facts)

    def _check(self, facts: Record) -> None:
        """Raises CheckpointError where this run can't go on from a state."""
        check_same_optimizer(facts, self.plan.config.optimizer.name)
        ahead = [step for step in facts.get("guard", {}).get("skip", ()) if step > facts["step"]]
        if ahead and self.at_once is not None:
            raise CheckpointError(f"the run is to skip step {ahead[0]}, which optimizer.at_once can't do")

    def _go_on(self, facts: Record) -> None:
        """After reading into `state`."""
        self.engine.optimizer.loaded(int(facts["updates"]))
        self.engine.loss_scale.restore(facts.get("loss_scale", {}))
        self.step, self.consumed = int(facts["step"]), int(facts["consumed"])
        self.skipped_steps = int(facts.get("skipped_steps", 0))
        self.engine.guard.restore(facts.get("guard", {}))
        self.close_replicas()

    # ---- the state in memory

    def open_replicas(self, folder: Path | str, epoch: int, known: Callable[[], int] | None = None) -> None:
        """From here on every `recovery.memory_every`-th committed step goes into a segment in `folder`, the first one now,
        after which earlier epochs may be forgotten; and `park` is possible. Collective; before the first step, and after
        `load` or `restore`, which end it.

        epoch: a number that no earlier life of this run's ranks had: of every mesh, and of every going back to an older
            step.
        known: the newest step of which whoever drives the ranks has a record. Rank 0 keeps those of later ones beside the
            state (`raytron.training.journal`). None: no records are kept.

        Raises CheckpointError on all ranks where a node has no room: the trainer can go on without.
        """
        assert not self._started, "settle first"
        self.close_replicas()
        every, shape = self.plan.config.recovery.memory_every, str(self.mesh.shape)
        self.replicas = Replicas(
            folder, epoch, self.state(), self.facts(),
            mesh=shape, group=self.mesh.control, every=every, device=self.mesh.device, hook=self._hook,
        )  # fmt: skip
        if known is not None and self.mesh.rank == 0:
            self.journal = Journal(known, NOTES_ROOM)
        if every is None:
            return
        self.engine.before_commit = self._wait_for_replicas
        if self.at_once is not None:
            self.at_once.settled = lambda result: self._replicate(result, next(iter(self._started), None))
        self.replicas.write(self.step, self.facts())
        self._wait_for_replicas()

    def close_replicas(self) -> None:
        """No more segments; those that are written stay. Call it before a trainer with open replicas is dropped."""
        if self.replicas is None:
            return
        self.engine.before_commit = lambda: None
        if self.at_once is not None:
            self.at_once.settled = lambda result: None
        self.replicas.close()
        self.replicas = self.journal = None

    def _wait_for_replicas(self) -> None:
        """Before the sum that commits a step: the one before it is where it has to be."""
        if self.replicas is not None:
            with self.mesh.waiting:
                self.replicas.wait()

    def _replicate(self, result: StepResult | None, started: Started | None) -> None:
        """The live state is committed. result, started: of its step, if that has no record yet."""
        if self.replicas is not None and self.replicas.due(self.step):
            skipped = result is not None and result.skipped
            at = self._position()._replace(skipped_steps=self.skipped_steps + skipped)
            notes: list[bytes] = []
            if self.journal is not None:
                told = None if result is None or started is None else self._told(started, result)
                notes = self.journal.lines(self.step, told)
            self.replicas.write(self.step, self._facts(at), notes)

    def park(self, ranks: Collection[int] | None = None) -> Path:
        """Writes the newest committed state into a segment of its own, even after an exception in the middle of a step, and
        returns its path. No collective; needs open replicas.

        ranks: all that park, which deal out what several of them hold; None: this rank counts on nobody.

        Raises CheckpointError where the state was caught in the middle of an update, or there is no room.
        """
        if self.replicas is None:
            raise CheckpointError("nothing can be parked: open_replicas was not called")
        found = committed(self.engine, self.at_once, self._position(), [each.sequences for each in self._started])
        notes = [] if self.journal is None else self.journal.lines(found.at.step)
        return self.replicas.park(found.state, found.at.step, self._facts(found.at), ranks, notes)

    def restore(self, generation: MemoryGeneration, node: str, fetch: gather.Fetch = gather.no_fetch) -> None:
        """As `load`, from memory. Collective. node: what the survey called this rank's node; fetch: the way to the others.

        Raises CheckpointError on all ranks, and then nothing was changed.
        """
        self.settle_saves()
        self._check(generation.facts)
        self.hook("load")
        with self.engine.changing():
            facts = gather.load(self.state(), generation, node, fetch, self.mesh.control)
            self._go_on(facts)
        self.hook("restored")


def _sets(validation: TokenStream | Sequence[ValidationSet] | None) -> tuple[ValidationSet, ...]:
    if validation is None:
        return ()
    if isinstance(validation, Sequence):
        return tuple(validation)
    return (ValidationSet("validation", validation, 1.0),)
