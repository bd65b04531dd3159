"""Every schedule, with whole and cut backwards, loops and Vs, gives what one device gives, evaluation included."""

from __future__ import annotations

import pytest
from harness import bare, check_equal
from models import batch_of, tiny

from raytron.parallel.mesh import Mesh
from raytron.plan.mesh import MeshShape
from raytron.plan.plan import make_plan
from raytron.testing.twin import Twin
from raytron.training.engine import Engine

ONE_CHUNK = ("gpipe", "1f1b", "zb-h1", "zb-h2")
LOOPS = ("interleaved", "looped-bfs", "interleaved-zb")
VS = ("zb-v", "v-half", "v-min", "dualpipe-v")


def run(name, pp, **changes):
    """8 micro-batches through `pp` ranks, with as many layers as there are stages."""
    stages = pp if name in ONE_CHUNK else 2 * pp
    model = changes.pop("model", "llama")
    keys = {"pipeline.schedule": name, "mesh.pp": pp, "micro_batch_size": 1, "model.layers": max(4, stages), **changes}
    return tiny(model, **keys)


@pytest.mark.parametrize("name", [*ONE_CHUNK, *LOOPS, *VS])
def test_two_ranks(world, name):
    check_equal(world, run(name, 2), steps=20 if name in ("zb-h2", "dualpipe-v") else 5)


@pytest.mark.parametrize("name", ["zb-h2", *LOOPS, *VS])
def test_four_ranks_tied(world, name):
    check_equal(world, run(name, 4, model="gpt2"), steps=2)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("name", ["zb-h2", "looped-bfs", "interleaved-zb", *VS])
def test_sharded(world, name, zero):
    """Gradients that come in two parts, out of order, or twice for a tied table, are reduced once and whole."""
    tied = zero >= 2
    model = "qwen3" if tied else "llama"
    changes = {"mesh.dp": 2, "data_parallel.zero": zero, "model.tied_embeddings": tied}
    check_equal(world, run(name, 2, model=model, **changes), steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("name", [*ONE_CHUNK, *LOOPS, *VS])
def test_ranks_with_different_numbers_of_micro_batches(world, name, zero):
    """5 and 4 of them: other schedules beside each other, or an empty micro-batch (ZeRO 2 and 3)."""
    config = run(name, 2, model="gpt2", global_batch_size=9, **{"mesh.dp": 2, "data_parallel.zero": zero})
    check_equal(world, config, steps=2)


@pytest.mark.parametrize("name", ["zb-v", "dualpipe-v", "interleaved-zb"])
def test_with_tensor_parallelism_and_dropout(world, name):
    check_equal(world, run(name, 2, model="dropped", **{"mesh.tp": 2, "model.tied_embeddings": True}), steps=3)


def evaluated(rank, config):
    mesh = Mesh(MeshShape.of(config.mesh), rank)
    engine = Engine(make_plan(config, None), mesh)
    first = engine.evaluate(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp))
    engine.step(batch_of(config, 0, mesh.coords.dp, mesh.shape.dp), 1e-3)
    engine.evaluate(batch_of(config, 1, mesh.coords.dp, mesh.shape.dp))
    return first


@pytest.mark.parametrize(
    ("name", "pp", "batch"), [("zb-v", 2, 8), ("interleaved", 2, 6), ("v-min", 4, 6), ("looped-bfs", 2, 2)]
)
def test_evaluation_follows_the_placement(world, name, pp, batch):
    config = run(name, pp, global_batch_size=batch)
    results = world.run(pp, evaluated, config)
    assert all(result == results[0] for result in results)
    total, tokens = results[0]
    assert tokens == batch_of(config).weights.sum()
    assert total / tokens == pytest.approx(Twin(bare(config)).loss(batch_of(config), training=False).item(), rel=1e-6)


@pytest.mark.parametrize(("name", "batch"), [("interleaved", 3), ("interleaved-zb", 5), ("zb-v", 1), ("zb-h2", 2)])
def test_any_number_of_micro_batches(world, name, batch):
    check_equal(world, run(name, 2, global_batch_size=batch), steps=2)


LAYOUTS = {
    "embedding and head alone": ("1f1b", 3, "E|t*4|L"),
    "a stage that only passes on": ("interleaved", 2, "E|tt||ttL"),
    "a V, uneven": ("zb-v", 2, "Et||tt|tL"),
    "a head alone on the first rank": ("v-half", 2, "E|ttt|t|L"),
}


@pytest.mark.parametrize(("name", "pp", "layout"), LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_layouts(world, name, pp, layout, model):
    check_equal(world, run(name, pp, model=model, **{"pipeline.layout": layout}), steps=3)
