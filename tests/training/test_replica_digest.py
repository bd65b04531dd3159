"""One flipped bit in one replica is found, wherever replicas are, and its rank is named where that can be."""

from __future__ import annotations

import pytest
import torch

from raytron.config import from_mapping
from raytron.observe.replicas import Check, verdict
from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.streams import RandomStream
from raytron.training.trainer import Trainer

BASE = from_mapping(
    {"model": {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 2, "ffn": 16, "vocab": 31}, "sequence_length": 8,
     "global_batch_size": 12, "micro_batch_size": 1, "data": {"dataset": "random"},
     "optimizer": {"name": "sgd", "weight_decay": 0.0}, "guard": {"digest_every": 2}}
)  # fmt: skip


def flip(x, element, bit):
    """One bit of an fp32 or bf16 tensor."""
    kind = {2: torch.int16, 4: torch.int32}[x.element_size()]
    x.view(-1).view(kind)[element] ^= 1 << bit


def trainer_of(rank, changes):
    config = BASE.replace(**changes)
    return Trainer(make_plan(config, None), Mesh(MeshShape.of(config.mesh), rank), RandomStream(31, 8))


def held_by(trainer, name):
    """What lasts of a parameter on this rank: itself, or its share; nothing where it is elsewhere."""
    found = [o for o in trainer.engine.buckets.owned if o.param.full_name == name]
    return [o.param.detach() if o.value is None else o.value for o in found if o.value is None or o.value.numel()]


def check_flip(rank, changes, where, name):
    """Before and after one bit of `name` flips on rank `where`; whether it was there to flip."""
    trainer = trainer_of(rank, changes)
    for _ in range(2):
        trainer.train_step()
    before = trainer.digest.check(2, {}, 2)
    found = held_by(trainer, name) if rank == where else []
    for x in found:
        flip(x, x.numel() // 2, 3)
    return before, trainer.digest.check(2, {}, 2), bool(found)


def zero(level, **more):
    return {"data_parallel.zero": level, **{f"mesh.{axis}": size for axis, size in more.items()}}


MLP, NORM = "layers.1.mlp.up.weight", "layers.1.mlp.norm.weight"
CASES = [  # configuration, rank, parameter, named by a majority, suspects
    (zero(0, dp=2), 1, MLP, (), (0, 1)),
    (zero(1, dp=2), 0, MLP, (), (0, 1)),
    (zero(0, dp=3), 1, MLP, (1,), ()),
    (zero(1, dp=3), 2, MLP, (2,), ()),
    (zero(3, dp=3, replicate=3), 2, MLP, (2,), ()),
    (zero(3, dp=4, replicate=2), 1, MLP, (), (1, 3)),
    (zero(1, tp=2), 1, NORM, (), (0, 1)),
    (zero(1, tp=2, dp=2), 3, NORM, (3,), ()),
    (zero(1, tp=2, dp=2), 3, MLP, (), (1, 3)),
    (zero(3, tp=2, dp=2), 3, NORM, (), (2, 3)),
    (zero(0, pp=2, dp=2), 2, MLP, (), (2, 3)),
    ({**zero(1, pp=2, dp=2), "model.tied_embeddings": True}, 2, "embed.weight", (2,), ()),
]
SLOW = [
    (zero(1, tp=4), 1, "layers.0.attention.kv.weight", (), (0, 1)),
    (zero(2, dp=2, cp=2), 3, MLP, (3,), ()),
    ({**zero(1, dp=4, ep=2), "model.experts.count": 4}, 3, "layers.1.mlp.experts.up.weight", (), (1, 3)),
    ({**zero(1, dp=4), "precision.dtype": "bf16"}, 3, MLP, (3,), ()),
]


@pytest.mark.parametrize(
    ("changes", "where", "name", "faulty", "suspects"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
    ids=str,
)
def test_one_flipped_bit_is_found(world, changes, where, name, faulty, suspects):
    results = world.run(MeshShape.of(BASE.replace(**changes).mesh).world, check_flip, changes, where, name)
    assert results[where][2], f"{name} is not on rank {where}"
    for before, after, _ in results:
        assert before.agrees, str(before)
        assert before.agreed, "something was compared"
        assert (after.faulty, after.suspects) == (faulty, suspects)
        assert after == results[0][1]


@pytest.mark.parametrize("changes", [{}, zero(1, pp=2)], ids=str)
def test_where_nothing_is_held_twice_nothing_is_compared(world, changes):
    def wanted(rank):
        return trainer_of(rank, changes).digest is not None

    assert not any(world.run(MeshShape.of(BASE.replace(**changes).mesh).world, wanted))


def records(rank, changes, flip_at, where):
    """Trains; rank `where` flips a bit after step `flip_at`. The checks by step."""
    trainer, out = trainer_of(rank, changes), []
    trainer.retrace = True
    while trainer.step < 7:
        if trainer.step == flip_at and rank == where:
            flip(held_by(trainer, MLP)[0], 5, 20)
        out.append(trainer.train_step())
    return {record["step"] - 1: Check.read(record["replicas"]) for record in out if "replicas" in record}


@pytest.mark.parametrize(
    ("changes", "flip_at", "found", "where"),
    [
        (zero(0, dp=2), 2, 2, 1),  # right before a check: no gradient has been wrong yet
        (zero(0, dp=2), 3, 4, 0),
        (zero(0, dp=2, pp=2), 5, 6, 3),
    ],
    ids=str,
)
def test_of_two_replicas_a_second_run_tells_which_was_wrong(world, changes, flip_at, found, where):
    """Although the wrong gradients have long reached both."""
    ranks = MeshShape.of(BASE.replace(**changes).mesh).world
    first = world.run(ranks, records, changes, flip_at, where)[0]
    again = world.run(ranks, records, changes, None, where)[0]
    assert {step: check.agrees for step, check in first.items()} == {step: step < found for step in (2, 4, 6)}
    assert all(check.agrees for check in again.values())
    assert (first[found].faulty, len(first[found].suspects)) == ((), 2)
    assert verdict(first[found], again[found]).ranks == (where,)
    assert verdict(first[found], first[found]).ranks == ()
