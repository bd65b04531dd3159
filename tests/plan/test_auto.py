"""The choice of a schedule: fastest that fits, by FLOPs or by measured times, and it says why."""

import json
import pickle

import pytest

from raytron.config import SCHEDULE_CHUNKS, RunConfig
from raytron.errors import ConfigError
from raytron.plan.actions import Op
from raytron.plan.auto import choose, resolved
from raytron.plan.cluster import on_paper
from raytron.plan.plan import make_plan
from raytron.plan.times import Times, facts, read_times, write_times
from raytron.plan.weigh import stage_cost, stages_of, weights

AUTO = RunConfig().replace(
    **{"mesh.pp": 4, "model.layers": 16, "model.vocab": 512, "data.tokenizer.vocab": 512},
    **{"pipeline.schedule": "auto", "global_batch_size": 16},
)


def test_every_schedule_is_tried_and_the_reasons_are_said():
    told = []
    choice = choose(AUTO, report=told.append)
    names = {candidate.name for candidate in choice.candidates}
    assert names == set(SCHEDULE_CHUNKS) - {"auto"}
    assert {item.chunks for item in choice.candidates if item.name == "interleaved"} == {2, 3, 4}
    assert len(told) == len(choice.candidates)
    assert choice.best.why_not == ""
    fastest = min(item.makespan for item in choice.candidates)
    assert choice.best.makespan <= fastest * 1.01
    assert all(item.bytes >= choice.best.bytes for item in choice.candidates if item.makespan <= fastest * 1.01)
    for item in choice.candidates[1:]:
        assert item.why_not
        assert item.name in str(choice)


def test_the_figures_are_those_of_the_plan():
    for item in choose(AUTO).candidates:
        plan = make_plan(resolved(AUTO, item.name, item.chunks), None)
        assert item.makespan == pytest.approx(plan.timeline.makespan / item.chunks)
        assert item.bytes == plan.memory.largest


def test_a_memory_bound_takes_the_fastest_that_fits():
    free = choose(AUTO)
    sizes = sorted({item.bytes for item in free.candidates})
    bound = choose(AUTO, limit=sizes[1])
    assert bound.best.bytes <= sizes[1] < free.best.bytes
    assert any("needs" in item.why_not for item in bound.candidates)
    assert f"within {sizes[1] / 2**20:.2f} MiB" in str(bound)
    with pytest.raises(ConfigError, match="no schedule fits"):
        choose(AUTO, limit=sizes[0] - 1)


def test_a_plan_holds_its_choice_and_a_bound_of_its_own():
    plan = make_plan(AUTO, None)
    assert plan.choice is not None
    assert plan.schedule.name == plan.choice.best.name
    assert len(plan.stages) == 4 * plan.choice.best.chunks
    assert "own span" in str(plan)
    assert str(plan.choice) in str(plan)
    assert pickle.loads(pickle.dumps(plan)) == plan
    least = min(item.bytes for item in plan.choice.candidates)
    small = make_plan(AUTO.replace(**{"pipeline.memory_gb": least / 2**30}), None)
    assert small.choice is not None
    assert small.choice.best.bytes == least
    on_gpus = make_plan(AUTO, on_paper("4xH100"))
    assert on_gpus.choice is not None
    assert on_gpus.choice.limit == 72_000_000_000


def test_without_a_wait_for_the_norm_the_own_span_counts():
    choice = choose(AUTO.replace(**{"optimizer.at_once": True, "optimizer.clip_norm": None}))
    fastest = min(item.own_span for item in choice.candidates)
    assert choice.best.own_span <= fastest * 1.01
    assert "own span of" in str(choice)


def test_what_is_given_bounds_what_is_tried():
    assert {item.chunks for item in choose(AUTO.replace(**{"pipeline.virtual_stages": 2})).candidates} == {2}
    given = choose(AUTO.replace(**{"pipeline.layout": "Et|(t*2|)*6t*3L"}))
    legal = [item for item in given.candidates if item.makespan]
    assert {item.chunks for item in legal} == {2}
    assert any("8 entries for 4 stages" in item.why_not for item in given.candidates)
    few = choose(AUTO.replace(global_batch_size=6))
    assert any("at least 8 micro-batches" in item.why_not for item in few.candidates)
    with pytest.raises(ConfigError, match="5 entries"):
        choose(AUTO.replace(**{"pipeline.split": [4, 3, 3, 3, 3]}))


def measured(config, chunks, scale):
    stages = stages_of(config, config.mesh.pp * chunks)
    items = weights(config)
    seconds = {op: tuple(scale[op] * cost for cost in items[op].by_stage(stages)) for op in (Op.F, Op.I, Op.W)}
    none = (None,) * len(stages)
    return Times(stages, {Op.F: seconds[Op.F], Op.B: none, Op.I: seconds[Op.I], Op.W: seconds[Op.W]}, "zb-h1", (2, 4))


def test_measured_times_carry_over_to_other_stages():
    """Times in proportion to FLOPs give what FLOPs give; dear input gradients make v-min worse than 1f1b."""
    even = measured(AUTO, 1, {Op.F: 1e-9, Op.I: 1e-9, Op.W: 1e-9})
    stages = stages_of(AUTO, 8)
    by_time, by_flops = stage_cost(AUTO, stages, even), stage_cost(AUTO, stages)
    assert by_time.forward == pytest.approx(by_flops.forward)
    assert by_time.input_grad == pytest.approx(by_flops.input_grad)
    dear = choose(AUTO, times=measured(AUTO, 1, {Op.F: 1e-9, Op.I: 3e-9, Op.W: 1e-9}))
    spans = {item.name: item.makespan for item in dear.candidates if item.chunks <= 2}
    assert spans["v-min"] > spans["zb-h1"]
    assert "the times of zb-h1, measured in steps 2 to 4" in str(dear)


def test_a_whole_backward_is_cut_by_flops():
    stages = ((0, 4), (4, 8), (8, 12), (12, 16))
    none = (None,) * 4
    times = Times(stages, {Op.F: (1.0,) * 4, Op.B: (2.0,) * 4, Op.I: none, Op.W: none}, "1f1b", (2, 4))
    cost = stage_cost(AUTO, stages, times)
    assert [i + w for i, w in zip(cost.input_grad, cost.weight_grad, strict=True)] == pytest.approx([2.0] * 4)
    assert cost.input_grad[0] > cost.weight_grad[0]


def test_times_travel_in_files(tmp_path):
    for rank in range(2):
        seconds = {"F": {str(rank): 0.1}, "B": {str(rank): 0.2}}
        record = {"stages": [[0, 2], [2, 4]], "schedule": "1f1b", "steps": [2, 4], "seconds": seconds}
        write_times(tmp_path, rank, {**record, "facts": facts(RunConfig())})
    times = read_times(tmp_path, RunConfig())
    assert times.stages == ((0, 2), (2, 4))
    assert times.seconds[Op.F] == (0.1, 0.1)
    assert times.seconds[Op.I] == (None, None)
    with pytest.raises(ConfigError, match=r"another model\.hidden"):
        read_times(tmp_path, RunConfig().replace(**{"model.hidden": 512}))
    (tmp_path / "times" / "rank-1.json").unlink()
    with pytest.raises(ConfigError, match="lacks the times of some ranks"):
        read_times(tmp_path, RunConfig())
    with pytest.raises(ConfigError, match="no measured times"):
        read_times(tmp_path / "other", RunConfig())
    (tmp_path / "times" / "rank-0.json").write_text(json.dumps({})[:1])
    with pytest.raises(ConfigError, match="can't be read"):
        read_times(tmp_path, RunConfig())
