"""The mesh for the workers that there are: legal, within memory, as fast as any, as near to the configured one as can be."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytron import presets
from raytron.config import RunConfig
from raytron.errors import ConfigError
from raytron.plan.cluster import ClusterShape, NodeShape, on_paper
from raytron.plan.elastic import Resized, best_plan
from raytron.plan.growth import Growth
from raytron.plan.losses import page
from raytron.plan.memory import least_state, stage_held
from raytron.plan.mesh import MeshShape
from raytron.plan.meshes import groups, standing
from raytron.plan.plan import make_plan
from raytron.rules import problems

ELASTIC = {"elastic.min_workers": 1}
DENSE = RunConfig().replace(**ELASTIC, **{"mesh.pp": 2, "mesh.dp": 2, "mesh.tp": 2}, global_batch_size=16)
EXPERTS = RunConfig().replace(
    **ELASTIC, **{"model.experts.count": 8, "mesh.dp": 4, "mesh.tp": 2, "mesh.ep": 4}, global_batch_size=16
)


def mesh_of(config: RunConfig, workers: int | tuple[int, ...], **more) -> MeshShape:
    return best_plan(config, workers, **more).plan.mesh


def test_the_configured_mesh_stays_where_there_is_room():
    found = best_plan(DENSE, 8)
    assert found.plan.mesh == MeshShape.of(DENSE.mesh)
    assert (found.length, found.spares) == (1.0, 0)


def test_dp_gives_way_first():
    config = DENSE.replace(**{"mesh.dp": 4})
    found = best_plan(config, 13)
    assert found.plan.mesh == MeshShape(pp=2, dp=3, tp=2)
    assert found.spares == 1
    assert found.plan.config.deal().most == 6
    assert found.plan.config.global_batch_size == config.global_batch_size
    assert found.plan.config.micro_batch_size == config.micro_batch_size


def test_the_fewest_workers_that_are_as_fast():
    """8 micro-batches: 4 ranks run two each, and so do 5, 6 and 7 at most."""
    config = RunConfig().replace(**ELASTIC, **{"mesh.dp": 8}, global_batch_size=8)
    assert [mesh_of(config, workers).dp for workers in range(8, 0, -1)] == [8, 4, 4, 4, 4, 3, 2, 1]
    text = str(best_plan(config, 7))
    assert "DP4" in text
    assert "3 left as spares" in text


def test_other_meshes_come_where_tp_and_pp_have_no_room():
    assert mesh_of(DENSE, 3) == MeshShape(dp=3)
    assert mesh_of(DENSE, 1) == MeshShape()
    long = DENSE.replace(**{"mesh.dp": 1, "mesh.cp": 2, "mesh.cp_all_to_all": 2})
    assert mesh_of(long, 8) == MeshShape(pp=2, cp=2, tp=2, cp_all_to_all=2)
    assert mesh_of(long, 2).world == 2


def test_experts_are_shared_out_as_far_as_the_ranks_divide():
    assert mesh_of(EXPERTS, 8).ep == 4
    three = best_plan(EXPERTS, 6).plan
    assert (three.mesh.dp, three.mesh.ep) == (3, 2)  # 8 experts and 6 ranks: ep 2
    alone = best_plan(EXPERTS, 1).plan
    assert alone.mesh == MeshShape()
    assert problems(alone.config) == []


def test_a_tp_group_stays_on_its_node():
    assert groups((3, 3), 2) == 2
    assert groups((1, 1, 1), 2) == 1  # no node holds one: across
    assert standing((3, 3), 2, 4) == (2, 2)
    assert standing((1, 1, 1), 2, 2) == (1, 1, 0)
    config = DENSE.replace(**{"mesh.pp": 1, "mesh.dp": 4})
    found = best_plan(config, (3, 2, 1))
    assert found.plan.mesh == MeshShape(dp=2, tp=2)
    assert found.standing == (2, 2, 0)


def test_more_workers_than_the_mesh_was_made_for():
    assert mesh_of(DENSE, 16) == MeshShape(pp=2, dp=4, tp=2)
    bounded = DENSE.replace(**{"elastic.max_workers": 12})
    assert mesh_of(bounded, 16) == MeshShape(pp=2, dp=3, tp=2)
    assert best_plan(bounded, 16).length < 1


def test_never_over_memory():
    cluster = ClusterShape(tuple(NodeShape(f"node-{at}", 64, 8, 0, "H100") for at in range(8)))
    config = presets.find("llama3_70b_64xh100").replace(**ELASTIC)
    made = best_plan(config, (8,) * 5, cluster)
    assert made.plan.mesh == MeshShape(pp=4, dp=1, tp=8)
    with pytest.raises(ConfigError, match="no mesh for 16 workers fits") as caught:
        best_plan(config, (8, 8), cluster)
    assert caught.value.problems[0].where == "elastic.min_workers"
    assert "recompute" in caught.value.problems[0].remedy


def test_the_least_number_is_of_workers_not_of_the_mesh():
    """Of 7 workers a mesh of 4 is the best, and 3 wait."""
    assert mesh_of(DENSE.replace(**{"elastic.min_workers": 6}), 7).world == 4


def test_too_few_workers_are_waited_for():
    with pytest.raises(ConfigError, match=r"6 workers at least, and there are 5") as caught:
        best_plan(DENSE.replace(**{"elastic.min_workers": 6}), 5)
    assert caught.value.problems[0].remedy == "wait for 1 more, or lower it"


def test_keys_that_follow_from_the_mesh():
    config = RunConfig().replace(
        **ELASTIC, **{"mesh.pp": 4, "pipeline.split": [1, 1, 1, 1], "pipeline.schedule": "zb-v", "model.layers": 8}
    )
    config = config.replace(**{"pipeline.split": None, "pipeline.layout": "Et|t|t|t|t|t|t|tL", "model.layers": 8})
    moved = best_plan(config, 2).plan.config
    assert (moved.pipeline.layout, problems(moved)) == (None, [])
    noisy = RunConfig().replace(**ELASTIC, **{"mesh.dp": 2, "observe.gradient_noise": True})
    assert not best_plan(noisy, 1).plan.config.observe.gradient_noise
    replicas = RunConfig().replace(**ELASTIC, **{"mesh.dp": 8, "mesh.replicate": 2}, global_batch_size=8)
    assert [mesh_of(replicas, count).replicate for count in (8, 4, 3)] == [2, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.sampled_from([DENSE, EXPERTS]), st.sampled_from(["1f1b", "zb-h1", "auto"]))
def test_every_answer_is_legal_and_the_same_again(workers, config, schedule):
    config = config.replace(**{"pipeline.schedule": schedule})
    found, again = best_plan(config, workers), best_plan(config, workers)
    assert found == again
    assert found.plan.mesh.world + found.spares == workers
    assert sum(found.standing) == found.plan.mesh.world
    assert problems(found.plan.config) == []
    assert all(each.length >= found.length * 0.99 for each in found.candidates)


def test_the_answer_comes_soon():
    """Of processor time: well above what it takes, well below what a recovery could spare."""
    for name, on, workers, limit in (("mixtral_8x7b_64xh100", "64xH100", (8,) * 7 + (7,), 1.0),
                                     ("llama3_405b_1024xh200", "512xH200", (8,) * 63, 4.0)):  # fmt: skip
        config = presets.find(name).replace(**ELASTIC)
        before = time.process_time()
        best_plan(config, workers, on_paper(on))
        assert time.process_time() - before < limit


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe", "zb-h2"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_what_is_put_aside_unseen_would_not_have_fitted(schedule, zero):
    """The bound on memory is one, and a long schedule is known from its first part."""
    for config in (DENSE, EXPERTS):
        changes = {"pipeline.schedule": schedule, "data_parallel.zero": zero, "mesh.pp": 2, "mesh.dp": 2, "mesh.ep": 1}
        plan = make_plan(config.replace(**changes), None)
        held = stage_held(plan.config, plan.stages, 0, "cpu").device * 2
        fullest = plan.memory.ranks[0]
        state = fullest.weights + fullest.gradients + fullest.optimizer
        assert 0.3 * state < least_state(plan.config) < state
        assert least_state(plan.config) + held <= plan.memory.largest
        found = best_plan(plan.config, 8).candidates[0]
        assert (found.mesh, found.most) == (plan.mesh, 8)
        assert found.bytes == max(rank.total + rank.host for rank in plan.memory.ranks)
        half = best_plan(plan.config, 4)
        assert half.plan.mesh.dp == 1
        assert half.length == pytest.approx(half.plan.timeline.makespan / plan.timeline.makespan)


def test_the_page_says_what_follows_a_loss():
    config = DENSE.replace(**{"mesh.dp": 4, "elastic.min_workers": 6, "elastic.max_workers": 16})
    cluster = ClusterShape(tuple(NodeShape(f"node-{at}", 4) for at in range(4)))
    head, *rows = page(make_plan(config, cluster)).splitlines()
    assert head == "elastic   at least 6 workers and at most 16; where some are lost:"
    told = [row.split("  ")[1].strip() for row in rows[1:]]
    assert told == ["1 worker", "2 workers", "1 node", "2 nodes"]
    assert "PP2·DP3·CP1·TP2" in rows[1]
    assert "3 spares" in rows[1]
    assert "PP2·DP2·CP1·TP2" in rows[4]
    short = page(make_plan(config.replace(**{"elastic.min_workers": 16}), cluster))
    assert "needs 16 workers at least" in short


# ---- growing again

NODES = {"a": 4, "b": 4}


def search(room: tuple[int, ...]) -> Resized:
    return best_plan(DENSE, room)


def growth(**changes: float) -> Growth:
    return Growth(DENSE.replace(**{f"elastic.{key}": value for key, value in changes.items()}).elastic)


def test_room_has_to_stay():
    policy, now = growth(grow_after_s=30), best_plan(DENSE, 4)
    policy.saw(0, {"a": 4})
    policy.saw(10, NODES)
    assert policy.look(35, now, search, stop_s=2).resized is None
    policy.saw(38, NODES)
    assert policy.steady(38) == {"a": 4, "b": 0}
    policy.saw(41, NODES)
    verdict = policy.look(41, now, search, stop_s=2)
    assert verdict.resized is not None
    assert verdict.resized.plan.mesh.world == 8
    assert "room for long enough" in verdict.why


def test_a_node_that_came_and_went_begins_anew():
    policy = growth(grow_after_s=30)
    for at, room in ((0, NODES), (20, {"a": 4}), (25, NODES), (40, NODES)):
        policy.saw(at, room)
    assert policy.steady(40) == {"a": 4, "b": 0}
    policy.saw(56, NODES)
    assert policy.steady(56) == NODES


def test_nothing_is_known_before_the_time_has_passed():
    policy = growth(grow_after_s=30)
    assert policy.steady(0) == {}
    policy.saw(5, NODES)
    assert policy.steady(34) == {}
    assert policy.steady(35) == NODES


def test_it_has_to_pay():
    policy, now = growth(grow_after_s=0, pays_within_s=100), best_plan(DENSE, 4)
    policy.saw(0, NODES)
    gain = now.length / best_plan(DENSE, (4, 4)).length
    breaks_even = 100 * (1 - 1 / gain)
    assert policy.look(0, now, search, stop_s=0.99 * breaks_even).resized is not None
    verdict = policy.look(0, now, search, stop_s=1.01 * breaks_even)
    assert verdict.resized is None
    assert "does not make up for" in verdict.why
    assert policy.look(0, now, search, stop_s=0.99 * breaks_even, expected_s=50).resized is None


def test_no_more_than_asked_for():
    policy = growth(grow_after_s=0, max_workers=8)
    policy.saw(0, {"a": 4, "b": 4, "c": 4})
    verdict = policy.look(0, best_plan(DENSE, 8), search, stop_s=0)
    assert verdict == (None, "no steady room for more than 8 workers")
