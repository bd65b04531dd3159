"""Measures what an engine really holds, to be compared with what the plan counts (`raytron.plan.memory`).

Weights, gradients and optimizer state are read off the live tensors. Activations are the bytes that live between the
actions of a schedule and did not before it began: on a GPU the allocator knows them; on a CPU, which has no such count,
every result of every operation is noted, and the storages that still live are summed.

    meter = Meter()
    engine = Engine(plan, mesh, watch=meter)
    engine.forward_backward(batch)                 # warms up
    kept = meter.measure(engine, batch)
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytron.data.batch import Batch
from raytron.optim.adamw import FusedAdamW
from raytron.plan.memory import State
from raytron.plan.schedule import Action
from raytron.training.engine import Engine

SETTLE_S = 0.002  # a gloo thread may hold a tensor a moment longer than it needs it


class Kept(NamedTuple):
    """Bytes above those that lived before the schedule began."""

    actions: tuple[tuple[str, int], ...]  # after each action: its text, and what lives then
    peak: int | None  # at any time, within actions, too; None: not known

    @property
    def largest(self) -> int:
        """The most between two actions."""
        return max(kept for _, kept in self.actions)


def state_of(engine: Engine) -> State:
    """Bytes of weights, of gradients as they stand at this moment, and of optimizer state; under data_parallel.offload
    gradient shares and optimizer state count as the host's."""
    buckets, optimizer = engine.buckets, engine.optimizer
    values = [owned.value for owned in buckets.owned if owned.value is not None]
    weights = _storages([*engine.model.params, *values])
    kept = [share.master for share in optimizer.shares if _key(share.master) not in weights]
    for part in optimizer.optimizers:
        kept += [state.tensor for state in part.state()]
        if isinstance(part, FusedAdamW):
            kept += [moments["step"] for moments in part.adamw.state.values()]
    sums = _storages([bucket.sums for bucket in buckets.buckets if bucket.sums is not None])
    shares = _storages([bucket.share for bucket in buckets.buckets if bucket.share is not None])
    state = sum(x.numel() * x.element_size() for x in kept)
    here = State(sum(weights.values()), sum(sums.values()), 0)
    if engine.plan.config.data_parallel.offload:
        return here._replace(host=sum(shares.values()) + state)
    return here._replace(gradients=here.gradients + sum(shares.values()), optimizer=state)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Each storage once, with its bytes."""
    return {_key(x): x.untyped_storage().nbytes() for x in tensors}


def _key(x: Tensor) -> int:
    key: int = x.untyped_storage()._cdata
    return key


class _Ledger(TorchDispatchMode):
    """Notes the storage of every result, as long as it lives; what an operation was given from outside counts nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in tree_leaves((args, kwargs)):
            self._note(x, new=False)
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            self._note(x, new=True)
        return out

    def _note(self, x: Any, new: bool) -> None:
        if isinstance(x, Tensor) and x.device.type != "meta":
            storage = x.untyped_storage()
            self.sizes.setdefault(StorageWeakRef(storage), storage.nbytes() if new else 0)  # type: ignore[no-untyped-call]

    def living(self) -> int:
        """Bytes."""
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}  # type: ignore[no-untyped-call]
        return sum(self.sizes.values())


class Meter:
    """An engine's watch that looks after each action at what lives; active only while it measures."""

    def __init__(self) -> None:
        self.active = False
        self._ledger: _Ledger | None = None
        self._before = 0  # allocated on the GPU
        self._seen: list[tuple[str, int]] = []

    def now(self) -> float:
        return time.perf_counter()

    def saw(self, action: Action, start: float, end: float) -> None:
        if self._ledger is not None:
            time.sleep(SETTLE_S)
            self._seen.append((str(action), self._ledger.living()))
        else:
            self._seen.append((str(action), torch.cuda.memory_allocated() - self._before))

    def measure(self, engine: Engine, batch: Batch) -> Kept:
        """What `forward_backward` of a batch keeps; this meter must be the engine's watch."""
        self._seen, self.active = [], True
        try:
            return self._on_gpu(engine, batch) if engine.mesh.device.type == "cuda" else self._on_cpu(engine, batch)
        finally:
            self.active, self._ledger = False, None

    def _on_cpu(self, engine: Engine, batch: Batch) -> Kept:
        self._ledger = _Ledger()
        with self._ledger:
            engine.forward_backward(batch)
        return Kept(tuple(self._seen), None)

    def _on_gpu(self, engine: Engine, batch: Batch) -> Kept:
        """By the allocator. Not run yet."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        engine.forward_backward(batch)
        return Kept(tuple(self._seen), torch.cuda.max_memory_allocated() - self._before)
